"""What travels after the switch-over, against the blocks that really changed: both engines, memory of our own, no guest.

Only here is it known exactly which blocks changed since they were last sent: the benchmark writes them itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from migrated.errors import MigratedError, TimeoutExceededError
from migrated.guests.driver import Mapping, Region, SourceMemory, TargetMemory
from migrated.memory.engine import URGENT, EventKind, SourceEngine, TargetEngine, ledger_bytes
from migrated.memory.native import call, ffi, lib
from migrated.memory.tracker import Tracker

BLOCK = 4096
LIMIT_SECONDS = 60


def bytes_after_switchover(
    *, pages: int, page_bytes: int, blocks_per_page: int, touched_per_page: int
) -> dict[str, Any]:
    """Move ``pages``; before the freeze change some blocks of each, and rewrite some with what they already hold.

    Returns wire bytes after the switch-over, bytes of the blocks that changed, and whether the copy is the same.
    """
    size = pages * page_bytes
    secret = os.urandom(lib.MGD_SECRET_BYTES)
    with contextlib.ExitStack() as stack:
        memory = _memory(stack, size, page_bytes)
        guest = mmap.mmap(memory, size, mmap.MAP_SHARED)
        noise = os.urandom(4 << 20)
        for offset in range(0, size, len(noise)):
            part = bytes([offset // len(noise) & 0xFF]) * 8
            guest[offset : offset + len(noise)] = (part + noise[8:])[: size - offset]
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(guest)))
        uffd = _tracking_uffd(stack)
        region = Region("ram", size, page_bytes)
        source_memory = SourceMemory(os.getpid(), (region,), (Mapping(0, address, 0, size),), (memory,), (0,))
        tracker = Tracker(source_memory, uffd)
        stack.callback(tracker.close)
        stack.callback(tracker.disarm)
        copy = _memory(stack, size, page_bytes)
        target_memory = (TargetMemory(region, copy),)
        ledger = os.memfd_create("ledger", os.MFD_CLOEXEC)
        stack.callback(os.close, ledger)
        os.ftruncate(ledger, ledger_bytes(target_memory))
        source = SourceEngine(source_memory, (page_bytes,), 1, secret)
        stack.callback(source.destroy)
        target = TargetEngine(target_memory, 1, ledger, secret)
        stack.callback(target.destroy)
        for stream in (0, URGENT):
            ours, theirs = _connected()
            source.add_stream(stream, ours)
            target.add_stream(stream, theirs)

        tracker.arm()
        source.mark_populated(tracker)
        source.start_round(1)
        _wait(source, lambda event: event.kind is EventKind.ROUND_DONE)
        source.scan(tracker, quiesced=True)
        source.start_round(2)
        _wait(source, lambda event: event.kind is EventKind.ROUND_DONE)
        changed = _write(guest, pages, page_bytes, blocks_per_page, touched_per_page)
        source.scan(tracker, quiesced=True)
        source.barrier(1)
        _wait(target, lambda event: event.kind is EventKind.BARRIER)
        before = source.stats()
        stale = source.freeze()
        for piece in source.stale_maps():
            target.stale_map(*piece)
        target.switchover()
        source.serve(drain=True)
        _wait(source, lambda event: event.kind is EventKind.ALL_SENT)
        _wait(target, lambda event: event.kind is EventKind.ALL_CURRENT)
        after = source.stats()
        same = _digest(memory, size, secret) == _digest(copy, size, secret)
    wire = after.wire_bytes - before.wire_bytes
    return {
        "page_bytes": page_bytes,
        "stale_pages": stale,
        "changed_blocks": changed,
        "changed_bytes": changed * BLOCK,
        "wire_bytes": wire,
        "ratio": wire / (changed * BLOCK),
        "verified": same,
    }


def _memory(stack: contextlib.ExitStack, size: int, page_bytes: int) -> int:
    flags = os.MFD_CLOEXEC
    if page_bytes > BLOCK:
        flags |= os.MFD_HUGETLB | (page_bytes.bit_length() - 1) << 26
    fd = os.memfd_create("bench", flags)
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def _tracking_uffd(stack: contextlib.ExitStack) -> int:
    out = ffi.new("int *")
    call(lib.mgd_uffd_open, 0, out)
    stack.callback(os.close, out[0])
    call(lib.mgd_uffd_api, out[0], 0, 1)
    return int(out[0])


def _connected() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours.detach(), theirs.detach()


def _write(guest: mmap.mmap, pages: int, page_bytes: int, changed: int, touched: int) -> int:
    """Change ``changed`` random blocks of every page and touch ``touched`` more; how many were changed."""
    rng = random.Random(1)
    for page in range(pages):
        for number, block in enumerate(rng.sample(range(page_bytes // BLOCK), changed + touched)):
            at = page * page_bytes + block * BLOCK
            value = guest[at + 64]
            guest[at + 64] = value ^ 0xFF if number < changed else value
    return pages * changed


def _wait(engine: SourceEngine | TargetEngine, wanted: Callable[[Any], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    poll = select.poll()
    poll.register(engine._event_fd, select.POLLIN)
    seen = False
    while not seen:
        if time.monotonic() > deadline:
            raise TimeoutExceededError(f"an engine did not get on within {LIMIT_SECONDS} s")
        poll.poll(1000)
        for event in engine.events():
            if event.error is not None:
                raise MigratedError(str(event.error))
            seen = seen or wanted(event)


def _digest(fd: int, size: int, secret: bytes) -> int:
    out = ffi.new("uint64_t *")
    call(lib.mgd_digest, fd, 0, size, secret, out)
    return int(out[0])
