"""The source agent: it knows the guests of this host and migrates them to other hosts.

It also recovers the migrations that the previous agent left in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

import structlog

from migrated.address import parse_address
from migrated.agent.evacuation import Evacuation
from migrated.agent.host_agent import HostAgent
from migrated.agent.record import Record, State, id_of
from migrated.agent.requests import EvacuateRequest, GuestList, Health, SetRequest, StartRequest
from migrated.agent.table import failed_record
from migrated.config import AgentConfig
from migrated.errors import ConflictError, GuestError, MigratedError, NotFoundError, log_fields
from migrated.guests.access.pidfd import process_lives
from migrated.memory.regions import Region, SourceMemory
from migrated.recovery.journal import Journal, SourceEntry
from migrated.recovery.state import LeftoverMigrations, RecoveryState
from migrated.source.evacuations import Evacuations
from migrated.source.migration import SourceMigration
from migrated.source.options import Options
from migrated.source.stage import Recovered
from migrated.source.survey import Survey
from migrated.waiting import in_thread

log = structlog.get_logger("migrated.source")


class SourceAgent(HostAgent[SourceMigration]):
    """Migrates guests away from this host."""

    role = "source"

    def __init__(self, config: AgentConfig) -> None:
        super().__init__(config, log)
        self._journal = Journal(config.state_dir / "journal", SourceEntry)
        self._survey = Survey(self._guests, active=lambda: self.records(ended=False), check=self._check_movable)
        self._evacuations = Evacuations(self, self._migrations)

    async def start(self, request: StartRequest, *, traceparent: str = "") -> Record:
        """Check everything that can be checked without touching the guest; then migrate in the background."""
        if self._stopping:
            raise ConflictError("this agent is shutting down", hint="start it again first")
        self._check_started()
        table = self.config.guest_table(request.guest)
        if table is None:
            known = ", ".join(self.guests()) or "none"
            raise NotFoundError(
                f"no guest {request.guest!r} is configured here",
                code="unknown-guest",
                hint=f"guests in {self.config.path}: {known}",
            )
        options = Options.of(request, self.config.migration)
        await self._check_committed(request.guest)
        await self._survey.leave(request.guest)
        self._check_idle(request.guest)
        if len(self._migrations.active) >= self.config.limits.max_migrations:
            raise ConflictError(
                f"{len(self._migrations.active)} migrations are active, which is the limit",
                code="too-many",
                hint="wait for one to end, or raise limits.max_migrations",
            )
        guest = self._guests.source_guest(request.guest, request)
        session_id = os.urandom(16)
        migration = SourceMigration(
            guest_name=request.guest,
            driver=table.driver,
            guest=guest,
            options=options,
            config=self.config,
            session_id=session_id,
            terms=self.dial_terms,
            recovery_state=RecoveryState(self._journal, self._store, id_of(session_id)),
        )
        self._launch(migration, traceparent=traceparent)
        return migration.record

    async def survey(self) -> GuestList:
        """See HostAgent."""
        self._check_started()
        if self._stopping:
            raise ConflictError("this agent is shutting down", hint="start it again first")
        return await self._survey.report()

    async def evacuate(self, request: EvacuateRequest) -> Evacuation:
        """See HostAgent."""
        return await self._evacuations.begin(request)

    def evacuations(self) -> list[Evacuation]:
        """See HostAgent."""
        return self._evacuations.records()

    async def abort_evacuation(self, evacuation_id: str) -> Evacuation:
        """See HostAgent."""
        return await self._evacuations.abort(evacuation_id)

    async def abort(self, migration_id: str) -> Record:
        """See HostAgent.  An evacuation does not start the guest's migration again."""
        record = await super().abort(migration_id)
        self._evacuations.leave_out(record.id)
        return record

    async def _check_movable(self, guest: str) -> None:
        """Raise what `start` would raise for this guest."""
        self._check_idle(guest)
        await self._check_committed(guest)

    def _check_idle(self, guest: str) -> None:
        busy = self._migrations.of_guest(guest)
        if busy is not None:
            raise ConflictError(
                f"{guest} is being migrated already, to {busy.record.peer} ({busy.id})",
                state=busy.record.state.value,
                code="guest-migrating",
                hint=f"wait for it (`migrated wait {busy.id}`) or abort it",
            )

    async def _check_committed(self, guest: str) -> None:
        """Refuse a guest that belongs to a target since COMMIT, whatever happened since.  HostError, ConflictError."""
        for migration_id, entry in (await in_thread(self._journal.load)).items():
            if (
                entry.hello.guest != guest
                or not entry.position.committed
                or self._migrations.of_guest(guest) is not None
            ):
                continue
            if process_lives(entry.pid, entry.pid_started):
                raise ConflictError(
                    f"COMMIT was sent for {guest}, to {entry.target} ({migration_id}): it may run there",
                    state=State.FAILED.value,
                    code="guest-committed",
                    hint=f"once you know where it runs: `migrated discard {migration_id}` or `migrated force-run {migration_id}`",
                )

    # ------------------------------------------------------------ recovery after a restart

    async def _take_back(self) -> None:
        """Recover the migrations that the previous agent left, guest by guest."""
        found = await LeftoverMigrations(self._journal, self._store).take()
        newest = {entry.hello.guest: key for key, entry, _ in sorted(found, key=lambda left: left[1].started_at)}
        for migration_id, entry, fds in found:
            recovery_state = RecoveryState(self._journal, self._store, migration_id)
            try:
                superseded = entry.superseded or newest[entry.hello.guest] != migration_id
                revived = self._revive(entry, fds, recovery_state, superseded=superseded)
                self._launch(revived, traceparent=entry.traceparent, started_at=entry.started_at)
            except (MigratedError, OSError) as error:
                for fd in fds:
                    with contextlib.suppress(OSError):
                        os.close(fd)
                # The entry stays: only it can find the guest again, for instance once the configuration is repaired.
                log.error(  # noqa: TRY400 - expected: no traceback
                    "cannot continue a migration of the previous agent",
                    migration=migration_id,
                    guest=entry.hello.guest,
                    stage=entry.stage,
                    **log_fields(error),
                )
                self._migrations.remember(failed_record(migration_id, self.role, entry, error))

    def _revive(
        self,
        entry: SourceEntry,
        fds: list[int],
        recovery_state: RecoveryState[SourceEntry],
        *,
        superseded: bool = False,
        forced: bool = False,
    ) -> SourceMigration:
        hello = entry.hello
        error = MigratedError(
            "the source agent was restarted before COMMIT",
            code="agent-restarted",
            hint="the guest runs on here: start the migration again",
        )
        table = self.config.guest_table(hello.guest)
        if table is None:
            raise NotFoundError(f"{hello.guest} is no longer configured in {self.config.path}", code="unknown-guest")
        regions = tuple(
            Region(region.name, region.size_bytes, region.page_bytes, region.device) for region in hello.regions
        )
        if entry.position.committed and not entry.position.done and len(fds) != len(regions):
            raise GuestError(
                f"{len(fds)} memory descriptors were kept, {len(regions)} are needed: the frozen memory is lost",
                code="no-descriptors",
                hint="on the target, `migrated abandon` ends the waiting with memory errors in the guest",
            )
        memory = SourceMemory(
            pid=entry.pid,
            regions=regions,
            mappings=(),
            memory_fds=tuple(fds),
            file_offsets=entry.file_offsets,
            private=entry.private,
            file_behind=entry.file_behind,
        )
        if forced:
            error = MigratedError(
                f"{hello.guest} was made to run here on request", code="forced", hint="the guest runs on here"
            )
        options = Options.model_construct(
            **{
                **dict(self.config.migration),
                "target": parse_address(entry.target),
                "mode": hello.mode,
                "streams": hello.streams,
                "max_bandwidth": entry.max_bandwidth,
                "drain_bandwidth": entry.drain_bandwidth,
                "compression": entry.compression,
            }
        )
        return SourceMigration(
            guest_name=hello.guest,
            driver=hello.driver,
            guest=self._guests.source_guest(hello.guest),
            options=options,
            config=self.config,
            session_id=hello.session,
            terms=self.dial_terms,
            recovery_state=recovery_state,
            recovered=Recovered(entry, memory, error, superseded),
        )

    async def switchover(self, migration_id: str) -> Record:
        """See HostAgent."""
        migration = self._migrations.find(migration_id)
        migration.switchover()
        return migration.record

    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        """See HostAgent."""
        migration = self._migrations.find(migration_id)
        migration.resume(parse_address(to) if to else None)
        return migration.record

    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        """Refuse: the pages are missing on the target, so abandon the migration there."""
        migration = self._migrations.find(migration_id)
        del confirm
        raise ConflictError(
            "a post-copy is abandoned on the target, where the pages are missing",
            state=migration.record.state.value,
            hint="`migrated --agent … abandon` on the target host",
        )

    async def force_run(self, migration_id: str, *, confirm: str) -> Record:
        """See HostAgent.  Withdraw COMMIT in the journal first, so that the next agent also runs the guest here."""
        self._check_started()
        record, entry = await self._journalled(migration_id)
        if entry is None or not entry.position.committed or entry.position.done:
            raise ConflictError(
                f"migration {record.id} is {record.state}: this host has not handed {record.guest} over",
                state=record.state.value,
            )
        self._check_confirmed(record, confirm, "force-run")
        if not process_lives(entry.pid, entry.pid_started):
            raise ConflictError(
                f"the process of {record.guest} on this host has ended: it cannot run here",
                state=record.state.value,
                hint=f"`migrated discard {record.id}` removes what is left",
            )
        await self._leave(self._migrations.known(record.id))
        entry.stage, entry.superseded = "active", False
        await in_thread(self._journal.write, record.id, entry)
        log.error("running the guest here on request", migration=record.id, guest=record.guest)
        await self._survey.leave(record.guest)
        migration = self._revive(entry, [], RecoveryState(self._journal, self._store, record.id), forced=True)
        self._launch(migration, traceparent=entry.traceparent, started_at=entry.started_at)
        return migration.record

    async def discard(self, migration_id: str, *, confirm: str) -> Record:
        """See HostAgent.  A guest that was not handed over keeps running here; only the target's side is given up."""
        self._check_started()
        record, entry = await self._journalled(migration_id)
        if entry is None or record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING, State.FAILED, State.ABORTED):
            raise ConflictError(
                f"migration {record.id} is {record.state}: there is nothing to discard", state=record.state.value
            )
        self._check_confirmed(record, confirm, "discard")
        migration = self._migrations.known(record.id)
        await self._leave(migration)
        if entry.position.committed and process_lives(entry.pid, entry.pid_started):
            guest = self._guests.source_guest(record.guest)
            try:
                await guest.adopt(entry.pid, entry.guest)
                await guest.release()
            finally:
                await guest.close()
        await RecoveryState(self._journal, self._store, record.id).clear()
        log.error("discarded on request", migration=record.id, guest=record.guest)
        if migration is not None and not migration.record.ended:
            migration.set_state(State.FAILED, MigratedError("discarded on request", code="discarded"))
        return record

    async def _journalled(self, wanted: str) -> tuple[Record, SourceEntry | None]:
        record = self._migrations.record(wanted)
        return record, await in_thread(self._journal.find, record.id)

    async def set(self, migration_id: str, request: SetRequest) -> Record:
        """See HostAgent."""
        migration = self._migrations.find(migration_id)
        if migration.record.ended:
            raise ConflictError(f"migration {migration.id} has ended", state=migration.record.state.value)
        migration.options.apply(request)
        migration.limits_changed()
        return migration.record

    def health(self) -> Health:
        """Report health.  A source is healthy while its event loop runs, which this call itself shows."""
        reasons = self._reasons()
        return Health(healthy=True, ready=not reasons, reasons=reasons)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``; then abort what can be aborted, and stay until no post-copy needs this process."""
        async with self._guests:
            await self._take_back()
            await self._evacuations.take_up()
            self._started = True
            await stop.wait()
            await self._evacuations.close()
            await self._wind_up()
            await self._survey.close()
