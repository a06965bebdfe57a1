"""One migration's share in surviving the agent's death: its journal entry, and its descriptors in good keeping."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Generic, TypeVar

import structlog

from migrated.journal import Journal, SourceEntry, TargetEntry
from migrated.keeper import Keeper
from migrated.waiting import in_thread

E = TypeVar("E", TargetEntry, SourceEntry)
PREFIX = "migrated-"

log = structlog.get_logger("migrated.survival")


class Survival(Generic[E]):
    """Of one migration."""

    def __init__(self, journal: Journal[E], keeper: Keeper, migration_id: str) -> None:
        self._journal: Journal[E] = journal
        self._keeper = keeper
        self._id = migration_id
        self._writing = asyncio.Lock()
        self._over = False

    async def hold(self, fds: Sequence[int]) -> None:
        """Have these descriptors kept, in this order.  HostError."""
        await self._keeper.keep(PREFIX + self._id, fds)

    async def write(self, entry: E) -> None:
        """Write the entry durably.  HostError.  After `over` nothing is written: what was on its way comes too late."""
        async with self._writing:
            if not self._over:
                await in_thread(self._journal.write, self._id, entry)

    def strike(self) -> None:
        """Remove the entry alone.  OSError when it cannot be: then it would be believed after a restart."""
        self._journal.remove(self._id)

    async def let_go(self) -> None:
        """Of the descriptors alone, where the next agent needs only the entry."""
        await self._keeper.forget(PREFIX + self._id)

    async def over(self) -> None:
        """Nothing of this migration need survive any more."""
        async with self._writing:
            self._over = True
            try:
                self.strike()
            except OSError as error:
                log.warning("a journal entry cannot be removed", migration=self._id, error=str(error))
        await self._keeper.forget(PREFIX + self._id)


class Legacy(Generic[E]):
    """What an agent before us left: entries that can be believed, with the descriptors kept for each."""

    def __init__(self, journal: Journal[E], keeper: Keeper) -> None:
        self._journal: Journal[E] = journal
        self._keeper = keeper

    async def take(self) -> list[tuple[str, E, list[int]]]:
        """``(migration id, entry, descriptors)``; the descriptors are the caller's.  What belongs to no entry is closed."""
        held = await self._keeper.taken()
        entries = self._journal.load()
        found = []
        for migration_id, entry in entries.items():
            found.append((migration_id, entry, held.pop(PREFIX + migration_id, [])))
        for name, fds in held.items():
            log.warning("descriptors were kept for a migration without a journal; letting go", name=name)
            for fd in fds:
                os.close(fd)
            await self._keeper.forget(name)
        return found
