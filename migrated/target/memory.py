"""Memory for an incoming guest: one memfd per region, and the ledger, which records the state of each page.

`GuestMemory` owns the descriptors; `users_of` finds the processes that use such memory.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection
from pathlib import Path

from migrated.memory import memfd
from migrated.memory.engine import ledger_bytes
from migrated.memory.regions import Region, TargetMemory
from migrated.privileged import open_inodes
from migrated.waiting import in_thread


class GuestMemory:
    """The memory of one guest: empty until `allocate`, or inherited from an agent that died.  `close` releases it."""

    def __init__(self, pieces: tuple[TargetMemory, ...] = (), ledger_fd: int = -1) -> None:
        self.pieces = pieces
        self.ledger_fd = ledger_fd

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Host page size of each region."""
        return tuple(piece.region.page_bytes for piece in self.pieces)

    @property
    def inodes(self) -> tuple[int, ...]:
        """Inode numbers that identify the processes using this memory (`users_of`)."""
        return tuple(os.fstat(piece.memory_fd).st_ino for piece in self.pieces)

    @property
    def fds(self) -> list[int]:
        """The descriptors that the next agent needs, in the order it expects."""
        return [self.ledger_fd, *(piece.memory_fd for piece in self.pieces)]

    async def allocate(self, regions: tuple[Region, ...], page_bytes: int | None, *, reserve: bool) -> None:
        """Allocate all of it, before anything is started.  Raises HostError and leaves nothing behind if it cannot.

        ``page_bytes``: host page size, None for the largest that fits.  ``reserve``: reserve host memory for all of it.
        """
        self.pieces = await self._allocate(regions, page_bytes, reserve=reserve)
        self.ledger_fd = os.memfd_create("migrated-ledger", os.MFD_CLOEXEC)
        os.ftruncate(self.ledger_fd, ledger_bytes(self.pieces))

    async def _allocate(
        self, regions: tuple[Region, ...], page_bytes: int | None, *, reserve: bool
    ) -> tuple[TargetMemory, ...]:
        fds: list[int] = []
        try:
            pieces = []
            for region in regions:
                wanted = memfd.BASE_PAGE_BYTES if region.device else page_bytes
                fd, found = await in_thread(
                    functools.partial(memfd.reserve, region.size_bytes, wanted, name=region.name, reserved=reserve),
                    undo=lambda allocated: os.close(allocated[0]),
                )
                fds.append(fd)
                pieces.append(TargetMemory(dataclasses.replace(region, page_bytes=found), fd, reserve=reserve))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return tuple(pieces)

    def close(self) -> None:
        """Close the descriptors; the engine must be closed.  Idempotent."""
        for piece in self.pieces:
            os.close(piece.memory_fd)
        self.pieces = ()
        if self.ledger_fd >= 0:
            os.close(self.ledger_fd)
            self.ledger_fd = -1


def users_of(inodes: Collection[int]) -> list[int]:
    """Return the other processes that have an agent's memfd with one of these inodes open.

    The memfd's name is checked, too, since inode numbers are reused.  Blocks: scans every process.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            files = open_inodes(int(process.name), f"/memfd:{memfd.NAME_PREFIX}")
            if any(inode in inodes for _, inode in files.values()):
                found.append(int(process.name))
    return found
