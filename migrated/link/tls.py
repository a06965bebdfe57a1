"""TLS on the connections between agents: handshakes, and asyncio's streams on a channel of the C core.

Control and page connections use the same TLS, the C core's.  asyncio's own would not do: it closes a connection that it
refuses without telling the peer why.

The target answers a connection of the wrong kind without TLS, with an Abort frame, in which the peer reads why.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, Final

from migrated.errors import ConnectionLostError, MigratedError, PeerError, RemoteProtocolError, TlsError
from migrated.link.credentials import Credentials
from migrated.memory.channel import Channel
from migrated.protocol.framing import FrameDecoder
from migrated.protocol.messages import Abort

_READ_BYTES: Final = 1 << 14  # a TLS record
#: A writer waits while more than this is unsent, until it is a quarter.
_HIGH_WATER_BYTES: Final = 1 << 16
#: First bytes of TLS records: alert, handshake, and those between and around them.  A frame begins with 0 or 1.
_RECORD_TYPES: Final = range(20, 25)
_PLAIN_ANSWER_BYTES: Final = 1 << 16
_PLAIN_ANSWER_SECONDS: Final = 1.0


async def connect(sock: socket.socket, credentials: Credentials, host: str) -> Channel:
    """Do the source's part of a handshake with ``host``.  Takes the socket.

    Raises TlsError, RemoteProtocolError ``tls-peer-refused``, and PeerError if the target answers without TLS.
    """
    name = host.partition("%")[0].rstrip(".")  # no certificate has the zone of an address, or the root's dot
    with contextlib.ExitStack() as undo:
        undo.callback(sock.detach)  # the channel has the descriptor
        channel = Channel.tls(sock.fileno(), credentials.current(), name)
        undo.callback(channel.close)
        try:
            await channel.handshake(before_reading=lambda: _check_speaks_tls(sock))
        except _PlainAnswerError as plain:
            raise await _plain_answer(sock) from plain
        credentials.check_peer(channel.peer_names())
        undo.pop_all()
    sock.detach()
    return channel


class _PlainAnswerError(Exception):
    """The target has answered without TLS."""


def _check_speaks_tls(sock: socket.socket) -> None:
    try:
        first = sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return  # nothing has arrived, or the handshake finds out
    if first and first[0] not in _RECORD_TYPES:
        raise _PlainAnswerError


async def _plain_answer(sock: socket.socket) -> MigratedError:
    """Read the target's Abort.  Nothing of it is proven: it only says why there is no connection."""
    decoder, size_bytes = FrameDecoder(), 0
    sock.setblocking(False)  # it was the channel's
    try:
        async with asyncio.timeout(_PLAIN_ANSWER_SECONDS):
            while size_bytes < _PLAIN_ANSWER_BYTES:
                data = await asyncio.get_running_loop().sock_recv(sock, _PLAIN_ANSWER_BYTES)
                size_bytes += len(data)
                for message in decoder.feed(data):
                    if isinstance(message, Abort):
                        return PeerError(message.message, code=message.code, hint=message.hint)
                if not data:
                    break
    except (OSError, TimeoutError, RemoteProtocolError):
        pass  # something else than a target agent
    return RemoteProtocolError(
        "it answers without TLS", code="not-migrated", hint="is that the port of a target agent of the same version?"
    )


# ---------------------------------------------------------------- asyncio's streams


def streams(channel: Channel, peer: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return streams on a channel, which they own; ``peer``: its address, as a socket has it."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = _Transport(loop, channel, protocol, peer)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class _Transport(asyncio.Transport):
    """A channel as asyncio's transport."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, channel: Channel, protocol: asyncio.StreamReaderProtocol, peer: Any
    ) -> None:
        self._extra: dict[str, object] = {"peername": peer}  # "refusal": the TlsError that ended the connection
        super().__init__(self._extra)
        self._loop = loop
        self._channel = channel
        self._fd = channel.fileno()
        self._protocol = protocol
        self._unsent = bytearray()
        self._writing = False  # waits for the socket to take more
        self._protocol_paused = False
        self._reading = True
        self._closing = False
        self._lost = False
        protocol.connection_made(self)
        loop.add_reader(self._fd, self._read)
        loop.call_soon(self._read)  # what the channel has read already

    # ------------------------------------------------------------ reading

    def _read(self) -> None:
        while self._reading and not self._closing:
            try:
                data, _ = self._channel.try_receive(_READ_BYTES)
            except ConnectionLostError:
                self._end_reading()
                self._protocol.eof_received()
                return
            except MigratedError as error:
                self._fail(error)
                return
            if not data:
                self._write()  # OpenSSL answers some messages while it reads
                return
            self._protocol.data_received(data)  # may pause us

    def _end_reading(self) -> None:
        self._reading = False
        if not self._lost:
            self._loop.remove_reader(self._fd)

    def pause_reading(self) -> None:
        self._end_reading()

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._read)
            self._loop.call_soon(self._read)

    def is_reading(self) -> bool:
        return self._reading

    # ------------------------------------------------------------ writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self._unsent += data
            self._write()

    def _write(self) -> None:
        if self._lost:
            return
        try:
            taken, wants = self._channel.try_send(self._unsent)
        except MigratedError as error:
            self._fail(error)
            return
        del self._unsent[:taken]
        if bool(wants) != self._writing:
            self._writing = bool(wants)
            if wants:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)
        self._tell_writer()
        if self._closing and not self._writing:
            self._lose(None)

    def _tell_writer(self) -> None:
        unsent = len(self._unsent)
        if not self._protocol_paused and unsent > _HIGH_WATER_BYTES:
            self._protocol_paused = True
            self._protocol.pause_writing()
        elif self._protocol_paused and unsent <= _HIGH_WATER_BYTES // 4:
            self._protocol_paused = False
            self._protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def can_write_eof(self) -> bool:
        return False

    # ------------------------------------------------------------ the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Send what is left, then close."""
        if not self._closing:
            self._closing = True
            self._end_reading()
            if not self._writing:
                self._lose(None)

    def abort(self) -> None:
        """Close at once."""
        self._lose(None)

    def _fail(self, error: MigratedError) -> None:
        if not self._lost and isinstance(error, TlsError):
            self._extra["refusal"] = error
        self._lose(ConnectionResetError(error.message))  # as streams know errors

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._closing = self._lost = True
        self._reading = False
        self._unsent.clear()
        self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._channel.close()
