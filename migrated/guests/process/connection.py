"""The agent's end of a guest's connection: the socket where guests connect, and requests to a connected guest.

The guest is a program that co-operates through `migrated.guests.process.client` or native/include/migrated_guest.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

import structlog

from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests.process.wire import (
    HEADER,
    MAX_REGIONS,
    VERSION,
    Header,
    Hello,
    Kind,
    WireError,
    decode_addresses,
    encode_memory,
    message,
)
from migrated.memory.native import uffd_api

#: Wait this long after accepting has failed.
ACCEPT_AGAIN_SECONDS = 0.1
_RECEIVE_BYTES = 256 << 10
_PEER = struct.Struct("3i")

_log = structlog.get_logger(__name__)


def require_version(guest: str, hello: Hello) -> None:
    """Raise GuestRefusedError ``guest-client-version`` if the guest's client speaks another version than ours."""
    if hello.version != VERSION:
        raise GuestRefusedError(
            f"guest {guest} speaks version {hello.version} of the guest protocol, this agent {VERSION}",
            code="guest-client-version",
            hint="build the guest with this version's client",
        )


def listen(path: str) -> socket.socket:
    """Listen for guests on a Unix socket, replacing a dead one.  Raises GuestError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _remove_dead_socket(path)
        os.fchmod(sock.fileno(), 0o600)  # before bind: the directory may be the guest's user's
        sock.bind(path)
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise GuestError(f"cannot listen on {path}: {error.strerror}", code="guest-socket") from error
    except GuestError:
        sock.close()
        raise
    return sock


def _remove_dead_socket(path: str) -> None:
    """Remove a socket that nobody listens on, and leave any other kind of file alone.  Raises GuestError, OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise GuestError(
                f"cannot listen on {path}: it exists and is not a socket",
                code="guest-socket",
                hint="remove it, or give this guest another path in the configuration",
            )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            Path(path).unlink(missing_ok=True)
            return
        except BlockingIOError:  # its backlog is full
            pass
    raise GuestError(f"{path}: another agent listens there", code="socket-in-use")


