"""Dial connections to a target agent, set their options and send the preamble.

The source makes all connections of a session; the target only accepts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

from migrated.address import Address
from migrated.errors import ConnectionLostError, TimeoutExceededError
from migrated.link.control_link import ControlLink, tune
from migrated.protocol.heartbeat import Heartbeat
from migrated.protocol.preamble import Preamble, Purpose, encode
from migrated.settings import Timeouts


class Dialer:
    """Make the connections of one session.  ``address`` may change between reconnects."""

    def __init__(self, address: Address, *, session_id: bytes, token: bytes, timeouts: Timeouts) -> None:
        self.address = address
        self._session_id = session_id
        self._token = token
        self._timeouts = timeouts

    async def _connect(self, preamble: Preamble) -> socket.socket:
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
            sock = socket.socket(family, kind, proto)
            sock.setblocking(False)
            try:
                tune(sock, silence_seconds=self._timeouts.heartbeat_limit)
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    await loop.sock_connect(sock, address)
                    await loop.sock_sendall(sock, encode(preamble))
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

    async def control(self) -> ControlLink:
        """Dial a control connection.  The link is not started yet."""
        sock = await self._connect(Preamble(Purpose.CONTROL, self._session_id, self._token))
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        return ControlLink(reader, writer, heartbeat=heartbeat(self._timeouts))

    async def pages(self, bulk_count: int) -> tuple[list[int], int]:
        """Dial ``bulk_count`` bulk connections and the urgent one; return their descriptors.  All or none."""
        sockets: list[socket.socket] = []
        with contextlib.ExitStack() as undo:
            for stream in range(bulk_count):
                sock = await self._connect(Preamble(Purpose.BULK, self._session_id, self._token, stream))
                sockets.append(undo.enter_context(sock))
            sockets.append(
                undo.enter_context(await self._connect(Preamble(Purpose.URGENT, self._session_id, self._token)))
            )
            undo.pop_all()
        *bulk, urgent = [sock.detach() for sock in sockets]
        return bulk, urgent


def heartbeat(timeouts: Timeouts) -> Heartbeat:
    """Return a new heartbeat with the configured limits."""
    return Heartbeat(timeouts.heartbeat_interval, timeouts.heartbeat_limit, asyncio.get_running_loop().time())
