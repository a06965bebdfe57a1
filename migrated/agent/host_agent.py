"""What both agents are: verbs on a table of migrations, the tasks that do them, and an end that leaves every guest safe.

The HTTP side and the command line know an agent as a `HostAgent`, and nothing more of it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from migrated.agent import archive
from migrated.agent.archive import Archive
from migrated.agent.migration import Migration
from migrated.agent.record import Record
from migrated.agent.requests import Health, SetRequest, StartRequest
from migrated.agent.table import MigrationTable
from migrated.config import AgentConfig
from migrated.errors import ConflictError
from migrated.guests.registry import GuestRegistry
from migrated.recovery.store import CombinedStore, store_for
from migrated.waiting import cancel_and_wait

M = TypeVar("M", bound=Migration)


class HostAgent(abc.ABC, Generic[M]):
    """Base of `SourceAgent` and `TargetAgent`.

    The methods without an underscore are the verbs.  Errors: NotFoundError, ConflictError, ConfigError and what the work
    itself raises.
    """

    role = ""  # "source" | "target"

    def __init__(self, config: AgentConfig, log: Any) -> None:
        self.config = config
        self._log = log
        self._migrations: MigrationTable[M] = MigrationTable(
            keep=config.limits.max_records,
            archive=Archive(config.state_dir / archive.NAME, keep=config.limits.max_records),
        )
        self._tasks: dict[asyncio.Task[None], M] = {}
        self._started = False  # what an agent before us left is taken back, and new work can come
        self._stopping = False
        self._guests = GuestRegistry(config)
        self._store = store_for(config.state_dir)

    # ------------------------------------------------------------ verbs

    def _check_started(self) -> None:
        """ConflictError before what an agent before us left is taken back: the sites answer from the first moment on."""
        if not self._started:
            raise ConflictError("this agent is just starting", code="starting", hint="try again in a moment")

    def guests(self) -> list[str]:
        """Names, as configured."""
        return sorted(self.config.guests)

    def records(self, *, ended: bool = True) -> list[Record]:
        """All migrations, oldest first, with fresh figures; ended=False leaves out those that are over."""
        return self._migrations.records(ended=ended)

    def record(self, migration_id: str) -> Record:
        """By id, a unique prefix of it, or the guest's name (its newest); NotFoundError."""
        return self._migrations.record(migration_id)

    @abc.abstractmethod
    async def start(self, request: StartRequest) -> Record:
        """Check what can be checked at once, start in the background (source only; ConflictError on a target)."""

    async def abort(self, migration_id: str) -> Record:
        """End it, while that can be done without harm; ConflictError later."""
        migration = self._migrations.find(migration_id)
        migration.abort()
        return migration.record

    @abc.abstractmethod
    async def switchover(self, migration_id: str) -> Record:
        """End pre-copy now."""

    @abc.abstractmethod
    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        """Reconnect a paused post-copy now, perhaps at a new address."""

    @abc.abstractmethod
    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        """Post-copy whose source is lost: poison what is missing.  confirm must be the guest's name."""

    @abc.abstractmethod
    async def force_run(self, migration_id: str, *, confirm: str) -> Record:
        """The other host is gone and took the word on COMMIT with it: run the guest here.  confirm must be its name."""

    @abc.abstractmethod
    async def discard(self, migration_id: str, *, confirm: str) -> Record:
        """The guest is not to run here: end what is left of it on this host.  confirm must be its name."""

    @abc.abstractmethod
    async def set(self, migration_id: str, request: SetRequest) -> Record:
        """Change the limits of a migration under way."""

    def events(self, migration_id: str) -> AsyncIterator[Record]:
        """The record now, and again whenever it changes (state at once, figures at most twice a second), until ended."""
        return self._migrations.events(migration_id)

    @abc.abstractmethod
    def health(self) -> Health:
        """How this agent is, for whoever watches it."""

    @abc.abstractmethod
    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop``; then abort what can be aborted, leave every guest safe, and return."""

    # ------------------------------------------------------------ what both roles do

    def _reasons(self) -> list[str]:
        """Why this agent is not ready, as far as both roles can say."""
        return ["starting"] * (not self._started) + ["shutting down"] * self._stopping

    def _launch(self, migration: M) -> None:
        self._migrations.add(migration)
        task = asyncio.ensure_future(self._run(migration))
        self._tasks[task] = migration
        task.add_done_callback(lambda _: self._tasks.pop(task, None))

    async def _leave(self, migration: M | None) -> None:
        """End our work on a migration; the guest stays as it is, and so does the journal."""
        for task in [task for task, known in self._tasks.items() if known is migration]:
            await cancel_and_wait(task)

    def _check_confirmed(self, record: Record, confirm: str, verb: str) -> None:
        if confirm != record.guest:
            raise ConflictError(
                f"{verb} of {record.id} cannot be undone: confirm it with the name of the guest, {record.guest}",
                state=record.state.value,
                code="confirm",
                hint=f"`migrated {verb} {record.id} --confirm {record.guest}`",
            )

    async def _run(self, migration: M) -> None:
        await migration.run()
        # The next migration of this guest may have begun while this one came to its end.
        if self._migrations.of_guest(migration.record.guest) is None:
            self._guests.remove_run_dir(migration.record.guest)

    async def _wind_up(self) -> None:
        """Take nothing new, abort what can be aborted, and stay until nobody needs this process.

        Migrations that only wait for a peer nobody can reach are left: their guests wait, and a later agent goes on.
        """
        self._stopping = True
        for migration in self._migrations.active:
            with contextlib.suppress(ConflictError):
                migration.abort()
        if self._migrations.active:
            self._log.warning("staying for migrations that cannot be aborted", count=len(self._migrations.active))
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, timeout=self.config.timeouts.shutdown)
            if not done and all(migration.waits_for_peer for migration in self._migrations if not migration.over):
                if isinstance(self._store, CombinedStore):
                    await self._store.copy_to_holder()
                self._log.warning("leaving with migrations under way: their guests wait", count=len(self._tasks))
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.wait(self._tasks)
        await self._migrations.archived()