async def accept(listener: socket.socket, name: str) -> socket.socket:
    """Wait for the next connection to guest ``name``'s socket, however often accepting fails meanwhile."""
    while True:
        try:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:  # out of descriptors, or the guest has already gone
            _log.warning("accept failed", guest=name, error=str(error))
            await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
        else:
            return sock


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that a guest sent."""
    for fd in fds:
        os.close(fd)


class GuestConnection:
    """The agent's end of a guest's connection.

    Call `hello` once, then `request` as often as needed, and `close` at the end.  When the connection breaks or closes,
    every waiting call fails with GuestError ``guest-connection-lost``.
    """

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self.pid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._sequence = 0
        self._sending = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[tuple[bytes, tuple[int, ...]]]] = {}
        self._loop = asyncio.get_running_loop()
        self._waiting[0] = self._loop.create_future()  # the HELLO
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def alive(self) -> bool:
        """Whether the guest can still be asked."""
        return not self.closed.done()

    @property
    def hung_up(self) -> bool:
        """Whether the guest has closed its end; what it sent before may still be unread."""
        if not self.alive:
            return True
        poll = select.poll()
        poll.register(self._sock, 0)  # poll always reports a hang-up
        return bool(poll.poll(0))

    async def hello(self, limit_seconds: float) -> tuple[Hello, tuple[int, ...]]:
        """Return the guest's first message and its descriptors, which the caller then owns."""
        payload, fds = await self._answer(0, limit_seconds, "its HELLO")
        try:
            return Hello.decode(payload), fds
        except WireError as error:
            close_all(fds)
            raise GuestError(f"guest {self.name}: {error}", code="guest-protocol") from None

    async def map_memory(
        self, page_bytes: tuple[int, ...], fds: tuple[int, ...] = (), *, incoming: bool, limit_seconds: float
    ) -> tuple[int, ...]:
        """Have the guest map these files, one for each region, or go on with those it has; return the addresses."""
        memory = encode_memory(page_bytes, incoming=incoming)
        reply = await self.request(
            Kind.MEMORY, memory, fds=fds, limit_seconds=limit_seconds, what="it to map its memory"
        )
        try:
            return decode_addresses(reply, len(page_bytes))
        except WireError as error:
            raise GuestError(f"guest {self.name}: {error}", code="guest-protocol") from None

    async def userfaultfd(self, *, faults: bool, limit_seconds: float) -> int:
        """Return a userfaultfd of the guest, which reports ``faults`` or else tracks writes.  The caller owns it."""
        payload = int(faults).to_bytes(4, "little")
        _, fds = await self._ask(Kind.UFFD, payload, (), limit_seconds, "its userfaultfd")
        try:
            if len(fds) != 1:
                raise GuestError(f"guest {self.name} sent {len(fds)} userfaultfds", code="guest-protocol")
            uffd_api(fds[0], faults=faults, tracking=not faults)
        except MigratedError:
            close_all(fds)
            with contextlib.suppress(GuestError, TimeoutExceededError):
                await self.request(Kind.FORGET, limit_seconds=limit_seconds, what="it to close its userfaultfd")
            raise
        return fds[0]

    async def request(
        self, kind: Kind, payload: bytes = b"", *, fds: tuple[int, ...] = (), limit_seconds: float, what: str
    ) -> bytes:
        """Send a request and return the reply's payload.  ``what`` names the request in errors."""
        reply, surplus = await self._ask(kind, payload, fds, limit_seconds, what)
        close_all(surplus)
        return reply

    async def _ask(
        self, kind: Kind, payload: bytes, fds: tuple[int, ...], limit_seconds: float, what: str
    ) -> tuple[bytes, tuple[int, ...]]:
        self._sequence += 1
        sequence = self._sequence
        self._waiting[sequence] = self._loop.create_future()
        try:
            async with asyncio.timeout(limit_seconds):
                await self.send(kind, payload, fds=fds, sequence=sequence)
        except BaseException as error:
            self._waiting.pop(sequence).cancel()
            if isinstance(error, TimeoutError):
                raise TimeoutExceededError(f"guest {self.name}: waited {limit_seconds:g} s for {what}") from None
            raise
        return await self._answer(sequence, limit_seconds, what)

    async def send(self, kind: Kind, payload: bytes = b"", *, fds: tuple[int, ...] = (), sequence: int = 0) -> None:
        """Send a message that needs no answer."""
        data = message(kind, payload, sequence=sequence, descriptors=len(fds))
        async with self._sending:
            if not self.alive:
                raise self._lost()
            try:
                sent = socket.send_fds(self._sock, [data[: HEADER.size]], list(fds))
                await self._loop.sock_sendall(self._sock, data[sent:])
            except OSError as error:
                self._lose(error.strerror or str(error))
                raise self._lost() from error
            except asyncio.CancelledError:
                self._lose("it does not read")  # half a message may have been sent
                raise

    async def _answer(self, sequence: int, limit_seconds: float, what: str) -> tuple[bytes, tuple[int, ...]]:
        answer = self._waiting[sequence]
        if not self.alive and not answer.done():
            raise self._lost()
        try:
            async with asyncio.timeout(limit_seconds):
                try:
                    return await answer
                except asyncio.CancelledError:
                    if answer.done() and not answer.cancelled() and answer.exception() is None:
                        close_all(answer.result()[1])  # it came at the same time, and nobody takes it any more
                    raise
        except TimeoutError:
            raise TimeoutExceededError(
                f"guest {self.name} (process {self.pid}): waited {limit_seconds:g} s for {what}",
                hint="does every worker of the guest come to a safe point?",
            ) from None
        finally:
            self._waiting.pop(sequence, None)

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _RECEIVE_BYTES, MAX_REGIONS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        self._fds += fds
        if not data:
            self._lose("it closed the connection")
            return
        self._buffer += data
        try:
            self._dispatch()
        except WireError as error:
            self._lose(f"it sent {error}")

    def _dispatch(self) -> None:
        while len(self._buffer) >= HEADER.size:
            header = Header.parse(bytes(self._buffer[: HEADER.size]))
            end = HEADER.size + header.payload_bytes
            if len(self._buffer) < end:
                self._refuse_descriptors_beyond(header.descriptors)
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            if len(self._fds) < header.descriptors:
                raise WireError("fewer descriptors than it said")
            fds = tuple(self._fds[: header.descriptors])
            del self._fds[: header.descriptors]
            answer = self._waiting.get(header.sequence)
            if answer is None or answer.done() or (header.kind is Kind.HELLO) != (header.sequence == 0):
                close_all(fds)  # nobody waits for it any more
            elif header.kind is Kind.FAIL:
                close_all(fds)
                text = payload.decode(errors="replace")[:500]
                answer.set_exception(GuestError(f"guest {self.name} says: {text}"))
            elif header.kind in (Kind.REPLY, Kind.HELLO):
                answer.set_result((payload, fds))
            else:
                close_all(fds)
                raise WireError(f"a {header.kind.name}, which only an agent may send")
        # Descriptors come with the first byte of their message: without a byte there is no message they could belong
        # to.
        self._refuse_descriptors_beyond(MAX_REGIONS if self._buffer else 0)

    def _refuse_descriptors_beyond(self, announced: int) -> None:
        """Raise WireError if there are more: a guest must not fill the agent's descriptor table."""
        if len(self._fds) > announced:
            raise WireError(f"{len(self._fds)} descriptors where its message announces {announced}")

    def _lost(self) -> GuestError:
        why = self.closed.result() if self.closed.done() else "closed"
        return GuestError(
            f"guest {self.name}: the connection to process {self.pid} is lost: {why}", code="guest-connection-lost"
        )

    def _lose(self, why: str) -> None:
        if self.closed.done():
            return
        self.closed.set_result(why)
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        while self._fds:
            os.close(self._fds.pop())
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._lost())
                answer.exception()  # nobody may be waiting yet: avoid asyncio's complaint about that

    def close(self) -> None:
        """Close the connection; the guest sees it end.  Idempotent."""
        self._lose("closed")
