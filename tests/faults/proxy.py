"""The network between two agents, as bad as a test wants it: a TCP proxy that understands what passes.

It stops the world at a chosen message (`Gate`): the message waits in the proxy, as if it were still on the wire, and the
test does its worst: cuts, resets, silences, kills an agent.  Then the message goes on its way, changed or doubled or
not at all.  Heartbeats pass a message that waits, so that neither side takes waiting for silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from migrated.protocol.framing import LENGTH_BYTES
from migrated.protocol.preamble import PREAMBLE_BYTES, Preamble, Purpose, decode

PIECE_BYTES = 1 << 18
UP, DOWN = "up", "down"  # source to target, and back
HEARTBEATS = ("ping", "pong")
#: Before the session is agreed on a heartbeat that overtook would be an error of its own.
NOTHING_OVERTAKES = ("hello", "ready", "resume", "resumed", "lacking", "lacking-end")
Change = Callable[[bytes], bytes]
Pump = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]


class _Tag(msgspec.Struct):
    t: str


_tag_of = msgspec.msgpack.Decoder(_Tag)


def tag_of(frame: bytes) -> str:
    """The word of a control frame."""
    return _tag_of.decode(frame[LENGTH_BYTES:]).t


@dataclasses.dataclass
class Gate:
    """Where to stop: the ``nth`` control message ``tag`` that goes ``way``, or ``page_bytes`` of pages.

    With ``after``, pages count from the moment that message has passed.
    """

    way: str = UP
    tag: str = ""
    nth: int = 1
    page_bytes: int | None = None
    after: str = ""
    purposes: tuple[Purpose, ...] = (Purpose.BULK, Purpose.URGENT)
    reached: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    released: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    change: Change | None = None
    drop: bool = False
    seen: int = 0
    armed: bool = False

    def release(self, *, change: Change | None = None, drop: bool = False) -> None:
        """Let it go on: changed, or not at all."""
        self.change, self.drop = change, drop
        self.released.set()

    def stops(self, way: str, tag: str) -> bool:
        """Whether this message is the one."""
        if self.reached.is_set() or self.page_bytes is not None or (way, tag) != (self.way, self.tag):
            return False
        self.seen += 1
        return self.seen == self.nth

    def stops_pages(self, purpose: Purpose, count: int) -> bool:
        """Whether pages stop here; ``count`` bytes of them are about to pass."""
        if self.page_bytes is None or (self.after and not self.armed) or purpose not in self.purposes:
            return False
        if not self.reached.is_set():
            self.seen += count
        return self.seen > self.page_bytes and not self.released.is_set()


class Connection:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.near, self.near_out = near, near_out
        self.far: asyncio.StreamReader | None = None
        self.far_out: asyncio.StreamWriter | None = None
        self.preamble: Preamble | None = None
        self.silent = False  # half-open: open, and nothing passes any more

    @property
    def purpose(self) -> Purpose | None:
        """Once the preamble has come."""
        return self.preamble.purpose if self.preamble is not None else None

    def end(self, *, reset: bool) -> None:
        """Both ends at once."""
        for writer in self._writers:
            if not reset:
                writer.close()
                continue
            if not writer.transport.is_closing():
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # One that is closing waits until its peer has taken what was written, which may be never.
            writer.transport.abort()

    async def ended(self) -> None:
        """After `end`: until the loop has let go of both."""
        for writer in self._writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @property
    def _writers(self) -> list[asyncio.StreamWriter]:
        return [writer for writer in (self.near_out, self.far_out) if writer is not None]

    async def run(self) -> None:
        """Until both ends are closed."""
        data = await self.near.readexactly(PREAMBLE_BYTES)
        self.preamble = decode(data)
        if self.proxy.refusing:
            self.proxy.refused += 1
            self.end(reset=True)
            return
        self.far, self.far_out = await asyncio.open_connection(*self.proxy.target, limit=PIECE_BYTES)
        self.far_out.write(data)
        self.proxy.on_connection(self)
        control = self.purpose is Purpose.CONTROL
        pump = self._pump_control if control else self._pump_pages
        await asyncio.gather(
            self._both_ends(pump, self.near, self.far_out, UP), self._both_ends(pump, self.far, self.near_out, DOWN)
        )

    async def _both_ends(
        self, pump: Pump, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        """What was sent before the end of a connection still arrives, then the end does."""
        try:
            await pump(reader, writer, way)
        except (OSError, asyncio.IncompleteReadError):
            self.end(reset=True)
        finally:
            if not self.silent:
                writer.close()

    def _tape(self, way: str, data: bytes) -> None:
        if self.proxy.taping and self.preamble is not None:
            self.proxy.tape.append((self.preamble, way, data))

    async def _hush(self) -> None:
        """Wait as long as nothing may pass."""
        await self.proxy.flowing.wait()
        if self.silent:
            await asyncio.Event().wait()  # until the proxy is closed

    async def _pump_pages(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        proxy, purpose = self.proxy, self.preamble.purpose if self.preamble is not None else Purpose.BULK
        while data := await reader.read(PIECE_BYTES):
            await self._hush()
            self._tape(way, data)
            gate = proxy.gate
            if way == UP and gate is not None and gate.stops_pages(purpose, len(data)):
                gate.reached.set()
                await gate.released.wait()
                change, gate.change = gate.change, None
                if change is not None:
                    data = change(data)
            await self._hush()
            writer.write(data)
            await writer.drain()
        await self._hush()  # the end of a connection travels as its bytes do

    async def _pump_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        waiting: asyncio.Queue[bytes] = asyncio.Queue()  # what is behind a message that waits; b"": the end
        passing: asyncio.Task[None] | None = None
        try:
            while True:
                frame = await self._frame(reader)
                await self._hush()
                behind = passing is not None and not passing.done()
                if behind and not (frame and tag_of(frame) in HEARTBEATS and self.proxy.heartbeats_overtake):
                    waiting.put_nowait(frame)
                    if not frame:
                        break
                    continue
                if not frame:
                    break
                tag = tag_of(frame)
                self._tape(way, frame)
                self.proxy.passed.append((way, tag))
                gate = self.proxy.gate
                if gate is not None and gate.stops(way, tag):
                    passing = asyncio.ensure_future(self._held(gate, frame, waiting, writer))
                    continue
                writer.write(frame)
                self.proxy.on_passed(way, tag)
                await writer.drain()
            if passing is not None:
                await passing
            await self._hush()
        finally:
            if passing is not None:
                passing.cancel()

    @staticmethod
    async def _frame(reader: asyncio.StreamReader) -> bytes:
        """A whole frame, or nothing at the end."""
        try:
            head = await reader.readexactly(LENGTH_BYTES)
            return head + await reader.readexactly(int.from_bytes(head, "big"))
        except (asyncio.IncompleteReadError, OSError):
            return b""

    async def _held(
        self, gate: Gate, frame: bytes, waiting: asyncio.Queue[bytes], writer: asyncio.StreamWriter
    ) -> None:
        gate.reached.set()
        await gate.released.wait()
        await self._hush()
        if not gate.drop:
            writer.write(gate.change(frame) if gate.change is not None else frame)
            with contextlib.suppress(OSError):
                await writer.drain()
            self.proxy.on_passed(gate.way, gate.tag)
            if self.proxy.after_release is not None:
                self.proxy.after_release.set()
        while not waiting.empty():
            behind = waiting.get_nowait()
            if behind:
                self.proxy.passed.append((gate.way, tag_of(behind)))
                writer.write(behind)
                self.proxy.on_passed(gate.way, tag_of(behind))
        with contextlib.suppress(OSError):
            await writer.drain()


class Proxy:
    """Listens on ``address`` and carries to ``target``."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.gate: Gate | None = None
        self.refusing = False
        self.flowing = asyncio.Event()  # not set: the link stalls
        self.flowing.set()
        self.refused = 0  # connections, so far
        self.after_release: asyncio.Event | None = None  # set when the message that waited has been written out
        self.passed: list[tuple[str, str]] = []
        self.connections: list[Connection] = []
        self.sessions: set[bytes] = set()  # of control connections since then
        self.taping = False
        self.tape: list[tuple[Preamble, str, bytes]] = []  # frames and pieces of pages, as they went
        self.dialled = asyncio.Event()  # a control connection has come since `forget`
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    @property
    def heartbeats_overtake(self) -> bool:
        """Whether pings pass the message that waits."""
        return self.gate is None or self.gate.tag not in NOTHING_OVERTAKES

    @contextlib.asynccontextmanager
    async def listening(self, host: str = "127.0.0.1") -> AsyncIterator[Proxy]:
        """While it is entered."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=PIECE_BYTES)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self._server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        self.connections.append(connection)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            await connection.run()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the ends of connections are what this is about
        finally:
            connection.end(reset=True)
            await connection.ended()
            self.connections.remove(connection)
            if task is not None:
                self._tasks.discard(task)

    def on_connection(self, connection: Connection) -> None:
        """A connection has said what it is."""
        if connection.preamble is not None and connection.purpose is Purpose.CONTROL:
            self.sessions.add(connection.preamble.session)
            self.dialled.set()

    def on_passed(self, way: str, tag: str) -> None:
        """A control message is through."""
        del way
        if self.gate is not None and tag == self.gate.after:
            self.gate.armed = True

    # ------------------------------------------------------------ what a test does to it

    def expect(self, gate: Gate | None) -> None:
        """Stop there next; forget what was before."""
        if self.gate is not None:
            self.gate.released.set()
        self.gate = gate
        self.passed.clear()
        self.sessions.clear()
        self.dialled.clear()

    def chosen(self, purposes: tuple[Purpose, ...] | None = None) -> list[Connection]:
        """The connections of these kinds; all by default."""
        return [one for one in self.connections if purposes is None or one.purpose in purposes]

    def cut(self, *, reset: bool = False, purposes: tuple[Purpose, ...] | None = None) -> None:
        """End connections."""
        for connection in self.chosen(purposes):
            connection.end(reset=reset)

    async def stall(self, seconds: float) -> None:
        """Let nothing pass, of any connection in either direction, for so long; then all of it, and in order."""
        self.flowing.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.flowing.set()

    def silence(self, purposes: tuple[Purpose, ...] | None = None) -> None:
        """Keep connections open and let nothing pass any more; new ones are well."""
        for connection in self.chosen(purposes):
            connection.silent = True
