"""Bound what the clients of a site can hold: connections that ask nothing, and the time for which they ask nothing.

aiohttp bounds a request (the length of its lines and of its body) and no more.  `Guard` stands between the listening
socket and aiohttp.  While a connection waits for a request, or for its client to read the answer, it counts against the
site's limit and its time runs.  While its request is handled, neither holds.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from migrated.admission import Admission, client_at

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from aiohttp.typedefs import Handler

#: Connections of a site that wait for a request.
MAX_WAITING: Final = 128
#: How long a new connection may take for its first request …
FIRST_REQUEST_SECONDS: Final = 10.0
#: … and an old one for its next, or for reading the answer to the last.  Prometheus asks once in 15 to 60 s.
NEXT_REQUEST_SECONDS: Final = 90.0

#: aiohttp's own log, without what clients get wrong: each malformed or broken-off request would leave a traceback, and so
#: would each that aiohttp cannot quote in its answer (bytes that are no text, in Expect).
http_log: Final = logging.getLogger("migrated.http.server")
_OF_CLIENTS: Final = (HttpProcessingError, ConnectionError, UnicodeEncodeError)
http_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], _OF_CLIENTS)))


class Guard:
    """A site's connections.  Insert `busy` as the first middleware of its application, and listen with `protocol`."""

    def __init__(self, client_of: Callable[[asyncio.Transport], Hashable]) -> None:
        """Count connections by what ``client_of`` returns for them."""
        self.client_of = client_of
        self.waiting: Admission[_Connection] = Admission(MAX_WAITING)
        self._connections: dict[asyncio.BaseProtocol, _Connection] = {}

    def protocol(self, server: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """Return the protocol factory to listen with, around that of aiohttp."""

        def connect() -> asyncio.Protocol:
            inner = server()
            connection = _Connection(self, inner)
            self._connections[inner] = connection
            return connection

        return connect

    def forget(self, inner: asyncio.Protocol) -> None:
        """Release a connection that has ended."""
        self._connections.pop(inner, None)

    @web.middleware
    async def busy(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Stop a connection's time while its request is handled."""
        connection = self._connections.get(request.protocol)
        if connection is None:  # it ended before its request came to be handled
            raise ConnectionResetError
        connection.work()
        try:
            return await handler(request)
        finally:
            connection.wait(NEXT_REQUEST_SECONDS)


class _Connection(asyncio.Protocol):
    """Passes everything on to aiohttp's protocol."""

    def __init__(self, guard: Guard, inner: asyncio.Protocol) -> None:
        self._guard = guard
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._client: Hashable = None
        self._timer: asyncio.TimerHandle | None = None

    def work(self) -> None:
        """A request is being handled."""
        self._guard.waiting.leave(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wait(self, seconds: float) -> None:
        """The client is to ask, or to read: for so long."""
        self.work()
        if self._transport is None:
            return
        self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)
        if (dropped := self._guard.waiting.enter(self._client, self)) is not None:
            dropped.drop()

    def drop(self) -> None:
        """End the connection, whatever it still has to send."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._client = self._guard.client_of(self._transport)
        self._inner.connection_made(transport)
        self.wait(FIRST_REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self.work()
        self._transport = None
        self._guard.forget(self._inner)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def address_of(transport: asyncio.Transport) -> Hashable:
    """Return what to count a TCP connection under."""
    peer = transport.get_extra_info("peername")
    return client_at(peer[0]) if peer else ""
