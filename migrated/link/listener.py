"""The target's port: accept connections and read from each what it is for, before the agent sees it.

Whoever can reach the port can connect.  Until a connection has named a session and shown its token, it costs one task
and one descriptor for at most timeouts.handshake, and its failure ends nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import Final, Protocol

import structlog

from migrated.address import Address
from migrated.admission import Admission, client_at
from migrated.errors import ConfigError, HostError, MigratedError, RemoteProtocolError, TlsError
from migrated.link import tls
from migrated.link.control_link import ControlLink, tune
from migrated.link.credentials import Credentials
from migrated.link.dialing import heartbeat
from migrated.log import Sparing
from migrated.memory.channel import Channel
from migrated.memory.engine import URGENT
from migrated.protocol.framing import FrameDecoder
from migrated.protocol.messages import VERSION_MISMATCH, AnyMessage, Hello, Inquire, Resume
from migrated.protocol.preamble import (
    PREAMBLE_BYTES,
    PREFACE_BYTES,
    Preamble,
    Purpose,
    decode,
    goes_on_in_tls,
    refusal,
)
from migrated.settings import Timeouts
from migrated.waiting import within

log = structlog.get_logger("migrated.target")
#: For what anybody who reaches the port can cause.
strangers = Sparing(log)

FIRST_MESSAGE_MAX_BYTES: Final = 1 << 17
#: After a refusal, how long to wait for the peer to read it and close.  Closing first could take the refusal away.
REFUSED_SECONDS: Final = 1.0
#: Refusals that the peer is told, so that its operator reads them there.
ANSWERED_CODES: Final = frozenset({VERSION_MISMATCH, "tls-required", "tls-not-offered", "tls-peer-refused"})
#: A burst of strangers must not use up the kernel's queue: a source that then dials would try again only after 1 s.
_BACKLOG: Final = 4096
_ACCEPT_AGAIN_SECONDS: Final = 0.1


class KnownSession(Protocol):
    """A session whose connections this agent takes."""

    async def dialled(self, link: ControlLink) -> None:
        """Take a further control link, which is not started, and own it."""

    async def add_stream(self, stream: int, connection: int | Channel) -> None:
        """Take a page connection, and own its descriptor or channel."""


class Receiver(Protocol):
    """Who takes the connections that have said what they are."""

    def find(self, preamble: Preamble) -> KnownSession | None:
        """Return the session of a connection, None if there is none.  Raises RemoteProtocolError on a wrong token."""

    async def begin(self, link: ControlLink, first: Hello | Resume | Inquire) -> None:
        """Take the first control link of a session, which is not started, and own it."""


class Listener:
    """`open` it, run `serve` as a task, and `close` it at the end."""

    def __init__(
        self,
        address: Address,
        receiver: Receiver,
        *,
        timeouts: Timeouts,
        max_connections: int,
        setting: str,
        credentials: Credentials | None,
    ) -> None:
        """Listen on ``address``, which ``setting`` gives (for the error message), with TLS if there are credentials."""
        self.address = address  # after `open`, with the port that was free if it was 0
        self.connections: set[asyncio.Task[None]] = set()  # those that the receiver has not taken or answered
        self._receiver = receiver
        self._timeouts = timeouts
        self._unknown: Admission[asyncio.Task[None]] = Admission(max_connections)
        self._setting = setting
        self._credentials = credentials
        self._socket: socket.socket | None = None

    # ------------------------------------------------------------ the port

    async def open(self) -> None:
        """Bind and listen.  Raises HostError if another attempt may succeed, else ConfigError."""
        loop = asyncio.get_running_loop()
        listener: socket.socket | None = None
        try:
            candidates = await loop.getaddrinfo(
                self.address.host, self.address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, kind, proto, _, where = candidates[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except OSError as error:
            if listener is not None:
                listener.close()
            message = f"cannot listen on {self.address}: {error.strerror}"
            if error.errno in {errno.EADDRINUSE, socket.EAI_AGAIN}:  # temporary: the service manager restarts us
                hint = "another process (perhaps another target agent) has the port, or no name server answers"
                raise HostError(message, code="cannot-listen", hint=hint) from error
            hint = "allowed: an address of this host, and a port that this user may listen on"
            raise ConfigError(f"{self._setting}: {message}", code="cannot-listen", hint=hint) from error
        listener.setblocking(False)
        self._socket = listener
        self.address = Address(*listener.getsockname()[:2])
        log.info("listening", address=str(self.address), tls=self._credentials is not None)

    def close(self) -> None:
        """Stop listening, and drop the connections that nobody has taken.  Cancel `serve` first."""
        if self._socket is not None:
            self._socket.close()
        for task in list(self.connections):
            task.cancel()

    async def serve(self) -> None:
        """Accept connections until cancelled."""
        if self._socket is None:
            raise MigratedError("serve before open: this is a bug")
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._socket)
            except OSError as error:  # out of descriptors, or the peer is gone already
                strangers.warning("accept failed", error=str(error))
                await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                continue
            task = asyncio.ensure_future(self._greet(sock, str(Address(*peer[:2]))))
            self.connections.add(task)
            task.add_done_callback(self._forget)
            if (dropped := self._unknown.enter(client_at(peer[0]), task)) is not None:
                strangers.warning("too many connections", peer=str(Address(*peer[:2])))
                dropped.cancel()
            await asyncio.sleep(0)  # between any two connections, the migrations have their turn

    def _forget(self, task: asyncio.Task[None]) -> None:
        self.connections.discard(task)
        self._unknown.leave(task)

    def _is_known(self) -> None:
        """Count this task's connection no more: it has shown the token of a session."""
        if (task := asyncio.current_task()) is not None:
            self._unknown.leave(task)

    # ------------------------------------------------------------ a new connection

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        """Serve a new connection.  Whatever a stranger does here ends at most its own connection."""
        incoming = _Incoming(sock)
        preamble: Preamble | None = None
        try:
            sock.setblocking(False)
            tune(sock, silence_seconds=self._timeouts.heartbeat_limit)
            async with within(self._timeouts.handshake, "a connection to say what it is"):
                preamble = await incoming.identify(self._credentials)
            if preamble is None:
                return
            if self._credentials is not None:
                self._credentials.check_peer(incoming.names)
            if preamble.purpose is Purpose.CONTROL:
                await self._control(incoming, preamble, peer)
            else:
                await self._page_connection(incoming, preamble)
        except (MigratedError, OSError) as error:
            strangers.warning("connection refused", peer=peer, error=str(error))
            for_people = preamble is None or preamble.purpose is Purpose.CONTROL
            if isinstance(error, RemoteProtocolError) and error.code in ANSWERED_CODES and for_people:
                await incoming.refuse(error)
            elif isinstance(error, TlsError):
                await incoming.linger()
        except Exception:
            log.exception("connection failed: this is a bug", peer=peer)
        finally:
            incoming.close()

    async def _page_connection(self, incoming: _Incoming, preamble: Preamble) -> None:
        known = self._receiver.find(preamble)
        if known is None:
            raise RemoteProtocolError("a page connection for a session that is not known here")
        self._is_known()
        stream = URGENT if preamble.purpose is Purpose.URGENT else preamble.stream
        await known.add_stream(stream, incoming.detach())

    async def _control(self, incoming: _Incoming, preamble: Preamble, peer: str) -> None:
        known = self._receiver.find(preamble)  # raises on a wrong token while our caller still owns the connection
        if incoming.names:
            log.info("peer known by its certificate", peer=peer, names=incoming.names)
        reader, writer = await incoming.streams()
        if known is not None:
            self._is_known()
            await known.dialled(ControlLink(reader, writer, heartbeat=heartbeat(self._timeouts)))
            return
        try:
            async with within(self._timeouts.handshake, "the first message"):
                first, data = await _first_message(reader)
            if not isinstance(first, Hello | Resume | Inquire):
                raise RemoteProtocolError(f"a control connection began with {type(first).__name__}")
            if first.session != preamble.session or first.token != preamble.token:
                raise RemoteProtocolError("session or token differ between the preamble and the first message")
        except BaseException:
            writer.transport.abort()
            raise
        link = ControlLink(reader, writer, heartbeat=heartbeat(self._timeouts), received=data)
        await self._receiver.begin(link, first)


