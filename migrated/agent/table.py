"""The migrations of one agent: those under way and the last ones that ended, by former agents in this place too."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from migrated.agent.archive import Archive
from migrated.agent.migration import Migration
from migrated.agent.record import Record
from migrated.errors import ConflictError, NotFoundError

M = TypeVar("M", bound=Migration)


class MigrationTable(Generic[M]):
    """Ordered by start; forgets the oldest ended ones beyond ``keep``.

    With an ``archive`` those that end are written there, and those that an agent before us wrote are shown, as records: no
    verb fits them any more.
    """

    def __init__(self, *, keep: int, archive: Archive | None = None) -> None:
        self._migrations: dict[str, M] = {}
        self._keep = keep
        self._archive = archive
        self._archiving: set[asyncio.Future[None]] = set()
        self._writer = ThreadPoolExecutor(
            1, thread_name_prefix="archive"
        )  # one: the order of the lines is that of the ends
        self._former: dict[str, Record] = {record.id: record for record in archive.load()} if archive else {}

    def add(self, migration: M) -> None:
        """A new one, or a former one that goes on."""
        self._former.pop(migration.id, None)
        self._migrations[migration.id] = migration
        if self._archive is not None:
            migration.on_end = functools.partial(self._archive_soon, self._archive)
        ended = [known for known in self._migrations.values() if known.record.ended and known.over]
        surplus = len(self._former) + len(ended) - self._keep
        for former in list(self._former)[: max(0, surplus)]:
            del self._former[former]
            surplus -= 1
        for old in ended[: max(0, surplus)]:
            del self._migrations[old.id]

    def _archive_soon(self, archive: Archive, record: Record) -> None:
        """Write a record of a migration that has just ended: the disk may be slow, and others go on."""
        writing = asyncio.get_running_loop().run_in_executor(self._writer, archive.add, record)
        self._archiving.add(writing)
        writing.add_done_callback(self._archiving.discard)

    async def archived(self) -> None:
        """Wait until every record of a migration that has ended is written."""
        while self._archiving:
            await asyncio.wait(self._archiving)

    def __iter__(self) -> Iterator[M]:
        return iter(list(self._migrations.values()))

    @property
    def active(self) -> list[M]:
        """Those not ended."""
        return [migration for migration in self if not migration.record.ended]

    def of_guest(self, guest: str) -> M | None:
        """The one under way for this guest."""
        return next((migration for migration in self.active if migration.record.guest == guest), None)

    def find(self, wanted: str) -> M:
        """The one a verb is for: by id, a unique prefix of it, or the guest's name (its newest).

        Raises NotFoundError; ConflictError when several fit, or only one that ended before this agent was started.
        """
        record = self.record(wanted)
        migration = self._migrations.get(record.id)
        if migration is None:
            raise ConflictError(
                f"migration {record.id} of {record.guest} is over since before this agent was started",
                state=record.state.value,
                hint="nothing can be done with it any more",
            )
        return migration

    def known(self, migration_id: str) -> M | None:
        """The migration of exactly this id, if this agent has done anything for it."""
        return self._migrations.get(migration_id)

    def remember(self, record: Record) -> None:
        """One that this agent cannot go on with: shown, and found by verbs that need only its journal entry."""
        self._former[record.id] = record

    def record(self, wanted: str) -> Record:
        """A record, found likewise; NotFoundError, ConflictError."""
        records = {**self._former, **{migration.id: migration.record for migration in self}}
        if wanted in records:
            return records[wanted]
        of_guest = [record for record in records.values() if record.guest == wanted]
        if of_guest:
            return of_guest[-1]
        matching = [record for key, record in records.items() if wanted and key.startswith(wanted)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            ids = ", ".join(record.id for record in matching)
            raise ConflictError(f"{wanted!r} fits several migrations: {ids}", hint="give more of the id")
        raise NotFoundError(f"no migration {wanted!r}", hint="`migrated list --all` shows what there is")

    def events(self, wanted: str) -> AsyncIterator[Record]:
        """The record now and whenever it changes, until it has ended.  Raises at once, as `record` does."""
        record = self.record(wanted)
        migration = self._migrations.get(record.id)
        return _only(record) if migration is None else migration.events()

    def records(self, *, ended: bool) -> list[Record]:
        """Fresh records, oldest first."""
        chosen = [migration for migration in self if ended or not migration.record.ended]
        for migration in chosen:
            if not migration.record.ended:
                migration.refresh()
        return [*(self._former.values() if ended else ()), *(migration.record for migration in chosen)]


async def _only(record: Record) -> AsyncIterator[Record]:
    yield record
