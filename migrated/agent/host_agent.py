"""The base of both agents: verbs on a table of migrations, the tasks that run them, and a safe shutdown.

The HTTP server and the command line know an agent only as a `HostAgent`.
"""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from migrated.agent import archive, tracing
from migrated.agent.archive import Archive
from migrated.agent.evacuation import Evacuation
from migrated.agent.history import Histories, Kept
from migrated.agent.migration import Migration
from migrated.agent.record import Record
from migrated.agent.requests import EvacuateRequest, GuestList, Health, SetRequest, StartRequest
from migrated.agent.table import MigrationTable
from migrated.config import AgentConfig
from migrated.errors import ConflictError, NotFoundError
from migrated.guests.registry import GuestRegistry
from migrated.link.credentials import Credentials
from migrated.link.dialing import DialTerms
from migrated.memory.page_map import PageMap
from migrated.recovery.store import CombinedStore, store_for
from migrated.waiting import cancel_and_wait, in_thread

M = TypeVar("M", bound=Migration)


class HostAgent(abc.ABC, Generic[M]):
    """Base of `SourceAgent` and `TargetAgent`.

    The public methods are the verbs.  They raise NotFoundError, ConflictError, ConfigError and whatever the work itself
    raises.
    """

    role = ""  # "source" | "target"
    credentials: Credentials | None = None  # None: no TLS

    def __init__(self, config: AgentConfig, log: Any) -> None:
        self.config = config
        self._log = log
        self._migrations: MigrationTable[M] = MigrationTable(
            keep=config.limits.max_records,
            archive=Archive(config.state_dir / archive.NAME, keep=config.limits.max_records),
            histories=Histories(config.state_dir),
        )
        self.refused: collections.Counter[str] = (
            collections.Counter()
        )  # commands and incoming migrations, by error code
        self._tasks: dict[asyncio.Task[None], M] = {}
        self._started = False  # the previous agent's migrations are recovered; new ones may start
        self._stopping = False
        self._guests = GuestRegistry(config)
        self._tracing = tracing.start(config)
        self._store = store_for(config.state_dir)
        if (files := config.tls_files) is not None:
            self.credentials = Credentials(files, role=self.role, peers=config.tls.peers, where=config.path)

    # ------------------------------------------------------------ verbs

    def _check_started(self) -> None:
        """Raise ConflictError until the previous agent's migrations are recovered; HTTP is served from the start."""
        if not self._started:
            raise ConflictError("this agent is just starting", code="starting", hint="try again in a moment")

    def guests(self) -> list[str]:
        """Return the names of the configured guests, sorted."""
        return sorted(self.config.guests)

    @abc.abstractmethod
    async def survey(self) -> GuestList:
        """Examine every guest of this host: can it be migrated, and if not, why not (source only; ConflictError on a target)."""

    def records(self, *, ended: bool = True) -> list[Record]:
        """Return all migrations, oldest first, with fresh figures; ended=False leaves out those that have ended."""
        return self._migrations.records(ended=ended)

    def record(self, migration_id: str) -> Record:
        """Find a record by id, by a unique prefix of the id, or by guest name (its newest).  Raises NotFoundError."""
        return self._migrations.record(migration_id)

    async def history(self, migration_id: str) -> Kept:
        """Return a migration's figures over time, its log and its last page map.  Raises as `record` does."""
        return await self._migrations.history(migration_id)

    async def page_map(self, migration_id: str) -> PageMap | None:
        """Return a migration's page map, at most a moment old while it is active.  Raises as `record` does."""
        return await self._migrations.page_map(migration_id)

    @abc.abstractmethod
    async def start(self, request: StartRequest, *, traceparent: str = "") -> Record:
        """Run the immediate checks, then migrate in the background (source only; ConflictError on a target).

        ``traceparent``: the caller's trace, as in the header of W3C Trace Context.
        """

    async def abort(self, migration_id: str) -> Record:
        """Abort the migration while that is still safe; ConflictError later."""
        migration = self._migrations.find(migration_id)
        migration.abort()
        return migration.record

    @abc.abstractmethod
    async def switchover(self, migration_id: str) -> Record:
        """End pre-copy now."""

    @abc.abstractmethod
    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        """Reconnect a paused post-copy now, optionally at a new address."""

    @abc.abstractmethod
    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        """Give up on the lost source of a post-copy: poison the missing pages.  confirm must be the guest's name."""

    @abc.abstractmethod
    async def force_run(self, migration_id: str, *, confirm: str) -> Record:
        """Run the guest here: the other host is gone, and only it knew about COMMIT.  confirm: the guest's name."""

    @abc.abstractmethod
    async def discard(self, migration_id: str, *, confirm: str) -> Record:
        """Remove what is left of the guest on this host; it must not run here.  confirm must be the guest's name."""

    @abc.abstractmethod
    async def set(self, migration_id: str, request: SetRequest) -> Record:
        """Change the limits of an active migration."""

    async def evacuate(self, request: EvacuateRequest) -> Evacuation:
        """Run the immediate checks, then migrate many guests in the background; a dry run only plans (source only)."""
        del request
        raise ConflictError(
            f"this is a {self.role} agent: guests leave through the source agent of their host",
            hint="`migrated --agent … evacuate` with the source agent's control socket",
        )

    def evacuations(self) -> list[Evacuation]:
        """Return the evacuations that have not ended, and the last ones that have, oldest first."""
        return []

    async def abort_evacuation(self, evacuation_id: str) -> Evacuation:
        """Start no further migration, and abort those that can still be aborted."""
        raise NotFoundError(f"no evacuation {evacuation_id!r}", hint="only source agents have any")

    def events(self, migration_id: str) -> AsyncIterator[Record]:
        """Yield the record now and on each change (state at once, figures at most twice a second) until it ends."""
        return self._migrations.events(migration_id)

    @abc.abstractmethod
    def health(self) -> Health:
        """Report this agent's health, for monitoring."""

    @abc.abstractmethod
    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set; then abort what can be aborted, leave every guest safe, and return."""

    async def reload(self, config: AgentConfig) -> list[str]:
        """Take over the guests and defaults of a new configuration, for migrations that start from now on.

        Returns the names of the tables that have changed and wait for the next start.  Raises ConflictError, and changes
        nothing, if the table of a guest that is being migrated has changed: the migration still needs it.
        """
        self._check_started()
        for migration in self._migrations.active:
            guest = migration.record.guest
            if config.guest_table(guest) != self.config.guest_table(guest):
                raise ConflictError(
                    f"{config.path}: the table of {guest} has changed, and {guest} is being migrated ({migration.id})",
                    state=migration.record.state.value,
                    code="guest-migrating",
                    hint="leave the table as it was until the migration has ended, then reload again",
                )
        applied, waiting = self.config.reloaded(config)
        reopening = self._guests.replace(applied)
        self.config = applied  # before anything awaits: a migration that starts meanwhile sees one configuration
        await reopening
        return waiting

    # ------------------------------------------------------------ common to both roles

    @property
    def dial_terms(self) -> DialTerms:
        """How this agent dials."""
        return DialTerms(self.config.timeouts, self.credentials, loopback_only=self.config.loopback_only)

    def _reasons(self) -> list[str]:
        """Return the reasons common to both roles why this agent is not ready."""
        return ["starting"] * (not self._started) + ["shutting down"] * self._stopping

    def _launch(self, migration: M, *, traceparent: str = "", started_at: float | None = None) -> None:
        """Run a migration.  ``traceparent``: the trace that it is part of.  ``started_at``: when a former agent began it."""
        migration.traced_by(self._tracing, parent=traceparent, started_at=started_at)
        self._migrations.add(migration)
        task = asyncio.ensure_future(self._run(migration))
        self._tasks[task] = migration
        task.add_done_callback(lambda _: self._tasks.pop(task, None))

    async def _leave(self, migration: M | None) -> None:
        """Stop working on a migration; the guest and the journal stay as they are."""
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
        self._migrations.save_history(migration)
        # The guest's next migration may have begun while this one was finishing.
        if self._migrations.of_guest(migration.record.guest) is None:
            self._guests.remove_run_dir(migration.record.guest)

    async def _wind_up(self) -> None:
        """Refuse new work, abort what can be aborted, and stay until nobody needs this process.

        A migration that only waits for an unreachable peer does not hold this up: its guest waits for the next agent.
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
                self._log.warning(
                    "exiting with active migrations: their guests wait for the next agent", count=len(self._tasks)
                )
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.wait(self._tasks)
        await self._migrations.archived()
        await in_thread(self._tracing.close)
