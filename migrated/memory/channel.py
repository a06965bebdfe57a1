"""Page connections as Python sees them until an engine takes them; see "page connections" in mgd_api.h.

Python makes the connection and sends or receives what precedes the first frame; then the C core has it alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from migrated.errors import MigratedError
from migrated.memory.native import call, ffi, lib

#: More than the names of any certificate that TLS carries.
_NAMES_BYTES = 1 << 16


class Tls:
    """The certificate, key and CA of one side, from PEM files.

    Connections keep what they need: to reload, make a new one and drop this one.  TlsError names an unusable file.
    """

    def __init__(self, *, server: bool, ca: Path, certificate: Path, key: Path) -> None:
        out = ffi.new("struct mgd_tls **")
        call(lib.mgd_tls_create, int(server), os.fsencode(ca), os.fsencode(certificate), os.fsencode(key), out)
        self.handle = ffi.gc(out[0], lib.mgd_tls_destroy)

    def validity(self) -> tuple[int, int]:
        """Return from when until when the certificate is valid, in seconds since 1970."""
        since, until = ffi.new("int64_t *"), ffi.new("int64_t *")
        lib.mgd_tls_validity(self.handle, since, until)
        return int(since[0]), int(until[0])


class Channel:
    """One page connection, plain or TLS, in the event loop.  `close` it, or give it to an engine, which then owns it."""

    def __init__(self, handle: Any) -> None:
        self._handle: Any | None = handle

    @classmethod
    def plain(cls, fd: int) -> Self:
        """Take a connected socket, even if this fails."""
        out = ffi.new("struct mgd_channel **")
        call(lib.mgd_channel_create, fd, out)
        return cls(out[0])

    @classmethod
    def tls(cls, fd: int, tls: Tls, server_name: str | None = None) -> Self:
        """Take a connected socket, even if this fails; `handshake` must follow.

        ``server_name``: the host name or address that the server's certificate must be for; None on its own side.
        """
        out = ffi.new("struct mgd_channel **")
        name = ffi.NULL if server_name is None else server_name.encode()
        call(lib.mgd_channel_create_tls, fd, tls.handle, name, out)
        return cls(out[0])

    @property
    def handle(self) -> Any:
        """The C object.  Raises an error once it is closed or taken."""
        if self._handle is None:
            raise MigratedError("the page connection is already closed, or an engine has it")
        return self._handle

    def take(self) -> Any:
        """Return the C object for good: whoever takes it owns it."""
        handle, self._handle = self.handle, None
        return handle

    def close(self) -> None:
        """Close the connection unless somebody took it.  Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.mgd_channel_destroy(handle)

    async def handshake(self, *, before_reading: Callable[[], None] | None = None) -> None:
        """Prove to each other who we are.  TlsError says who refuses whom, and why.

        The client's side returns before the server has looked at its certificate: a refusal shows in a later call.
        ``before_reading`` is called whenever something has arrived; what it raises ends the handshake.
        """
        wants = ffi.new("int *")
        while True:
            call(lib.mgd_channel_handshake, self.handle, wants)
            if not wants[0]:
                return
            await self._ready(wants[0])
            if before_reading is not None:
                before_reading()

    def peer_names(self) -> tuple[str, ...]:
        """Return every DNS name and IP address in the peer's certificate, or if there is none its common name."""
        out = ffi.new("char[]", _NAMES_BYTES)
        call(lib.mgd_channel_peer_names, self.handle, out, _NAMES_BYTES)
        text = ffi.string(out)
        assert isinstance(text, bytes)
        return tuple(text.decode().splitlines())

    def try_send(self, data: bytes | bytearray) -> tuple[int, int]:
        """Send without blocking; return how many bytes were taken, and MGD_WANTS_*: what to wait for before the next call."""
        taken, wants = ffi.new("size_t *"), ffi.new("int *")
        with ffi.from_buffer(data) as buffer:
            call(lib.mgd_channel_try_send, self.handle, buffer, len(data), taken, wants)
        return int(taken[0]), int(wants[0])

    def try_receive(self, size_bytes: int) -> tuple[bytes, int]:
        """Receive at most so many bytes without blocking; if there are none, MGD_WANTS_* says what to wait for.

        What follows stays in the channel, which is not seen in its descriptor.  ConnectionLostError at the end.
        """
        buffer = ffi.new("char[]", size_bytes)
        got, wants = ffi.new("size_t *"), ffi.new("int *")
        call(lib.mgd_channel_try_recv, self.handle, buffer, size_bytes, got, wants)
        return bytes(ffi.buffer(buffer, got[0])), int(wants[0])

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        while True:
            taken, wants = self.try_send(data)
            data = data[taken:]
            if not wants:
                return
            await self._ready(wants)

    async def receive(self, size_bytes: int) -> bytes:
        """Receive exactly so many bytes; what follows stays for the engine.  ConnectionLostError if the stream ends."""
        data = b""
        while len(data) < size_bytes:
            piece, wants = self.try_receive(size_bytes - len(data))
            data += piece
            if not piece:
                await self._ready(wants)
        return data

    def fileno(self) -> int:
        """Return the descriptor, which the channel owns: only for waiting."""
        return int(lib.mgd_channel_fd(self.handle))

    async def _ready(self, wants: int) -> None:
        """Wait until the socket is readable or writable, as C wants it."""
        loop = asyncio.get_running_loop()
        fd = int(lib.mgd_channel_fd(self.handle))
        ready = loop.create_future()

        def done() -> None:
            if not ready.done():
                ready.set_result(None)

        if wants & lib.MGD_WANTS_READ:
            loop.add_reader(fd, done)
        if wants & lib.MGD_WANTS_WRITE:
            loop.add_writer(fd, done)
        try:
            await ready
        finally:
            loop.remove_reader(fd)
            loop.remove_writer(fd)
