"""A simulated network: ordered connections that can be slow, cut, or silently dead in one direction.

A connection delivers data in order, each piece after its own delay.  `Network.block` holds back everything that goes in one
direction between two hosts.  `Connection.cut` ends a connection; each side notices after its own delay, or only when it
sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Self

from tests.simulation.loop import Life, current

END: Final = object()
#: The kernel drops a connection across a blocked path after this time.
SILENCE_SECONDS: Final = 4.0


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Endpoint:
    """One side of a connection."""

    def __init__(self, connection: Connection, side: int, life: Life) -> None:
        self.connection = connection
        self.side = side
        self.life = life
        self.error: OSError | None = None
        self.closed = False
        self.queue: deque[Any] = deque()
        self.held: list[Any] = []  # sent, but held back on a blocked path
        self.last_arrival = 0.0
        self.unacknowledged = 0
        self.on_item: Callable[[Any], None] | None = None
        self.on_error: Callable[[OSError], None] | None = None
        self.on_room: Callable[[], None] | None = None
        self._reader: asyncio.Future[None] | None = None
        self.ended = False  # END was sent

    @property
    def peer(self) -> Endpoint:
        return self.connection.ends[1 - self.side]

    # ------------------------------------------------------------ sending

    def send(self, item: Any) -> None:
        """Send an item to the peer.  Raises OSError if this side knows that the connection is dead."""
        if self.error is not None:
            raise self.error
        if self.closed:
            raise _os_error(errno.EPIPE)
        if isinstance(item, bytes):
            self.unacknowledged += len(item)
        self._travel(item)

    def _travel(self, item: Any) -> None:
        net = self.connection.network
        if net.is_blocked(self.life.host, self.peer.life.host):
            self.held.append(item)
            return
        self.last_arrival = max(
            self.last_arrival + 1e-7, net.loop.now + net.latency()
        )  # timers with equal times have no order
        net.at(self.last_arrival, self.peer.life, self.peer._arrive, item)
        if isinstance(item, bytes):
            net.at(self.last_arrival, self.life, self._acknowledged, len(item))

    def release(self) -> None:
        """Send what was held back: the path is open again."""
        held, self.held = self.held, []
        for item in held:
            self._travel(item)

    def _acknowledged(self, count: int) -> None:
        self.unacknowledged -= count
        if self.on_room is not None:
            self.on_room()

    # ------------------------------------------------------------ receiving

    def _arrive(self, item: Any) -> None:
        if self.connection.dead:
            return
        if self.closed or self.error is not None:
            if item is not END and not self.peer.closed:
                self.connection.network.after_latency(self.peer.life, self.peer.fail, errno.ECONNRESET)
            return
        if self.on_item is not None and not self.queue:
            self.on_item(item)
            return
        self.queue.append(item)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def attach(self, on_item: Callable[[Any], None], on_error: Callable[[OSError], None]) -> None:
        """Deliver to these callbacks from now on, beginning with what has already arrived."""
        self.on_error = on_error
        while self.queue:
            on_item(self.queue.popleft())
        self.on_item = on_item
        if self.error is not None:
            on_error(self.error)

    async def read(self, count: int) -> bytes:
        """Return the next bytes, or ``b""`` at the end."""
        while not self.queue:
            if self.error is not None:
                raise self.error
            if self.closed:
                raise _os_error(errno.EBADF)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self.queue.popleft()
        if item is END:
            self.queue.appendleft(item)
            return b""
        if len(item) > count:
            self.queue.appendleft(item[count:])
        return bytes(item[:count])

    def fail(self, number: int) -> None:
        """Notify this side that the connection is dead."""
        if self.error is not None or self.closed:
            return
        self.error = _os_error(number)
        self._wake()
        if self.on_error is not None:
            self.on_error(self.error)

    def end_sending(self) -> None:
        """Let the peer read what was sent, and then the end."""
        if self.error is None and not self.ended:
            self.ended = True
            self._travel(END)

    def close(self) -> None:
        """Close this side.  The peer reads what was sent, and then the end."""
        if self.closed:
            return
        self.end_sending()
        self.closed = True
        self._wake()

    descriptor_closed = close


class Connection:
    """A connection between two endpoints.  ``what`` is its purpose, once the preamble has arrived."""

    def __init__(self, network: Network, client: Life, server: Life) -> None:
        self.network = network
        self.dead = False
        self.what = "?"
        self.ends = (Endpoint(self, 0, client), Endpoint(self, 1, server))

    def over(self) -> bool:
        return self.dead or all(end.closed or end.error is not None for end in self.ends)

    def crosses(self, one: Any, other: Any) -> bool:
        return {self.ends[0].life.host, self.ends[1].life.host} == {one, other}

    def cut(self, delays: tuple[float | None, float | None]) -> None:
        """Lose everything in flight.  Each side notices after its delay; None: when it sends, or through silence."""
        self.dead = True
        for end, delay in zip(self.ends, delays, strict=True):
            when = SILENCE_SECONDS if delay is None else delay
            self.network.at(self.network.loop.now + when, end.life, end.fail, errno.ECONNRESET)


class Network:
    """All connections of a world."""

    def __init__(self, loop: Any, latency: Callable[[], float]) -> None:
        self.loop = loop
        self.latency = latency
        self.listeners: dict[tuple[str, int], SimSocket] = {}
        self.connections: list[Connection] = []
        self.blocked: dict[tuple[Any, Any], int] = {}
        self.hosts: dict[str, Any] = {}
        self.high_water = 1 << 16
        self.dials: list[tuple[float, str, str]] = []

    def at(self, when: float, life: Life, callback: Callable[..., None], *arguments: Any) -> None:
        self.loop.call_at(when, callback, *arguments, context=life.context)

    def after_latency(self, life: Life, callback: Callable[..., None], *arguments: Any) -> None:
        self.at(self.loop.now + self.latency(), life, callback, *arguments)

    # ------------------------------------------------------------ paths

    def is_blocked(self, sender: Any, receiver: Any) -> bool:
        return self.blocked.get((sender, receiver), 0) > 0

    def block(self, sender: Any, receiver: Any, seconds: float) -> None:
        """Block one direction for this time."""
        self.blocked[sender, receiver] = self.blocked.get((sender, receiver), 0) + 1
        self.loop.call_later(seconds, self._unblock, sender, receiver)
        self.loop.call_later(SILENCE_SECONDS, self._silence, sender, receiver)

    def _unblock(self, sender: Any, receiver: Any) -> None:
        if self.blocked.get((sender, receiver), 0) == 0:
            return
        self.blocked[sender, receiver] -= 1
        if not self.blocked[sender, receiver]:
            self._release(sender, receiver)

    def _release(self, sender: Any, receiver: Any) -> None:
        for connection in self.connections:
            for end in connection.ends:
                if end.life.host is sender and end.peer.life.host is receiver:
                    end.release()

    def _silence(self, sender: Any, receiver: Any) -> None:
        if not self.is_blocked(sender, receiver):
            return
        for connection in self.connections:
            if connection.crosses(sender, receiver) and not connection.over():
                connection.cut((self.latency(), self.latency()))

    def heal(self) -> None:
        """Open every path."""
        for sender, receiver in [path for path, count in self.blocked.items() if count]:
            self.blocked[sender, receiver] = 0
            self._release(sender, receiver)

    # ------------------------------------------------------------ making connections

    async def connect(self, sock: SimSocket, address: tuple[str, int]) -> None:
        """Connect like TCP: hang while a path is blocked, and fail with ECONNREFUSED if nobody listens."""
        life = current()
        self.dials.append((self.loop.now, life.host.name, address[0]))
        there = self.hosts.get(address[0])
        await asyncio.sleep(self.latency())
        while there is None or self.is_blocked(life.host, there) or self.is_blocked(there, life.host):  # noqa: ASYNC110 - as TCP tries again
            await asyncio.sleep(0.3)
        listener = self.listeners.get((address[0], address[1]))
        if listener is None or not listener.life.alive or listener.closed:
            raise _os_error(errno.ECONNREFUSED)
        connection = Connection(self, life, listener.life)
        self.connections = [known for known in self.connections if not known.over()]
        self.connections.append(connection)
        sock.endpoint = connection.ends[0]
        self.after_latency(listener.life, listener.offer, connection.ends[1])

    async def accept(self, listener: SimSocket) -> tuple[SimSocket, tuple[str, int]]:
        while not listener.backlog:
            listener.waiter = asyncio.get_running_loop().create_future()
            await listener.waiter
        if listener.life.host.out_of_descriptors():
            raise _os_error(errno.EMFILE)
        endpoint = listener.backlog.popleft()
        sock = SimSocket(self)
        sock.endpoint = endpoint
        return sock, (endpoint.peer.life.host.name, 40000)

    def transport(self, sock: SimSocket, protocol: Any) -> Transport:
        return Transport(self, sock, protocol)


class SimSocket:
    """The part of ``socket.socket`` that the code under test uses."""

    family = socket.AF_UNIX  # has no options to tune

    def __init__(self, network: Network, fileno: int | None = None) -> None:
        self.network = network
        self.life = current()
        self.endpoint: Any = None
        self.closed = False
        self.backlog: deque[Endpoint] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self._where: tuple[str, int] | None = None
        if fileno is None:
            self.fd = self.life.open(self)
        else:
            self.fd = fileno
            self.endpoint = self.life.fds[fileno].endpoint
            self.life.fds[fileno] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def setblocking(self, flag: bool) -> None: ...

    def setsockopt(self, *_: int) -> None: ...

    def bind(self, where: tuple[str, int]) -> None:
        self._where = (self.life.host.name, where[1])

    def listen(self, _: int) -> None:
        assert self._where is not None
        self.network.listeners[self._where] = self

    def getsockname(self) -> tuple[str, int]:
        assert self._where is not None
        return self._where

    def offer(self, endpoint: Endpoint) -> None:
        if self.closed:
            endpoint.close()
            return
        self.backlog.append(endpoint)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fileno(self) -> int:
        return self.fd

    def detach(self) -> int:
        fd, self.fd = self.fd, -1
        return fd

    def shutdown(self, _: int) -> None:
        self.endpoint.end_sending()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.life.close(fd)

    def descriptor_closed(self) -> None:
        self.closed = True
        if self.endpoint is not None:
            self.endpoint.close()


class Transport(asyncio.Transport):
    """Connects asyncio's streams to an endpoint."""

    def __init__(self, network: Network, sock: SimSocket, protocol: Any) -> None:
        super().__init__({"peername": (sock.endpoint.peer.life.host.name, 7440)})
        self._network = network
        self._sock = sock
        self._endpoint: Endpoint = sock.endpoint
        self._protocol = protocol
        self._closing = False
        self._paused = False
        self._reading: list[Any] | None = None  # what arrived while reading was paused
        protocol.connection_made(self)
        self._endpoint.on_room = self._room
        network.loop.call_soon(self._endpoint.attach, self._item, self._failed)

    def _item(self, item: Any) -> None:
        if self._closing:
            return
        if self._reading is not None:
            self._reading.append(item)
        elif item is END:
            self._protocol.eof_received()
        else:
            self._protocol.data_received(item)

    def _failed(self, error: OSError) -> None:
        self._lose(error)

    def _lose(self, error: OSError | None) -> None:
        if self._closing:
            return
        self._closing = True
        self._network.loop.call_soon(self._lost, error)

    def _lost(self, error: OSError | None) -> None:
        self._protocol.connection_lost(error)
        self._sock.close()

    def _room(self) -> None:
        if self._paused and self._endpoint.unacknowledged <= self._network.high_water:
            self._paused = False
            self._protocol.resume_writing()

    def write(self, data: Any) -> None:
        if self._closing:
            return
        try:
            self._endpoint.send(bytes(data))
        except OSError as error:
            self._lose(error)
            return
        if not self._paused and self._endpoint.unacknowledged > self._network.high_water:
            self._paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._endpoint.unacknowledged

    def pause_reading(self) -> None:
        if self._reading is None:
            self._reading = []

    def resume_reading(self) -> None:
        waiting, self._reading = self._reading or [], None
        for item in waiting:
            self._item(item)

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self._closing

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def close(self) -> None:
        self._lose(None)

    def abort(self) -> None:
        self._lose(None)


def life_ended(network: Network, life: Life) -> None:
    """Close everything that an exited process had open, as the kernel does."""
    for thing in list(life.fds.values()):
        with contextlib.suppress(OSError):
            if isinstance(thing, SimSocket):
                thing.descriptor_closed()
    life.fds.clear()


class SocketModule:
    """Replaces the ``socket`` module."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def socket(self, *_: Any, fileno: int | None = None) -> SimSocket:
        return SimSocket(self._network, fileno)

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)