class _Incoming:
    """An accepted connection: a socket, and once TLS is in use the channel that has its descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        self.names: tuple[str, ...] = ()  # in the peer's certificate
        self._sock = sock
        self._channel: Channel | None = None

    async def identify(self, credentials: Credentials | None) -> Preamble | None:
        """Do the TLS handshake and read the preamble.  None: a port check, which connects and closes at once."""
        first = await self._receive(PREFACE_BYTES)
        if not first:
            return None
        if not goes_on_in_tls(first):
            if credentials is not None:
                raise RemoteProtocolError(
                    "this target agent accepts connections with TLS only",
                    code="tls-required",
                    hint="give the source agent a certificate: docs/configuration.md, [tls]",
                )
            return decode(first + await self._receive(PREAMBLE_BYTES - PREFACE_BYTES))
        if credentials is None:
            raise RemoteProtocolError(
                "this target agent has tls.insecure = true, and takes connections without TLS only",
                code="tls-not-offered",
                hint="give the target agent a certificate: docs/configuration.md, [tls]",
            )
        self._channel = Channel.tls(self._sock.fileno(), credentials.current())
        await self._channel.handshake()
        self.names = self._channel.peer_names()
        return decode(await self._channel.receive(PREAMBLE_BYTES), preface=first)

    async def _receive(self, size_bytes: int) -> bytes:
        """Receive so many bytes without TLS, or fewer if the peer closes."""
        data = b""
        while len(data) < size_bytes:
            piece = await asyncio.get_running_loop().sock_recv(self._sock, size_bytes - len(data))
            if not piece:
                break
            data += piece
        return data

    async def linger(self) -> None:
        """Let the peer read TLS's alert: closing before all that it has sent was read would take the alert away."""
        with contextlib.suppress(OSError, TimeoutError):
            self._sock.setblocking(False)  # it was the channel's
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(REFUSED_SECONDS):
                await self._receive(FIRST_MESSAGE_MAX_BYTES)

    async def refuse(self, error: RemoteProtocolError) -> None:
        """Tell the peer why we close the connection."""
        with contextlib.suppress(MigratedError, OSError, TimeoutError):
            async with asyncio.timeout(REFUSED_SECONDS):
                if self._channel is not None:
                    await self._channel.send(refusal(error))
                    self._sock.shutdown(socket.SHUT_WR)
                    await self._channel.receive(FIRST_MESSAGE_MAX_BYTES)
                else:
                    await asyncio.get_running_loop().sock_sendall(self._sock, refusal(error))
                    self._sock.shutdown(socket.SHUT_WR)
                    await self._receive(FIRST_MESSAGE_MAX_BYTES)

    async def streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return asyncio's streams, which own the connection from then on."""
        if self._channel is None:
            return await asyncio.open_connection(sock=socket.socket(fileno=self._sock.detach()))
        peer = self._sock.getpeername()
        channel = self.detach()
        assert isinstance(channel, Channel)
        return tls.streams(channel, peer)

    def detach(self) -> int | Channel:
        """Return the descriptor or channel, which the caller owns from then on."""
        channel, self._channel = self._channel, None
        fd = self._sock.detach()
        return fd if channel is None else channel

    def close(self) -> None:
        """Close the connection, unless somebody owns it."""
        if self._channel is not None:
            self._sock.detach()
            self._channel.close()
        else:
            self._sock.close()


async def _first_message(reader: asyncio.StreamReader) -> tuple[AnyMessage, bytes]:
    """Return the first message and every byte read so far, for the session that the message selects."""
    decoder = FrameDecoder()
    data = b""
    while True:
        piece = await reader.read(1 << 16)
        if not piece:
            raise RemoteProtocolError("the connection was closed before its first message")
        data += piece
        if len(data) > FIRST_MESSAGE_MAX_BYTES:
            raise RemoteProtocolError(f"the first message is longer than {FIRST_MESSAGE_MAX_BYTES} bytes")
        for message in decoder.feed(piece):
            return message, data
