"""The control connection between two agents: the sans-I/O session's transport, and the guest-state pipe inside it.

`ControlLink` owns one TCP connection.  A reader task feeds the session and dispatches its messages: it answers
heartbeats, passes guest-state bytes to the `StatePipe`, and queues everything else in order for `receive`.  `lost`
keeps the reason why the connection ended (close, reset, silence, a protocol error, the peer's Abort), and every later
call raises it.

A slow driver stops the reader (back pressure), and a peer that reads slowly stops `send`.  Neither counts as silence:
heartbeats never wait for buffer space, and the silence limit is suspended while the reader waits for the driver.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from migrated.address import Address
from migrated.errors import (
    ConnectionLostError,
    MigratedError,
    PeerError,
    RemoteProtocolError,
    TlsError,
    as_migrated_error,
)
from migrated.protocol.heartbeat import Heartbeat
from migrated.protocol.messages import Abort, AnyMessage, Ping, Pong, StateChunk, StateEnd
from migrated.protocol.session import Session
from migrated.waiting import within

READ_BYTES = 1 << 18
STATE_PIECE_BYTES = 1 << 18
#: Guest-state pieces queued for a slow driver before the link stops reading.
STATE_QUEUE_PIECES = 64
#: Messages queued for the flow before the link stops reading.
INBOX_MESSAGES = 64
#: With more than this unsent no heartbeat is sent: the queued bytes themselves show that we are alive.
UNSENT_BYTES = 1 << 16
#: How long to wait for the peer's reason after a page connection has ended.
LAST_WORDS_SECONDS = 0.25

M = TypeVar("M")
T = TypeVar("T")


def tune(sock: socket.socket, *, silence_seconds: float) -> None:
    """Set a connection's options: no delay, keepalive, and detection of a dead peer after ``silence_seconds``."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = max(1, int(silence_seconds / 3))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_seconds * 1000))


async def _next(queue: asyncio.Queue[T], end: asyncio.Future[MigratedError]) -> T:
    """Return the next item; once the queue is empty and ``end`` has resolved, raise the error it holds."""
    if not queue.empty():
        return queue.get_nowait()
    get = asyncio.ensure_future(queue.get())
    try:
        waiting: set[asyncio.Future[Any]] = {get, end}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not get.done():
            raise end.result()
        return get.result()
    finally:
        get.cancel()


class StatePipe:
    """`StateChannel` over the control messages of one link."""

    def __init__(self, link: ControlLink) -> None:
        self._incoming: asyncio.Queue[bytes] = asyncio.Queue(STATE_QUEUE_PIECES)
        self._ended = False
        self._link = link

    async def feed(self, data: bytes) -> None:
        """Take bytes from the link; ``b""`` ends the stream."""
        await self._incoming.put(data)

    async def read(self) -> bytes:
        """See `StateChannel`."""
        if self._ended:
            return b""
        data = await _next(self._incoming, self._link.ended)
        self._ended = not data
        return data

    async def write(self, data: bytes) -> None:
        """See `StateChannel`."""
        for start in range(0, len(data), STATE_PIECE_BYTES):
            await self._link.send(StateChunk(data[start : start + STATE_PIECE_BYTES]))

    async def close_write(self) -> None:
        """See `StateChannel`."""
        await self._link.send(StateEnd())


