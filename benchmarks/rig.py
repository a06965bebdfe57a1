"""Both engines in this process, on its own memory, joined by loopback connections."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import socket
import time

from migrated.errors import MigratedError, TimeoutExceededError
from migrated.memory.channel import Channel
from migrated.memory.engine import URGENT, EventKind, SourceEngine, TargetEngine, ledger_bytes
from migrated.memory.native import call, ffi, lib
from migrated.memory.regions import Mapping, Region, SourceMemory, TargetMemory
from migrated.memory.tracker import Tracker
from tests.rig.authority import Authority

BLOCK_BYTES = 4096
NOISE_BYTES = 4 << 20
LIMIT_SECONDS = 60


class Rig:
    """``guest`` is the source's memory, which may be written; ``copy`` is the target's file.  Lives as long as ``stack``.

    ``authority``: of the certificates for TLS; None for plain connections.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        *,
        size_bytes: int,
        page_bytes: int,
        streams: int,
        authority: Authority | None = None,
    ) -> None:
        self.size_bytes = size_bytes
        self._secret = os.urandom(lib.MGD_SECRET_BYTES)
        self._memory = _memfd(stack, size_bytes, page_bytes)
        self.copy = _memfd(stack, size_bytes, page_bytes)
        self.guest = mmap.mmap(self._memory, size_bytes, mmap.MAP_SHARED)
        buffer = ffi.from_buffer(self.guest)
        stack.callback(self.guest.close)
        stack.callback(ffi.release, buffer)
        region = Region("ram", size_bytes, page_bytes)
        mapping = Mapping(0, int(ffi.cast("uintptr_t", buffer)), 0, size_bytes)
        memory = SourceMemory(os.getpid(), (region,), (mapping,), (self._memory,), (0,))
        self.tracker = Tracker(memory, _tracking_uffd(stack))
        stack.callback(self.tracker.close)
        stack.callback(self.tracker.disarm)
        target_memory = (TargetMemory(region, self.copy),)
        ledger = os.memfd_create("ledger", os.MFD_CLOEXEC)
        stack.callback(os.close, ledger)
        os.ftruncate(ledger, ledger_bytes(target_memory))
        self.source = SourceEngine(memory, (page_bytes,), streams, self._secret)
        stack.callback(self.source.destroy)
        self.target = TargetEngine(target_memory, streams, ledger, self._secret)
        stack.callback(self.target.destroy)
        for stream in (*range(streams), URGENT):
            ours, theirs = _connected() if authority is None else _secured(authority)
            self.source.add_stream(stream, ours)
            self.target.add_stream(stream, theirs)

    def fill(self) -> None:
        """Fill every block with non-zero data that differs from its neighbours."""
        noise = os.urandom(NOISE_BYTES)
        for offset in range(0, self.size_bytes, NOISE_BYTES):
            part = (offset // NOISE_BYTES).to_bytes(8, "little") + noise[8:]
            self.guest[offset : offset + NOISE_BYTES] = part[: self.size_bytes - offset]

    def round(self, number: int) -> None:
        """Send the marked blocks; return when all have been written to the sockets."""
        self.source.start_round(number)
        self.wait(self.source, EventKind.ROUND_DONE)

    def barrier(self, number: int) -> None:
        """Wait until everything sent is in the copy."""
        self.source.barrier(number)
        self.wait(self.target, EventKind.BARRIER)

    def wait(self, engine: SourceEngine | TargetEngine, wanted: EventKind) -> None:
        """Wait until an engine reports this event."""
        deadline = time.monotonic() + LIMIT_SECONDS
        poll = select.poll()
        poll.register(engine._event_fd, select.POLLIN)  # noqa: SLF001 - there is no loop here for `watch`
        seen = False
        while not seen:
            if time.monotonic() > deadline:
                raise TimeoutExceededError(f"waited {LIMIT_SECONDS} s for {wanted.name}")
            poll.poll(1000)
            for event in engine.events():
                if event.error is not None:
                    raise MigratedError(str(event.error))
                seen = seen or event.kind is wanted

    def same(self) -> bool:
        """Return whether the copy equals the guest's memory."""
        return self._digest(self._memory) == self._digest(self.copy)

    def _digest(self, fd: int) -> int:
        out = ffi.new("uint64_t *")
        call(lib.mgd_digest, fd, 0, self.size_bytes, self._secret, out)
        return int(out[0])


def _memfd(stack: contextlib.ExitStack, size_bytes: int, page_bytes: int) -> int:
    flags = os.MFD_CLOEXEC
    if page_bytes > BLOCK_BYTES:
        flags |= os.MFD_HUGETLB | (page_bytes.bit_length() - 1) << 26
    fd = os.memfd_create("bench", flags)
    stack.callback(os.close, fd)
    os.ftruncate(fd, size_bytes)
    return fd


def _tracking_uffd(stack: contextlib.ExitStack) -> int:
    out = ffi.new("int *")
    call(lib.mgd_uffd_open, 0, out)
    stack.callback(os.close, out[0])
    call(lib.mgd_uffd_api, out[0], 0, 1)
    return int(out[0])


def _secured(authority: Authority) -> tuple[Channel, Channel]:
    ours, theirs = _connected()
    client = Channel.tls(ours, authority.side("host-a", server=False), "127.0.0.1")
    server = Channel.tls(theirs, authority.side("host-b", server=True))

    async def handshakes() -> None:
        await asyncio.gather(client.handshake(), server.handshake())

    asyncio.run(handshakes())
    return client, server


def _connected() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours.detach(), theirs.detach()
