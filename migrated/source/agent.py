"""The source agent: knows the guests of this host, and moves them away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from migrated import guests
from migrated.address import parse_address
from migrated.agent import Health, SetRequest, StartRequest
from migrated.config import AgentConfig
from migrated.errors import ConflictError, NotFoundError
from migrated.record import Record
from migrated.roster import Roster
from migrated.source.migration import SourceMigration
from migrated.source.options import Options

log = structlog.get_logger("migrated.source")


class SourceAgent:
    """Implements `migrated.agent.Agent`."""

    role = "source"

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._roster: Roster[SourceMigration] = Roster(keep=config.limits.max_records)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._residents = guests.Residents(config)

    def guests(self) -> list[str]:
        """Names, as configured."""
        return sorted(self.config.guests)

    def records(self, *, ended: bool = True) -> list[Record]:
        """See Agent."""
        return self._roster.records(ended=ended)

    def record(self, migration_id: str) -> Record:
        """See Agent."""
        return self._roster.find(migration_id).record

    async def start(self, request: StartRequest) -> Record:
        """Check everything that can be checked without touching the guest; go on in the background."""
        if self._stopping:
            raise ConflictError("this agent is shutting down", hint="start it again first")
        if request.guest not in self.config.guests:
            known = ", ".join(self.guests()) or "none"
            raise NotFoundError(
                f"no guest {request.guest!r} is configured here",
                code="unknown-guest",
                hint=f"guests in {self.config.path}: {known}",
            )
        options = Options.of(request, self.config.migration)
        busy = self._roster.of_guest(request.guest)
        if busy is not None:
            raise ConflictError(
                f"{request.guest} is being migrated already, to {busy.record.peer} ({busy.id})",
                state=busy.record.state.value,
                code="guest-migrating",
                hint=f"wait for it (`migrated wait {busy.id}`) or abort it",
            )
        if len(self._roster.active) >= self.config.limits.max_migrations:
            raise ConflictError(
                f"{len(self._roster.active)} migrations are under way, the limit",
                code="too-many",
                hint="wait for one to end, or raise limits.max_migrations",
            )
        table = self.config.guests[request.guest]
        guest = self._residents.source_guest(request.guest)
        migration = SourceMigration(
            guest_name=request.guest, driver=table["driver"], guest=guest, options=options, config=self.config
        )
        self._roster.add(migration)
        task = asyncio.ensure_future(migration.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return migration.record

    async def abort(self, migration_id: str) -> Record:
        """See Agent."""
        migration = self._roster.find(migration_id)
        migration.abort()
        return migration.record

    async def switchover(self, migration_id: str) -> Record:
        """See Agent."""
        migration = self._roster.find(migration_id)
        migration.switchover()
        return migration.record

    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        """See Agent."""
        migration = self._roster.find(migration_id)
        migration.resume(parse_address(to) if to else None)
        return migration.record

    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        """Not here: what is missing is missing on the target."""
        migration = self._roster.find(migration_id)
        del confirm
        raise ConflictError(
            "a post-copy is abandoned on the target, where the pages are missing",
            state=migration.record.state.value,
            hint="`migrated --agent … abandon` on the target host",
        )

    async def set(self, migration_id: str, request: SetRequest) -> Record:
        """See Agent."""
        migration = self._roster.find(migration_id)
        if migration.record.ended:
            raise ConflictError(f"migration {migration.id} is over", state=migration.record.state.value)
        migration.options.apply(request)
        migration.limits_changed()
        return migration.record

    def events(self, migration_id: str) -> AsyncIterator[Record]:
        """See Agent."""
        return self._roster.find(migration_id).events()

    def health(self) -> Health:
        """A source is healthy while its loop turns (whoever asks has shown that), ready unless it is stopping."""
        reasons = ["shutting down"] if self._stopping else []
        return Health(healthy=True, ready=not self._stopping, reasons=reasons)

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``: then abort what can be aborted, and stay until nothing post-copy needs this process."""
        async with self._residents:
            await stop.wait()
            self._stopping = True
            for migration in self._roster.active:
                with contextlib.suppress(ConflictError):
                    migration.abort()
            remaining = [migration for migration in self._roster.active if migration.committed]
            if remaining:
                log.warning("serving the pages of migrations after COMMIT before leaving", count=len(remaining))
            if self._tasks:
                await asyncio.wait({asyncio.ensure_future(self._drained())}, timeout=None)

    async def _drained(self) -> None:
        """Until every task is over, except those that wait for a target nobody can reach."""
        limit = self.config.timeouts.shutdown
        while self._tasks:
            done, _ = await asyncio.wait(self._tasks, timeout=limit)
            stuck = all(migration.waits_for_peer for migration in self._roster if not migration.over)
            if not done and stuck:
                log.error("leaving with migrations unsettled: their guests wait", count=len(self._tasks))
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.wait(self._tasks)
                return
