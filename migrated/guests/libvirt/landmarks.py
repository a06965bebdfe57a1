"""Where an incoming QEMU keeps its RAM blocks, found without a monitor.

libvirt lets nobody use the monitor of a domain that it restores.  But QEMU reads its migration stream from us, and a stream can
hold pages: so we send a random page for the beginning and the end of each block, and look for them in QEMU's memory.  What is
found there is the block; nothing is guessed.  QEMU keeps a piece of the stream in a buffer, where such a page may lie as well:
so filler follows, more than that buffer holds, and a last page that says when QEMU has come so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import struct
import time
from collections.abc import Iterable, Iterator

from migrated.errors import GuestError, GuestRefusedError
from migrated.guests.qemu.memory import BASE_PAGE_BYTES, Block, LocatedBlock, cover
from migrated.guests.qemu.state import ram_pages
from migrated.memory.maps import Area, areas
from migrated.privileged import open_file
from migrated.waiting import in_thread

#: QEMUFile's buffer has 32 KiB.
_FILLER_PAGES = 32
_POLL_SECONDS = 0.02
_PIECE_PAGES = 1 << 16
_PRESENT_OR_SWAPPED = 3 << 62


@dataclasses.dataclass(frozen=True, slots=True)
class _Mark:
    """The first and the last page of a block (used part), as sent."""

    block: Block
    first: bytes
    last: bytes

    @property
    def last_offset(self) -> int:
        return self.block.used_bytes - BASE_PAGE_BYTES


class Landmarks:
    """For the blocks of one incoming QEMU: `stream` is to be sent after the stream's RAM section has begun, then `find`."""

    def __init__(self, guest: str, blocks: Iterable[Block]) -> None:
        self.guest = guest
        self._marks = [_mark(block) for block in blocks]
        self._end = os.urandom(BASE_PAGE_BYTES)
        self._largest = max(self._marks, key=lambda mark: mark.block.used_bytes)
        if self._largest.block.used_bytes < 3 * BASE_PAGE_BYTES:
            raise GuestRefusedError(f"guest {guest} has no memory to speak of", code="memory-not-found")

    def stream(self) -> bytes:
        """The marks as pages of QEMU's migration stream."""
        pages = []
        for mark in self._marks:
            pages.append((mark.block.id, 0, mark.first))
            if mark.last_offset:
                pages.append((mark.block.id, mark.last_offset, mark.last))
        largest = self._largest.block.id
        filler = (largest, BASE_PAGE_BYTES, os.urandom(BASE_PAGE_BYTES))
        return ram_pages([*pages, *[filler] * _FILLER_PAGES, (largest, BASE_PAGE_BYTES, self._end)])

    async def find(self, pid: int, *, limit_seconds: float) -> dict[str, LocatedBlock]:
        """Where the blocks are, by id.  Raises GuestRefusedError ``memory-not-found``."""
        deadline = time.monotonic() + limit_seconds
        while (located := await in_thread(self._look, pid)) is None:
            if time.monotonic() > deadline:
                raise GuestError(
                    f"guest {self.guest}: QEMU did not read its migration stream within {limit_seconds:g} s",
                    code="guest-start",
                )
            await asyncio.sleep(_POLL_SECONDS)
        return located

    def _look(self, pid: int) -> dict[str, LocatedBlock] | None:
        """None while QEMU has not come to the last page."""
        with contextlib.suppress(OSError), os.fdopen(open_file(pid, "mem"), "rb", 0) as memory:
            every = areas(pid)
            fd = memory.fileno()
            candidates = [area for area in every if area.permissions.startswith("rw") and not area.path.startswith("[")]
            starts = {mark.first: mark for mark in self._marks}
            found: dict[str, set[int]] = {mark.block.id: set() for mark in self._marks}
            for area in candidates:  # where QEMU puts them, unless the kernel has merged it with what is before it
                self._note(fd, starts, area.start, found)
            if not any(self._ended(fd, address) for address in found[self._largest.block.id]):
                if found[self._largest.block.id]:
                    return None
                self._search(pid, fd, candidates, {self._largest.first: self._largest}, found)
                if not any(self._ended(fd, address) for address in found[self._largest.block.id]):
                    return None
            lacking = {first: mark for first, mark in starts.items() if not found[mark.block.id]}
            if lacking:
                self._search(pid, fd, candidates, lacking, found)
            return {
                mark.block.id: cover(self.guest, every, mark.block, self._only(mark, found[mark.block.id]))
                for mark in self._marks
            }
        return None

    def _only(self, mark: _Mark, addresses: set[int]) -> int:
        if len(addresses) != 1:
            raise GuestRefusedError(
                f"guest {self.guest}: RAM block {mark.block.id} was found at {len(addresses)} places of its QEMU",
                code="memory-not-found",
            )
        return next(iter(addresses))

    def _ended(self, fd: int, address: int) -> bool:
        return _read(fd, address + BASE_PAGE_BYTES) == self._end

    def _note(self, fd: int, wanted: dict[bytes, _Mark], address: int, found: dict[str, set[int]]) -> None:
        """If a block begins here, and ends where it should."""
        mark = wanted.get(_read(fd, address))
        if mark is not None and (not mark.last_offset or _read(fd, address + mark.last_offset) == mark.last):
            found[mark.block.id].add(address)

    def _search(
        self, pid: int, fd: int, candidates: list[Area], wanted: dict[bytes, _Mark], found: dict[str, set[int]]
    ) -> None:
        """Look at every page that is there."""
        with os.fdopen(open_file(pid, "pagemap"), "rb", 0) as pagemap:
            for area in candidates:
                for address in _present(pagemap.fileno(), area):
                    self._note(fd, wanted, address, found)


def _mark(block: Block) -> _Mark:
    if not 0 < block.used_bytes <= block.size_bytes or block.used_bytes % BASE_PAGE_BYTES:
        raise GuestRefusedError(f"RAM block {block.id} uses {block.used_bytes} bytes", code="memory-not-found")
    first = os.urandom(BASE_PAGE_BYTES)
    return _Mark(block, first, first if block.used_bytes == BASE_PAGE_BYTES else os.urandom(BASE_PAGE_BYTES))


def _read(fd: int, address: int) -> bytes:
    try:
        return os.pread(fd, BASE_PAGE_BYTES, address)
    except OSError:  # a mapping that cannot be read
        return b""


def _present(pagemap_fd: int, area: Area) -> Iterator[int]:
    """Addresses of the area's pages that hold something."""
    pages = area.length_bytes // BASE_PAGE_BYTES
    for begin in range(0, pages, _PIECE_PAGES):
        count = min(_PIECE_PAGES, pages - begin)
        entries = os.pread(pagemap_fd, 8 * count, 8 * (area.start // BASE_PAGE_BYTES + begin))
        if not entries.strip(b"\0"):
            continue
        for index, (entry,) in enumerate(struct.iter_unpack("Q", entries)):
            if entry & _PRESENT_OR_SWAPPED:
                yield area.start + (begin + index) * BASE_PAGE_BYTES
