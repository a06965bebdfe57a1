"""The state that the next agent needs if this one dies: each migration's journal entry and its kept descriptors.

`RecoveryState` keeps both in step for one migration, and `LeftoverMigrations` returns them to the next agent.
"""

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
#: Seconds between tries to remove a journal entry from a failing disk.
REMOVE_PAUSES = (0.1, 0.5, 2.0, 5.0, 10.0)

log = structlog.get_logger("migrated.recovery.state")


class RecoveryState(Generic[E]):
    """The journal entry of one migration, and its descriptors in the store."""

    def __init__(self, journal: Journal[E], store: DescriptorStore, migration_id: str) -> None:
        self._journal: Journal[E] = journal
        self._store = store
        self._id = migration_id
        self._writing = asyncio.Lock()
        self._over = False

    async def keep_descriptors(self, fds: Sequence[int]) -> None:
        """Keep these in the descriptor store, in this order.  Raises HostError."""
        await self._store.keep(PREFIX + self._id, fds)

    async def write(self, entry: E) -> None:
        """Write the entry durably.  Raises HostError.  Does nothing after `clear` or `close_entry`."""
        async with self._writing:
            if self._over:
                return
            if self._journal.in_memory:  # sooner done than handed to a thread: a paused guest waits for some entries
                self._journal.write(self._id, entry)
            else:
                await in_thread(self._journal.write, self._id, entry)

    async def remove_entry(self) -> None:
        """Remove only the entry.  Raises OSError; the next agent would then still trust the entry."""
        await in_thread(self._journal.remove, self._id)

    async def release_descriptors(self) -> None:
        """Release the descriptors, when the next agent needs only the entry."""
        await self._store.forget(PREFIX + self._id)

    async def close_entry(self) -> None:
        """Keep only the fact that all pages have arrived, for a source that has not heard it."""
        async with self._writing:
            self._over = True
            try:
                await in_thread(self._journal.close, self._id)
            except OSError as error:  # then the next agent recovers the guest, and finds that all pages have arrived
                log.warning("cannot close a journal entry", migration=self._id, error=str(error))
                return
        await self._store.forget(PREFIX + self._id)

    async def supersede_others(self, guest: str) -> None:
        """Make sure that no entry of an earlier migration can ever run the guest here again.  Raises HostError."""
        await in_thread(supersede, self._journal, guest, self._id)

    async def clear(self) -> None:
        """Remove everything: no agent needs anything of this migration any more.

        If the entry cannot be removed, the descriptors stay kept: an entry without its descriptors would describe a
        guest that can never be served.
        """
        async with self._writing:
            self._over = True
            for pause in (*REMOVE_PAUSES, None):
                try:
                    await self.remove_entry()
                    break
                except OSError as error:
                    log.warning("cannot remove a journal entry", migration=self._id, error=str(error))
                    if pause is None:
                        return
                    await asyncio.sleep(pause)
        await self._store.forget(PREFIX + self._id)


def supersede(journal: Journal[SourceEntry], guest: str, successor: str) -> None:
    """Mark every other entry that would make the guest run here as superseded.

    Such an entry remains if the guest did not answer, or if its target could not be reached.  Once the guest has moved,
    an agent that trusted the entry would run the guest on two hosts.  Its information about the target stays.  Raises
    HostError.
    """
    for migration_id, entry in journal.load().items():
        if migration_id == successor or entry.hello.guest != guest:
            continue
        if not entry.position.committed and not entry.superseded:
            entry.superseded = True
            journal.write(migration_id, entry)


class LeftoverMigrations(Generic[E]):
    """The migrations that the previous agent left: valid entries, with the descriptors kept for each."""

    def __init__(self, journal: Journal[E], store: DescriptorStore) -> None:
        self._journal: Journal[E] = journal
        self._store = store

    async def take(self) -> list[tuple[str, E, list[int]]]:
        """Return ``(migration id, entry, descriptors)``; the caller owns the latter.  Close those without an entry."""
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
                log.error("keeping the descriptors of a migration whose journal was set aside", name=name)
                continue
            log.warning("releasing descriptors kept for a migration without a journal", name=name)
            await self._store.forget(name)
        return found

    def _read(self) -> tuple[dict[str, E], set[str]]:
        self._journal.remove_leftovers()
        return self._journal.load(), self._journal.refused()
