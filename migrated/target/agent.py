"""The target agent: it listens for source agents and takes in guests.

It also recovers the guests that the previous agent left, and answers sources that ask late.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time

import structlog

from migrated.agent.host_agent import HostAgent
from migrated.agent.record import Record, id_of
from migrated.agent.requests import GuestList, Health, SetRequest, StartRequest
from migrated.agent.table import failed_record
from migrated.config import AgentConfig
from migrated.errors import (
    ConflictError,
    GuestError,
    GuestRefusedError,
    MigratedError,
    NotFoundError,
    RemoteProtocolError,
    log_fields,
)
from migrated.guests.access.pidfd import PidHandle, process_lives
from migrated.link.control_link import ControlLink
from migrated.link.listener import Listener
from migrated.memory.regions import Region, TargetMemory
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import Aborted, Hello, Inquire, Ready, Resume
from migrated.protocol.preamble import Preamble
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import Journal, TargetEntry
from migrated.recovery.state import LeftoverMigrations, RecoveryState
from migrated.settings import MemoryTable
from migrated.target.capacity import capacity
from migrated.target.late import answer
from migrated.target.memory import GuestMemory, users_of
from migrated.target.migration import Recovered, TargetMigration
from migrated.waiting import in_thread

log = structlog.get_logger("migrated.target")

#: The fault thread must have run within this time, or the agent reports itself unhealthy (and systemd restarts it).
FAULT_THREAD_LIMIT_NS = 10 * 10**9


class TargetAgent(HostAgent[TargetMigration]):
    """Takes guests in from source agents."""

    role = "target"

    def __init__(self, config: AgentConfig) -> None:
        super().__init__(config, log)
        self._waiting_for_next: set[bytes] = set()  # sessions of guests that wait here and that this agent cannot serve
        self._journal = Journal(config.state_dir / "journal", TargetEntry)
        self._listener = Listener(
            config.listen_address,
            self,
            timeouts=config.timeouts,
            max_connections=config.limits.max_connections,
            setting=f"{config.path}: listen.address",
            credentials=self.credentials,
        )

    # ------------------------------------------------------------ verbs

    async def start(self, request: StartRequest, *, traceparent: str = "") -> Record:
        """Refuse: migrations start at the source."""
        del traceparent
        raise ConflictError(
            f"this is a target agent: {request.guest} is moved by the source agent it runs under",
            hint="`migrated --agent … start` with the source agent's control socket",
        )

    async def survey(self) -> GuestList:
        """Guests leave from the source agent."""
        raise ConflictError(
            "this is a target agent: the source agent of a host knows which guests can be migrated away",
            hint="`migrated --agent … guests` with the source agent's control socket",
        )

    async def switchover(self, migration_id: str) -> Record:
        """Refuse: the source decides."""
        raise self._only_source(migration_id, "switchover")

    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        """Refuse: the source dials."""
        del to
        raise self._only_source(migration_id, "resume")

    async def set(self, migration_id: str, request: SetRequest) -> Record:
        """Refuse: the limits belong to the sender."""
        del request
        raise self._only_source(migration_id, "set")

    def _only_source(self, migration_id: str, verb: str) -> ConflictError:
        migration = self._migrations.find(migration_id)
        return ConflictError(
            f"{verb} is for the source agent ({migration.record.peer})",
            state=migration.record.state.value,
            hint=f"`migrated --agent … {verb} {migration.id}` there",
        )

    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        """See HostAgent."""
        migration = self._migrations.find(migration_id)
        migration.check_abandon()
        self._check_confirmed(migration.record, confirm, "abandon")
        await migration.abandon()
        return migration.record

    async def force_run(self, migration_id: str, *, confirm: str) -> Record:
        """See HostAgent."""
        self._check_started()
        migration = self._migrations.find(migration_id)
        self._check_confirmed(migration.record, confirm, "force-run")
        await migration.force_run()
        return migration.record

    async def discard(self, migration_id: str, *, confirm: str) -> Record:
        """See HostAgent."""
        self._check_started()
        record = self._migrations.record(migration_id)
        self._check_confirmed(record, confirm, "discard")
        migration = self._migrations.known(record.id)
        if migration is not None and not migration.record.ended:
            await migration.discard()
            return record
        entry = await in_thread(self._journal.find, record.id)
        if entry is None:
            raise ConflictError(
                f"migration {record.id} is {record.state}: there is nothing to discard", state=record.state.value
            )
        await self._end_left_over(entry)  # one that this agent could not continue
        await RecoveryState(self._journal, self._store, record.id).clear()
        self._waiting_for_next.discard(entry.hello.session)
        log.error("discarded on request", migration=record.id, guest=record.guest)
        return record

    def health(self) -> Health:
        """Report health.  A target is healthy while every fault thread runs."""
        now = time.monotonic_ns()
        stuck = [
            m.record.guest for m in self._migrations.active if not m.fault_server_alive(now, FAULT_THREAD_LIMIT_NS)
        ]
        reasons = [*self._reasons(), *(f"the fault thread of {guest} is stuck" for guest in stuck)]
        return Health(healthy=not stuck, ready=not reasons, reasons=reasons)

    # ------------------------------------------------------------ running

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until ``stop``; then abort what can be aborted, and stay while a guest here still lacks pages."""
        await self._listener.open()  # first: an unusable address must show before a guest is touched
        accepting: asyncio.Task[None] | None = None
        try:
            await self._take_back()
            self._started = True
            accepting = asyncio.ensure_future(self._listener.serve())
            async with self._guests:
                await stop.wait()
                await self._wind_up()
        finally:
            if accepting is not None:
                accepting.cancel()
            self._listener.close()

    # ------------------------------------------------------------ recovery after a restart

    async def _take_back(self) -> None:
        """Recover the migrations that the previous agent left, guest by guest."""
        for migration_id, entry, fds in await LeftoverMigrations(self._journal, self._store).take():
            recovery_state = RecoveryState(self._journal, self._store, migration_id)
            promised = not entry.position.settled
            left_over = not promised
            try:
                if not promised:
                    await self._end_left_over(entry)
                    left_over = False
                    raise GuestError(
                        "the agent was restarted before it had loaded the guest, which runs on at its source",
                        code="agent-restarted",
                    )
                await self._revive(entry, fds, recovery_state)
            except (MigratedError, OSError) as error:
                for fd in fds:
                    with contextlib.suppress(OSError):
                        os.close(fd)
                # Closing the last userfaultfd would wake its waiting threads on pages that have not arrived.
                waits = promised and process_lives(entry.pid, entry.pid_started)
                if waits:
                    self._waiting_for_next.add(entry.hello.session)
                elif not left_over:  # else the next agent tries to end it again
                    await recovery_state.clear()
                self._migrations.remember(failed_record(migration_id, self.role, entry, error))
                told = log_fields(error)
                if waits:
                    told["hint"] = "the guest waits and everything is kept: fix the cause and restart the agent"
                log.error(  # noqa: TRY400 - expected: no traceback
                    "cannot continue a migration of the previous agent",
                    migration=migration_id,
                    guest=entry.hello.guest,
                    stage=entry.stage,
                    **told,
                )

    async def _end_left_over(self, entry: TargetEntry) -> None:
        left = [entry.pid] if process_lives(entry.pid, entry.pid_started) else []
        if not entry.pid:  # an agent may have started it and died before it recorded the pid
            left = await in_thread(users_of, entry.memory_inodes)
        for pid in left:
            process = PidHandle.attach(pid)
            try:
                await process.kill(self.config.timeouts.abort)
            finally:
                process.close()
        if self.config.guest_table(entry.hello.guest) is not None:
            await self._guests.target_guest(entry.hello.guest).end_left_over()

    async def _revive(self, entry: TargetEntry, fds: list[int], recovery_state: RecoveryState[TargetEntry]) -> None:
        hello = entry.hello
        if not process_lives(entry.pid, entry.pid_started):
            raise GuestError(f"the guest process {entry.pid} has exited", code="guest-died")
        if len(fds) != 2 + len(hello.regions) or len(entry.page_bytes) != len(hello.regions):
            raise GuestError(
                f"{len(fds)} descriptors were kept, {2 + len(hello.regions)} are needed", code="no-descriptors"
            )
        if self.config.guest_table(hello.guest) is None:
            raise GuestError(f"{hello.guest} is no longer configured in {self.config.path}", code="unknown-guest")
        uffd, ledger_fd, *memory_fds = fds
        memory = tuple(
            TargetMemory(Region(region.name, region.size_bytes, page, region.device), fd, reserve=False)
            for region, page, fd in zip(hello.regions, entry.page_bytes, memory_fds, strict=True)
        )
        for piece in memory:
            if os.fstat(piece.memory_fd).st_size != piece.region.size_bytes:
                raise GuestError(
                    f"the memory kept for region {piece.region.name} has another size", code="no-descriptors"
                )
        guest = self._guests.target_guest(hello.guest)
        faults = await guest.adopt(entry.pid, uffd, memory, entry.guest)
        migration = TargetMigration(
            hello,
            guest=guest,
            page_bytes=None,
            session=Session.taken_up(Role.TARGET, entry.position, hello, entry.page_bytes),
            link=None,
            config=self.config,
            recovery_state=recovery_state,
            recovered=Recovered(entry, GuestMemory(memory, ledger_fd), faults),
        )
        self._launch(migration, traceparent=hello.traceparent, started_at=entry.started_at)

    # ------------------------------------------------------------ connections of sources

    def _known(self, session: bytes) -> bool:
        return (
            any(migration.hello.session == session for migration in self._migrations)
            or session in self._waiting_for_next
        )

    def find(self, preamble: Preamble) -> TargetMigration | None:
        """See `Receiver`."""
        for migration in self._migrations:
            if migration.hello.session == preamble.session:
                if not migration.authentic(preamble.token):
                    raise RemoteProtocolError("the token is not this session's")
                return migration
        return None

    async def begin(self, link: ControlLink, first: Hello | Resume | Inquire) -> None:
        """See `Receiver`."""
        if isinstance(first, Hello):
            link.start(Session(Role.TARGET))
            await self._take_in(link)
        elif isinstance(first, Inquire):
            link.start(Session(Role.TARGET))
            await self._tell_capacity(link)
        elif first.session in self._waiting_for_next:
            log.warning("a source asks for a guest that waits for the next agent", peer=link.peer)
            await link.close()  # the source keeps asking
        else:
            await self._answer(link, first)

    async def _done(self, resume: Resume) -> TargetEntry | None:
        """Return the closed entry of a guest that no longer needs its source, if this is that source."""
        entry = await in_thread(self._journal.closed, id_of(resume.session))
        if entry is None or not resume.committed:
            return None
        same = hmac.compare_digest(resume.session + resume.token, entry.hello.session + entry.hello.token)
        return entry if same else None

    async def _answer(self, link: ControlLink, resume: Resume) -> None:
        """Answer for a session of which nothing is left here, except perhaps the fact that all pages have arrived."""
        done, limit = await self._done(resume), self.config.timeouts.handshake
        if done is None:
            session = Session(Role.TARGET, state=SessionState.ABORTED)
            await answer(link, session, limit_seconds=limit)
            log.info("answered for an unknown session", peer=link.peer, committed=resume.committed)
        else:
            session = Session(Role.TARGET, state=SessionState.CLOSED, hello=done.hello, ready=Ready(done.page_bytes))
            if await answer(link, session, limit_seconds=limit, all_in=True):
                log.info("told a source that its guest no longer needs it", guest=done.hello.guest, peer=link.peer)
                await RecoveryState(self._journal, self._store, id_of(done.hello.session)).clear()

    async def _take_in(self, link: ControlLink) -> None:
        launched = False
        try:
            hello = await link.expect(Hello, limit_seconds=self.config.timeouts.handshake, what="Hello")
            try:
                migration = self._admit(hello, link)
            except MigratedError as error:
                log.warning("migration refused", guest=hello.guest, peer=link.peer, **log_fields(error))
                self.refused[error.code] += 1
                await link.send(abort_of(error))
                await link.send(Aborted())
                return
            self._launch(migration, traceparent=hello.traceparent)
            launched = True
        finally:
            if not launched:  # also if the peer leaves before it hears that it is refused
                await link.close()

    async def _tell_capacity(self, link: ControlLink) -> None:
        """Answer a source that asks what this host has room for.  Changes nothing here."""
        limits = self.config.limits
        try:
            inquire = await link.expect(Inquire, limit_seconds=self.config.timeouts.handshake, what="Inquire")
            try:
                self._check_running()
            except ConflictError as error:
                await link.send(abort_of(error))
                return
            active = len(self._migrations.active)
            await link.send(await capacity(inquire, self._admissible, active=active, limit=limits.max_migrations))
        finally:
            await link.close()

    def _check_running(self) -> None:
        if self._stopping:
            raise ConflictError("the target agent is shutting down", code="shutting-down")

    def _admissible(self, guest: str, driver: str) -> MemoryTable:
        """Return the table of a guest that may come.  Raises NotFoundError, GuestRefusedError, ConflictError."""
        table = self.config.guest_table(guest)
        if table is None:
            known = ", ".join(self.guests()) or "none"
            raise NotFoundError(
                f"no guest {guest!r} is configured on the target",
                code="unknown-guest",
                hint=f"add [guests.{guest}] to {self.config.path} there; it has: {known}",
            )
        if table.driver != driver:
            raise GuestRefusedError(
                f"{guest} has driver {driver!r} on the source and {table.driver!r} on the target",
                code="drivers-differ",
                hint="use the same driver in both configurations",
            )
        busy = self._migrations.of_guest(guest)
        if busy is not None:
            raise ConflictError(
                f"{guest} is already being taken in ({busy.id})",
                state=busy.record.state.value,
                code="guest-migrating",
                hint="wait for it, or abort it on its source",
            )
        assert isinstance(table, MemoryTable)
        return table

    def _admit(self, hello: Hello, link: ControlLink) -> TargetMigration:
        self._check_running()
        if self._known(hello.session):
            raise ConflictError(
                "this session is already known here: a new migration needs a new session", code="known-session"
            )
        table = self._admissible(hello.guest, hello.driver)
        if len(self._migrations.active) >= self.config.limits.max_migrations:
            raise ConflictError("the target takes no more migrations at once", code="too-many")
        return TargetMigration(
            hello,
            guest=self._guests.target_guest(hello.guest),
            page_bytes=table.page_size,
            reserve=table.reserve,
            session=link.session,
            link=link,
            config=self.config,
            recovery_state=RecoveryState(self._journal, self._store, id_of(hello.session)),
        )
