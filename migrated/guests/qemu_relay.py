"""QEMU's migration stream, carried between the socket that QEMU holds and the agents' state channel, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from migrated.errors import GuestError
from migrated.guests.driver import StateChannel
from migrated.guests.qmp import Monitor

T = TypeVar("T")

_PIECE_BYTES = 1 << 18


class StateRelay:
    """Two tasks.  Make it with `open`, run waits through `guard`, end it with `close`."""

    def __init__(self, guest: str, channel: StateChannel) -> None:
        self.guest = guest
        self._channel = channel
        self._writer: asyncio.StreamWriter | None = None
        self._outbound: asyncio.Task[None] | None = None
        self._inbound: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, monitor: Monitor, fd_name: str, channel: StateChannel, *, first: bytes = b"") -> StateRelay:
        """Hand QEMU one end of a socket pair under ``fd_name`` and carry bytes between the other end and ``channel``.

        ``first``: bytes from the peer that were read already.
        """
        ours, theirs = socket.socketpair()
        relay = cls(monitor.guest, channel)
        try:
            with theirs:
                await monitor.give_fd(fd_name, theirs.fileno())
            ours.setblocking(False)
            reader, relay._writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        relay._outbound = asyncio.create_task(relay._carry_out(reader))
        relay._inbound = asyncio.create_task(relay._carry_in(relay._writer, first))
        return relay

    async def _carry_out(self, reader: asyncio.StreamReader) -> None:
        # A reset is how a QEMU that gave up looks from here; what QMP says of it is the better message.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while data := await reader.read(_PIECE_BYTES):
                await self._channel.write(data)
        await self._channel.close_write()

    async def _carry_in(self, writer: asyncio.StreamWriter, first: bytes) -> None:
        data = first or await self._channel.read()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while data:
                writer.write(data)
                await writer.drain()
                data = await self._channel.read()
            writer.write_eof()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work``; if carrying fails first, cancel it and raise that failure."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                carrying = {t for t in (self._outbound, self._inbound) if t is not None and not t.done()}
                await asyncio.wait({task, *carrying}, return_when=asyncio.FIRST_COMPLETED)
                self._raise_failure()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _raise_failure(self) -> None:
        for carrier in (self._outbound, self._inbound):
            if carrier is not None and carrier.done() and not carrier.cancelled() and (error := carrier.exception()):
                raise error

    async def sent(self, limit: float) -> None:
        """Wait until QEMU has closed its end and all its bytes are with the channel."""
        if self._outbound is None:
            return
        done, _ = await asyncio.wait({self._outbound}, timeout=limit)
        if not done:
            raise GuestError(
                f"guest {self.guest}: QEMU did not end its migration stream in {limit:g} s", code="qmp-timeout"
            )
        self._raise_failure()

    async def close(self) -> None:
        """Stop carrying; QEMU sees its connection end.  Idempotent."""
        tasks = [t for t in (self._outbound, self._inbound) if t is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # seen: the ones that matter were raised by `guard` or `sent`
        self._outbound = self._inbound = None
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
