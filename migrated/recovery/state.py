"""What the next agent needs, if this one dies: of each migration its journal entry and its kept descriptors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Generic, TypeVar

import structlog

from migrated.errors import MigratedError
from migrated.recovery.journal import Journal, SourceEntry, TargetEntry
from migrated.recovery.store import DescriptorStore
from migrated.waiting import in_thread

E = TypeVar("E", TargetEntry, SourceEntry)
PREFIX = "migrated-"
#: Between tries to remove a journal entry from a disk that fails.
REMOVE_PAUSES = (0.1, 0.5, 2.0, 5.0, 10.0)

log = structlog.get_logger("migrated.recovery.state")


class RecoveryState(Generic[E]):
    """What is kept of one migration: its journal entry, and descriptors in the store."""

    def __init__(self, journal: Journal[E], store: DescriptorStore, migration_id: str) -> None:
        self._journal: Journal[E] = journal
        self._store = store
        self._id = migration_id
        self._writing = asyncio.Lock()
        self._over = False

    async def keep_descriptors(self, fds: Sequence[int]) -> None:
        """Have the store keep these, in this order.  HostError."""
        await self._store.keep(PREFIX + self._id, fds)

    async def write(self, entry: E) -> None:
        """Write the entry durably.  HostError.  After `clear` nothing is written: what was on its way comes too late."""
        async with self._writing:
            if not self._over:
                await in_thread(self._journal.write, self._id, entry)

    async def remove_entry(self) -> None:
        """Remove the entry alone.  OSError when it cannot be: then it would be believed after a restart."""
        await in_thread(self._journal.remove, self._id)

    async def release_descriptors(self) -> None:
        """Where the next agent needs only the entry."""
        await self._store.forget(PREFIX + self._id)

    async def close_entry(self) -> None:
        """Keep only the word that all is in, for a source that has not heard it."""
        async with self._writing:
            self._over = True
            try:
                await in_thread(self._journal.close, self._id)
            except OSError as error:  # then a next agent takes the guest back, and finds that all is in
                log.warning("a journal entry cannot be closed", migration=self._id, error=str(error))
                return
        await self._store.forget(PREFIX + self._id)

    async def supersede_others(self, guest: str) -> None:
        """This migration has the guest now: no entry left by an earlier one may ever make it run here again.  HostError."""
        await in_thread(supersede, self._journal, guest, self._id)

    async def clear(self) -> None:
        """Remove all of it: no agent needs anything of this migration any more.

        An entry without its descriptors would be a guest that can never be served: where the entry cannot be removed, they
        stay kept.
        """
        async with self._writing:
            self._over = True
            for pause in (*REMOVE_PAUSES, None):
                try:
                    await self.remove_entry()
                    break
                except OSError as error:
                    log.warning("a journal entry cannot be removed", migration=self._id, error=str(error))
                    if pause is None:
                        return
                    await asyncio.sleep(pause)
        await self._store.forget(PREFIX + self._id)


def supersede(journal: Journal[SourceEntry], guest: str, successor: str) -> None:
    """Mark every other entry of the guest that would make it run here.

    Such an entry stays where the guest did not answer, or its target could not be told.  Once the guest has moved on, an
    agent that believed it would run the guest at two places.  What it says of its target stays.  HostError.
    """
    for migration_id, entry in journal.load().items():
        if migration_id == successor or entry.hello.guest != guest:
            continue
        if not entry.position.committed and not entry.superseded:
            entry.superseded = True
            journal.write(migration_id, entry)


class LeftoverMigrations(Generic[E]):
    """What an agent before us left: entries that can be believed, with the descriptors kept for each."""

    def __init__(self, journal: Journal[E], store: DescriptorStore) -> None:
        self._journal: Journal[E] = journal
        self._store = store

    async def take(self) -> list[tuple[str, E, list[int]]]:
        """``(migration id, entry, descriptors)``; the descriptors are the caller's.  What belongs to no entry is closed."""
        held = await self._store.taken()
        try:
            entries, doubtful = await in_thread(self._read)
        except MigratedError:
            for fds in held.values():  # they stay kept
                for fd in fds:
                    os.close(fd)
            raise
        found = []
        for migration_id, entry in entries.items():
            found.append((migration_id, entry, held.pop(PREFIX + migration_id, [])))
        for name, fds in held.items():
            for fd in fds:
                os.close(fd)
            if name.removeprefix(PREFIX) in doubtful:
                log.error("the descriptors of a migration stay kept: its journal was set aside", name=name)
                continue
            log.warning("descriptors were kept for a migration without a journal; letting go", name=name)
            await self._store.forget(name)
        return found

    def _read(self) -> tuple[dict[str, E], set[str]]:
        self._journal.remove_leftovers()
        return self._journal.load(), self._journal.refused()