class ControlLink:
    """One control connection.  `start` it for a session that no other link uses; `close` it at the end."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        heartbeat: Heartbeat,
        received: bytes = b"",
    ) -> None:
        """Process the bytes already ``received`` before reading more."""
        self.pipe = StatePipe(self)
        self._session: Session | None = None
        self._reader = reader
        self._writer = writer
        self._heartbeat = heartbeat
        self._inbox: asyncio.Queue[AnyMessage] = asyncio.Queue(INBOX_MESSAGES)
        self._lost: asyncio.Future[MigratedError] = asyncio.get_running_loop().create_future()
        self._broken: asyncio.Future[MigratedError] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._ping = 0
        self._heard_at = asyncio.get_running_loop().time()
        self._received = received
        self._feeding = False  # the reader waits for a consumer
        peer = writer.get_extra_info("peername")
        self.peer = str(Address(*peer[:2])) if isinstance(peer, tuple) else str(peer or "local")

    @property
    def session(self) -> Session:
        """The session whose messages this link carries."""
        if self._session is None:
            raise ConnectionLostError(f"nobody has begun to talk to {self.peer}")
        return self._session

    def start(self, session: Session) -> None:
        """Start the reader and the heartbeat; until `close` this is the session's connection."""
        self._session = session
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._beat())]

    # ------------------------------------------------------------ the end of the connection

    @property
    def lost(self) -> MigratedError | None:
        """Why the session on this connection has ended, if it has: broken, silent, or ended by the peer's Abort."""
        return self._lost.result() if self._lost.done() else None

    @property
    def broken(self) -> MigratedError | None:
        """Why nothing can be sent any more, if so.  After the peer's Abort the answer to it can still be sent."""
        return self._broken.result() if self._broken.done() else None

    @property
    def ended(self) -> asyncio.Future[MigratedError]:
        """Resolves when the session on this connection has ended.  Only wait for it."""
        return self._lost

    async def reason_for(self, error: BaseException) -> BaseException:
        """Return the root cause: a failing peer closes its page connections, and its Abort may arrive just after."""
        if not isinstance(error, ConnectionLostError):
            return error
        await asyncio.wait({self._lost}, timeout=LAST_WORDS_SECONDS)
        return self.lost if isinstance(self.lost, PeerError) else error

    def _lose(self, error: MigratedError) -> None:
        if not self._broken.done():
            self._broken.set_result(error)
            self._writer.transport.abort()
        if not self._lost.done():
            self._lost.set_result(error)

    def _broke(self, error: Exception | None) -> MigratedError:
        """Return why the transport has failed: with TLS, one side may have refused the other."""
        refusal = self._writer.get_extra_info("refusal")
        if isinstance(refusal, TlsError):
            return TlsError(f"{self.peer}: {refusal.message}", code=refusal.code, hint=refusal.hint)
        reason = "" if error is None else f": {error}"
        return ConnectionLostError(f"the connection to {self.peer} broke{reason}")

    async def close(self) -> None:
        """Send what is queued and close the connection.  Idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._writer.close()
        try:
            async with asyncio.timeout(2):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # some of the queued bytes may not have been sent
        finally:
            self._lose(ConnectionLostError(f"the connection to {self.peer} was closed by us"))
            if self._session is not None:
                self._session.connection_lost()

    # ------------------------------------------------------------ sending

    async def send(self, *messages: AnyMessage) -> None:
        """Send messages, in one piece.  Raises LocalProtocolError if the session does not allow one, ConnectionLostError."""
        self.post(*messages)
        try:
            await self._writer.drain()
        except (OSError, ConnectionError) as error:
            self._lose(self._broke(error))
            raise self._broke(error) from error

    def post(self, *messages: AnyMessage) -> None:
        """Send messages without waiting for buffer space, when something more urgent waits.

        If this raises for a single message, the session has made no step.  If it returns, the messages count as sent,
        whether their bytes ever leave or not.
        """
        if self._broken.done():
            raise self._broken.result()
        frames = b"".join([self.session.send(message) for message in messages])
        try:
            self._writer.write(frames)
        except Exception as error:  # noqa: BLE001 - any error of the transport means that the connection is lost
            self._lose(self._broke(error))

    # ------------------------------------------------------------ receiving

    async def receive(self, *, after_abort: bool = False) -> AnyMessage:
        """Return the next message that is neither heartbeat nor guest state; raise the error that ended the session.

        ``after_abort``: the session has been aborted; return what still arrives on the connection.
        """
        return await _next(self._inbox, self._broken if after_abort else self._lost)

    async def expect(self, kind: type[M], *, limit_seconds: float, what: str) -> M:
        """Return the next message, which must be of this kind and arrive in time; ``what`` names it for people."""
        async with within(limit_seconds, what, who=self.peer):
            message = await self.receive()
        if isinstance(message, Abort):
            raise PeerError(f"{self.peer}: {message.message}", code=message.code, hint=message.hint)
        if not isinstance(message, kind):
            raise MigratedError(f"{type(message).__name__} came from {self.peer} while waiting for {what}")
        return message

    async def _read(self) -> None:
        try:
            while True:
                data, self._received = self._received, b""
                data = data or await self._reader.read(READ_BYTES)
                if not data:
                    self._lose(ConnectionLostError(f"{self.peer} closed the connection"))
                    return
                self._heard_at = asyncio.get_running_loop().time()
                self._heartbeat.heard(self._heard_at)
                for message in self.session.receive(data):
                    await self._sort(message)
        except (OSError, ConnectionError) as error:
            self._lose(self._broke(error))
        except RemoteProtocolError as error:
            hint = error.hint or "is that the port of a target agent of the same version?"
            self._lose(RemoteProtocolError(f"{self.peer}: {error.message}", code=error.code, hint=hint))
        except Exception as error:  # noqa: BLE001 - any other error is a bug: it ends this session by name
            self._lose(as_migrated_error(error))

    async def _sort(self, message: AnyMessage) -> None:
        match message:
            case Ping(sequence=sequence):
                self._say(Pong(sequence))
            case Pong():
                pass
            case StateChunk(data=data):
                if data:
                    await self._hand_over(self.pipe.feed(data))
            case StateEnd():
                await self._hand_over(self.pipe.feed(b""))
            case Abort(code=code, message=text, hint=hint):
                # Fail all waiters, and hand the message to the receiver: it may have to clean up and answer.
                if not self._lost.done():
                    self._lost.set_result(PeerError(f"{self.peer}: {text}", code=code, hint=hint))
                await self._hand_over(self._inbox.put(message))
            case _:
                await self._hand_over(self._inbox.put(message))

    async def _hand_over(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for the consumer.  Meanwhile nothing is read, and the silence limit is suspended."""
        self._feeding = True
        try:
            await work
        finally:
            self._feeding = False

    def _say(self, message: Ping | Pong) -> None:
        """Send a heartbeat without waiting; skip it if it would only lengthen the queue."""
        if self._broken.done() or self._writer.transport.get_write_buffer_size() > UNSENT_BYTES:
            return
        if self.session.may_send(message):
            self._writer.write(self.session.send(message))

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._broken.done():
            await asyncio.sleep(max(0.01, self._heartbeat.next_at() - loop.time()))
            now = loop.time()
            if self._writer.is_closing() and not self._broken.done():
                self._lose(self._broke(None))
                return
            if self._feeding:
                self._heard_at = now
                self._heartbeat.heard(now)
            if self._heartbeat.expired(now):
                self._lose(
                    ConnectionLostError(
                        f"nothing was heard from {self.peer} for {now - self._heard_at:.1f} s",
                        code="peer-silent",
                        hint="the network or the other agent is down; limits: timeouts.heartbeat_limit",
                    )
                )
                return
            if self._heartbeat.due(now):
                self._ping += 1
                self._say(Ping(self._ping))
