"""Serve the control API to other hosts: only over TLS 1.3, and only to clients whose certificates `control.peers` names.

Python's ssl does for a few commands.  The files are those of the server's role in ``[tls]``: a source agent, which is a
client on page connections, is a server here.
"""

from __future__ import annotations

import asyncio
import errno
import fnmatch
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import structlog

from migrated.address import Address
from migrated.admission import Admission, client_at
from migrated.errors import ConfigError, HostError
from migrated.http.access import Client, Right
from migrated.http.guard import FIRST_REQUEST_SECONDS, MAX_WAITING
from migrated.log import Sparing

if TYPE_CHECKING:
    from aiohttp import web

    from migrated.settings import TlsFiles

_BACKLOG: Final = 1024
_ACCEPT_AGAIN_SECONDS: Final = 0.1

log = structlog.get_logger("migrated.control")
strangers = Sparing(log)


class RemoteControl:
    """Create it, which raises ConfigError for files that cannot be used; `open` it, run `serve` as a task, `close` it."""

    def __init__(self, address: Address, files: TlsFiles, peers: Sequence[str]) -> None:
        """Let those give commands whose certificate has a name that matches one of ``peers``."""
        self.address = address  # after `open`, with the port that was free if it was 0
        self._files = files
        self._peers = [pattern.lower() for pattern in peers]
        self._stamp = self._look()
        self._context = self._load()
        self._handshakes: Admission[asyncio.Task[None]] = Admission(MAX_WAITING)
        self._socket: socket.socket | None = None

    # ------------------------------------------------------------ certificates

    def _look(self) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for file in self._files:
            try:
                status = file.stat()
            except OSError:
                found.append(())
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return found

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self._files.ca)
            context.load_cert_chain(self._files.cert, self._files.key)
        except OSError as error:  # SSLError is one
            message = f"control.listen: {self._files.ca}, {self._files.cert} or {self._files.key}: {error}"
            hint = "remote control needs a certificate for a server: `migrated certificates new` makes one"
            raise ConfigError(message, code="tls-files", hint=hint) from error
        return context

    def context(self) -> ssl.SSLContext:
        """Return what new connections use: the files as they are now, or the last ones that could be used."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._context = self._load()
            except ConfigError as error:
                log.warning("cannot use the changed certificate: the former one stays in use", error=error.message)
        return self._context

    # ------------------------------------------------------------ who asks

    @property
    def hint(self) -> str:
        """See `Judge`."""
        return "add a name of the certificate to control.peers of this agent's configuration, if it may do that"

    def client(self, request: web.Request) -> Client:
        """See `Judge`."""
        if request.transport is None:
            raise ConnectionResetError
        names = names_in(request.transport.get_extra_info("ssl_object").getpeercert())
        allowed = any(fnmatch.fnmatchcase(name.lower(), pattern) for name in names for pattern in self._peers)
        peer = request.transport.get_extra_info("peername")
        shown = ", ".join(names) or "nobody"
        fields: dict[str, int | str] = {"certificate": shown, "peer": str(Address(*peer[:2]))}
        return Client(f"the certificate of {shown}", Right.CONTROL if allowed else Right.NONE, fields)

    # ------------------------------------------------------------ the port

    async def open(self) -> None:
        """Bind and listen.  Raises HostError, ConfigError."""
        loop = asyncio.get_running_loop()
        listener: socket.socket | None = None
        try:
            found = await loop.getaddrinfo(*self.address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, proto, _, where = found[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except OSError as error:
            if listener is not None:
                listener.close()
            message = f"control.listen: cannot listen on {self.address}: {error.strerror}"
            if error.errno == errno.EADDRINUSE:
                raise HostError(message, code="address", hint="set control.listen to a free port") from error
            raise ConfigError(message, code="address", hint="allowed: an address of this host") from error
        listener.setblocking(False)
        self._socket = listener
        self.address = Address(*listener.getsockname()[:2])
        log.info("remote control", address=str(self.address), peers=self._peers)

    def close(self) -> None:
        """Stop listening.  Cancel `serve` first."""
        if self._socket is not None:
            self._socket.close()

    async def serve(self, factory: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections until cancelled.  ``factory`` makes the protocol of those whose certificate is good."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        def over(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            self._handshakes.leave(task)

        try:
            while True:
                try:
                    sock, peer = await loop.sock_accept(self._socket)
                except OSError as error:  # out of descriptors, or the peer is gone already
                    strangers.warning("accept failed", error=str(error))
                    await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                    continue
                task = asyncio.ensure_future(self._greet(sock, peer, factory))
                tasks.add(task)
                task.add_done_callback(over)
                if (dropped := self._handshakes.enter(client_at(peer[0]), task)) is not None:
                    dropped.cancel()
                await asyncio.sleep(0)
        finally:
            for task in tasks:
                task.cancel()

    async def _greet(self, sock: socket.socket, peer: Any, factory: Callable[[], asyncio.Protocol]) -> None:
        """Do the handshake."""
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                factory, sock, ssl=self.context(), ssl_handshake_timeout=FIRST_REQUEST_SECONDS
            )
        except OSError as error:  # SSLError and ConnectionError among them
            strangers.warning("remote control refused", peer=str(Address(*peer[:2])), error=str(error))


def names_in(certificate: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the host names and addresses that a certificate is for; its common name if it has none."""
    if not certificate:
        return ()
    names = tuple(value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))
    common = tuple(value for part in certificate.get("subject", ()) for key, value in part if key == "commonName")
    return names or common
