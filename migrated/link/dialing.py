"""Dial connections to a target agent, set their options, do the TLS handshake and send the preamble.

The source makes all connections of a session; the target only accepts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time

from migrated.address import Address
from migrated.errors import ConfigError, ConnectionLostError, MigratedError, TimeoutExceededError
from migrated.link import tls
from migrated.link.control_link import ControlLink, tune
from migrated.link.credentials import Credentials
from migrated.memory.channel import Channel
from migrated.memory.engine import URGENT
from migrated.protocol.heartbeat import Heartbeat
from migrated.protocol.preamble import Preamble, Purpose, encode, preface
from migrated.settings import Timeouts
from migrated.waiting import within


@dataclasses.dataclass(frozen=True, slots=True)
class DialTerms:
    """How an agent dials.  ``credentials``: None, without TLS; ``loopback_only``: it does not leave this host."""

    timeouts: Timeouts
    credentials: Credentials | None = None
    loopback_only: bool = False


class Dialer:
    """Make the connections of one session.  ``address`` may change between reconnects."""

    def __init__(self, address: Address, *, session_id: bytes, token: bytes, terms: DialTerms) -> None:
        self.address = address
        self._session_id = session_id
        self._token = token
        self._timeouts = terms.timeouts
        self._credentials = terms.credentials
        self._loopback_only = terms.loopback_only

    async def _connect(self, greeting: bytes) -> socket.socket:
        """Connect and send ``greeting``."""
        loop = asyncio.get_running_loop()
        limit = self._timeouts.connect
        where = f"{self.address}"
        hint = "is the target agent running there, and the port open? (`migrated status --agent …` on that host)"
        deadline = time.monotonic() + limit
        problem = "no address"
        try:
            async with asyncio.timeout(limit):
                candidates = await loop.getaddrinfo(
                    self.address.host, self.address.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
        except TimeoutError as error:
            raise TimeoutExceededError(f"looking up {where} took longer than {limit:g} s", hint=hint) from error
        except OSError as error:
            raise ConnectionLostError(f"{where}: {error.strerror}", code="target-unreachable", hint=hint) from error
        for family, kind, proto, _, address in candidates:
            if self._loopback_only and not Address(*address[:2]).is_loopback:
                raise ConfigError(
                    f"{where} is not dialled: {address[0]} is another host, and tls.insecure = true stays on this one",
                    code="tls-needed",
                    hint="give both agents certificates (`migrated certificates --help`), or, on a network that nobody "
                    "else can reach, set trusted_network = true",
                )
            sock = socket.socket(family, kind, proto)
            sock.setblocking(False)
            try:
                tune(sock, silence_seconds=self._timeouts.heartbeat_limit)
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    await loop.sock_connect(sock, address)
                    await loop.sock_sendall(sock, greeting)
            except TimeoutError:
                problem = f"no answer within {limit:g} s"
            except OSError as error:
                problem = error.strerror or str(error)
            except BaseException:
                sock.close()
                raise
            else:
                return sock
            sock.close()
        raise ConnectionLostError(f"{where} cannot be reached: {problem}", code="target-unreachable", hint=hint)

    async def _secure(self, preamble: Preamble, credentials: Credentials) -> tuple[Channel, object]:
        """Dial, do the handshake and send the preamble; return the channel and the peer's address."""
        sock = await self._connect(preface(preamble))
        try:
            peer = sock.getpeername()
            async with within(self._timeouts.handshake, "the TLS handshake", who=f"{self.address}"):
                channel = await tls.connect(sock, credentials, self.address.host)
                try:
                    await channel.send(encode(preamble))
                except BaseException:
                    channel.close()
                    raise
        except MigratedError as error:
            error.message = (
                f"{self.address}: {error.message}" if str(self.address) not in error.message else error.message
            )
            raise
        finally:
            sock.close()
        return channel, peer

    async def control(self) -> ControlLink:
        """Dial a control connection.  The link is not started yet."""
        preamble = Preamble(Purpose.CONTROL, self._session_id, self._token)
        if self._credentials is not None:
            channel, peer = await self._secure(preamble, self._credentials)
            reader, writer = tls.streams(channel, peer)
            return ControlLink(reader, writer, heartbeat=heartbeat(self._timeouts))
        sock = await self._connect(encode(preamble))
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        return ControlLink(reader, writer, heartbeat=heartbeat(self._timeouts))

    async def pages(self, bulk_count: int) -> list[tuple[int, socket.socket | Channel]]:
        """Dial ``bulk_count`` bulk connections and the urgent one; return them with their streams.  All or none."""
        dialled: list[tuple[int, socket.socket | Channel]] = []
        with contextlib.ExitStack() as undo:
            for stream in (*range(bulk_count), URGENT):
                connection = await self._page_connection(stream)
                undo.callback(connection.close)
                dialled.append((stream, connection))
            undo.pop_all()
        return dialled

    async def _page_connection(self, stream: int) -> socket.socket | Channel:
        purpose, number = (Purpose.URGENT, 0) if stream == URGENT else (Purpose.BULK, stream)
        preamble = Preamble(purpose, self._session_id, self._token, number)
        if self._credentials is None:
            return await self._connect(encode(preamble))
        channel, _ = await self._secure(preamble, self._credentials)
        return channel


def heartbeat(timeouts: Timeouts) -> Heartbeat:
    """Return a new heartbeat with the configured limits."""
    return Heartbeat(timeouts.heartbeat_interval, timeouts.heartbeat_limit, asyncio.get_running_loop().time())
