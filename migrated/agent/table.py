"""The table of one agent's migrations: the active ones and recent results.

Results include those of earlier agents with this state directory, as far as the archive has them.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from migrated.agent.archive import Archive
from migrated.agent.history import Histories, Kept
from migrated.agent.migration import Migration
from migrated.agent.record import ErrorInfo, Record, State
from migrated.errors import ConflictError, NotFoundError
from migrated.memory.page_map import PageMap
from migrated.recovery.journal import SourceEntry, TargetEntry

M = TypeVar("M", bound=Migration)


class MigrationTable(Generic[M]):
    """Migrations in the order of their start; the oldest ended ones beyond ``keep`` are forgotten.

    An ``archive`` stores the records of migrations that end and provides those of previous agents.  The latter are only
    records: no verb applies to them any more.
    """

    def __init__(self, *, keep: int, archive: Archive | None = None, histories: Histories | None = None) -> None:
        self._migrations: dict[str, M] = {}
        self._keep = keep
        self._archive = archive
        self._histories = histories
        self._archiving: set[asyncio.Future[None]] = set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="archive")  # one thread keeps the lines in order
        self._former: dict[str, Record] = {record.id: record for record in archive.load()} if archive else {}

    def add(self, migration: M) -> None:
        """Add a new migration, or a recovered one that continues."""
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

    def _archive_soon(self, archive: Archive, record: Record) -> asyncio.Future[None]:
        """Write the record of an ended migration in a thread: a slow disk must not stop the other migrations."""
        return self._write_soon(functools.partial(archive.add, record))

    def _write_soon(self, write: Callable[[], None]) -> asyncio.Future[None]:
        writing = asyncio.get_running_loop().run_in_executor(self._writer, write)
        self._archiving.add(writing)
        writing.add_done_callback(self._archiving.discard)
        return writing

    def save_history(self, migration: M) -> None:
        """Store the history of a migration that this agent no longer works on."""
        if self._histories is not None and migration.record.ended:
            self._write_soon(functools.partial(self._histories.save, migration.id, migration.history.take()))

    async def history(self, wanted: str) -> Kept:
        """Return the history of a migration, empty if there is none any more.  Raises as `record` does."""
        record = self.record(wanted)
        migration = self._migrations.get(record.id)
        if migration is not None and not migration.history.stored:
            return migration.history.kept()
        if self._histories is None:
            return Kept()
        # In the writer's thread, so that what is being stored is there.
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._histories.load, record.id)

    async def page_map(self, wanted: str) -> PageMap | None:
        """Return the page map of a migration, the last one if it has ended.  Raises as `record` does."""
        migration = self._migrations.get(self.record(wanted).id)
        if migration is not None and not migration.history.stored:
            # Once it has ended, no map from before the end will do.
            return await migration.history.page_map(migration.engine, now=migration.record.ended)
        return (await self.history(wanted)).page_map

    async def archived(self) -> None:
        """Wait until the records of all ended migrations are written."""
        while self._archiving:
            await asyncio.wait(self._archiving)

    def __iter__(self) -> Iterator[M]:
        return iter(list(self._migrations.values()))

    @property
    def active(self) -> list[M]:
        """The migrations that have not ended."""
        return [migration for migration in self if not migration.record.ended]

    def of_guest(self, guest: str) -> M | None:
        """Return the active migration of this guest, if any."""
        return next((migration for migration in self.active if migration.record.guest == guest), None)

    def find(self, wanted: str) -> M:
        """Find the migration a verb is for: by id, by a unique prefix of it, or by guest name (its newest).

        Raises NotFoundError; ConflictError when several match, or when the match ended before this agent started.
        """
        record = self.record(wanted)
        migration = self._migrations.get(record.id)
        if migration is None:
            raise ConflictError(
                f"migration {record.id} of {record.guest} ended before this agent was started",
                state=record.state.value,
                hint="nothing can be done with it any more",
            )
        return migration

    def known(self, migration_id: str) -> M | None:
        """Return the migration with exactly this id, if this agent has run it."""
        return self._migrations.get(migration_id)

    def remember(self, record: Record) -> None:
        """Keep a record of a migration that this agent cannot continue, for display and verbs that use the journal."""
        self._former[record.id] = record

    def record(self, wanted: str) -> Record:
        """Find a record in the same way.  Raises NotFoundError, ConflictError."""
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
            raise ConflictError(f"{wanted!r} matches several migrations: {ids}", hint="give more of the id")
        raise NotFoundError(f"no migration {wanted!r}", hint="`migrated list --all` shows all migrations")

    def events(self, wanted: str) -> AsyncIterator[Record]:
        """Yield the record now and whenever it changes, until it has ended.  Raises at once, as `record` does."""
        record = self.record(wanted)
        migration = self._migrations.get(record.id)
        return _only(record) if migration is None else migration.events()

    def records(self, *, ended: bool) -> list[Record]:
        """Return fresh records, oldest first."""
        chosen = [migration for migration in self if ended or not migration.record.ended]
        for migration in chosen:
            if not migration.record.ended:
                migration.refresh()
        return [*(self._former.values() if ended else ()), *(migration.record for migration in chosen)]


async def _only(record: Record) -> AsyncIterator[Record]:
    yield record


def failed_record(migration_id: str, role: str, entry: TargetEntry | SourceEntry, error: BaseException) -> Record:
    """Build the record of a migration that an agent found in its journal and cannot continue."""
    hello = entry.hello
    return Record(
        id=migration_id,
        guest=hello.guest,
        role=role,
        mode=hello.mode,
        driver=hello.driver,
        state=State.FAILED,
        started_at=entry.started_at,
        ended_at=time.time(),
        error=ErrorInfo.of(error),
    )
