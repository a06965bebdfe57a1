"""The target's side of one migration: memory, fault server, guest process, switchover, and the last page.

until Loaded   There is one connection.  A failure leads to `TargetMigration._give_up`: nothing of the guest stays here.
until COMMIT   The guest is loaded and bound: only the source knows whether it committed.  If the connection fails, the
               target keeps the paused guest and waits for the source (state postcopy-paused).
until Done     The guest runs.  The engine's threads serve its faults whatever happens to our tasks.  If the connection
               fails, the guest waits for missing pages until the source dials again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hmac
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from migrated.agent import figures
from migrated.agent.connection import Connection
from migrated.agent.migration import FinalError, Migration, log_errors
from migrated.agent.rates import Rates
from migrated.agent.record import Record, State, id_of
from migrated.errors import (
    AbortedError,
    ConflictError,
    ConnectionLostError,
    GuestError,
    MigratedError,
    PeerError,
    RemoteProtocolError,
    as_migrated_error,
    log_fields,
)
from migrated.guests.access.pidfd import process_started
from migrated.guests.driver import FaultSource, TargetGuest
from migrated.memory.channel import Channel
from migrated.memory.engine import URGENT, Event, EventKind, TargetEngine
from migrated.memory.regions import Region
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import (
    Abort,
    Aborted,
    BarrierAck,
    Commit,
    Done,
    Hello,
    Lacking,
    LackingEnd,
    Loaded,
    Populated,
    Ready,
    Released,
    Resume,
    Resumed,
    Round,
    Running,
    StaleMap,
    StaleMapEnd,
    Switchover,
)
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import TargetEntry
from migrated.target.late import answer
from migrated.target.memory import GuestMemory
from migrated.waiting import in_thread, within

if TYPE_CHECKING:
    from migrated.config import AgentConfig
    from migrated.link.control_link import ControlLink
    from migrated.protocol.session import Session
    from migrated.recovery.state import RecoveryState

#: Zeroing a huge page for the first time costs the hypervisor's time more than ours: two threads pay off.
POPULATE_THREADS = 2
#: Codes of errors which say that the guest has ended.
GUEST_OVER = frozenset({"guest-died", "guest-gone"})
#: Pause between tries to resume the guest after COMMIT.
RESUME_PAUSE_SECONDS = 0.2
#: Pause between tries to record COMMIT in the journal.
NOTE_PAUSE_SECONDS = 1.0
#: How long a page connection may wait for its engine.
STREAM_WAIT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died."""

    entry: TargetEntry
    memory: GuestMemory
    faults: FaultSource


class TargetMigration(Migration):
    """Construct it with the Hello and its link, or with what a dead agent left; then call `run` once."""

    role = "target"
    engine: TargetEngine | None

    def __init__(
        self,
        hello: Hello,
        *,
        guest: TargetGuest,
        page_bytes: int | None,
        reserve: bool = True,
        session: Session,
        link: ControlLink | None,
        config: AgentConfig,
        recovery_state: RecoveryState[TargetEntry],
        recovered: Recovered | None = None,
    ) -> None:
        super().__init__(
            Record(
                id=id_of(hello.session),
                guest=hello.guest,
                role=self.role,
                mode=hello.mode,
                peer=link.peer if link is not None else "",
                driver=hello.driver,
                total_bytes=sum(region.size_bytes for region in hello.regions),
                state=State.SETUP if recovered is None else State.POSTCOPY_PAUSED,
            ),
            config.hooks,
        )
        self.hello = hello
        self.session = session
        self._guest = guest
        self._page_bytes = page_bytes
        self._reserve = reserve
        self._timeouts = config.timeouts
        self._recovery_state = recovery_state
        self._recovered = recovered
        if recovered is not None:
            self._entry, self._memory = recovered.entry, recovered.memory
        else:
            self._entry = TargetEntry(
                hello=hello, stage="setup", peer=self.record.peer, started_at=self.record.started_at
            )
            self._memory = GuestMemory()
        self._next: Connection | None = None  # dialled by the source, and not yet taken by the flow
        if link is not None:
            self._next = self.connection = Connection(self, link)
        self._changed = asyncio.Event()  # wakes `_next_connection`
        self._guest_over: GuestError | None = None  # the process has exited: no connection can repair that
        self._forced = False  # the operator runs the guest here, since the source is gone
        self._unserved: MigratedError | None = None  # why the recovered guest cannot be served
        self._silent = False  # do not answer late sources: they keep asking until the next agent is there
        self._armed = asyncio.Event()  # the engine accepts page connections
        self._mapped = asyncio.Event()
        self._running: asyncio.Task[None] | None = None  # `_run_guest`, once committed
        self._ran_before = self._entry.stage == "running"  # a previous agent resumed the guest
        self._runs = asyncio.Event()
        self._noted = asyncio.Event()  # the journal says that the guest is ours
        self._all_current = asyncio.Event()
        self._released = False  # the source has heard that all pages have arrived
        self._abandoned = 0  # pages poisoned because the source is lost
        self._rates = Rates()

    def authentic(self, token: bytes) -> bool:
        """Whether the token is this session's."""
        return hmac.compare_digest(token, self.hello.token)

    # ------------------------------------------------------------ the flow

    async def _migrate(self) -> None:
        if self._recovered is not None:
            await self._take_up(self._recovered)
        while (connection := await self._next_connection()) is not None:
            async with connection:
                try:
                    async with connection.alive:
                        await self._converse(connection.link)
                except FinalError:
                    raise
                except Exception as error:  # noqa: BLE001 - the connection has failed; our promise decides what follows
                    if self._promised:
                        await connection.close()  # what arrives until then counts: the source may withdraw
                    if not self._promised:
                        await self._give_up(error, connection)
                        return
                    if not self._all_in:
                        self.set_state(State.POSTCOPY_PAUSED, error)
        if self._guest_over is not None:
            await self._give_up(self._guest_over, self.connection)
        else:
            await self._finish()

    @property
    def _promised(self) -> bool:
        """Whether the guest must be kept: it is bound or committed, and has not ended."""
        return self._guest_over is None and (self.session.bound or self.session.committed)

    @property
    def _all_in(self) -> bool:
        """Whether the guest runs, the journal says so, and every page has arrived."""
        return self._runs.is_set() and self._noted.is_set() and self._all_current.is_set()

    async def _next_connection(self) -> Connection | None:
        """Wait for the source to dial; return None once the source is no longer needed, or the guest has ended."""
        while True:
            self._changed.clear()
            if self._guest_over is not None or self._all_in:
                return None
            if self._forced and self.session.bound:
                self.session.commit_by_hand()
            if self.session.committed:  # also by a COMMIT that was read, but still queued, when its connection was lost
                self._run_here()
            if self._next is not None:
                self.connection, self._next = self._next, None
                return self.connection
            if self.session.bound:
                self.log.warning("the guest is loaded and waits here: only the source knows whether COMMIT was given")
            await self._changed.wait()

    async def _converse(self, link: ControlLink) -> None:
        """Obey the source over one connection, from our current standing until Released."""
        if self.session.state is SessionState.HELLO:
            await self._set_up(link)
            committed = False
        else:
            committed = await self._resume(link)
        if not committed:
            await self._until_commit(link)
            self._run_here()
        await self._runs.wait()
        if self.session.state is SessionState.COMMITTED:
            await link.send(Running())
        self.set_state(State.POSTCOPY)
        await self._all_current.wait()
        await self._noted.wait()
        if self.session.state is SessionState.POSTCOPY:
            await link.send(Done())
        with contextlib.suppress(MigratedError):
            await link.expect(Released, limit_seconds=self._timeouts.release, what="the farewell")
            self._released = True

    # ------------------------------------------------------------ until COMMIT

    async def _set_up(self, link: ControlLink) -> None:
        """Allocate the memory, start a process that uses it and a server for its faults; send Ready."""
        hello = self.hello
        await self.hooks.before(State.SETUP)
        regions = tuple(Region(r.name, r.size_bytes, r.page_bytes, r.device) for r in hello.regions)
        await self._guest.check(regions, hello.description)
        memory = self._memory
        await memory.allocate(regions, self._page_bytes, reserve=self._reserve)
        self.record.page_size = max(memory.page_bytes)
        engine = self._make_engine(recover=False)
        entry = self._entry
        entry.page_bytes, entry.memory_inodes = memory.page_bytes, memory.inodes
        await self._write("setup")  # if we die from here on, the next agent finds the process by its memory
        faults = await self._guest.start(memory.pieces)  # has its own limit, and can report what the guest logged
        entry.pid, entry.pid_started = faults.pid, process_started(faults.pid)
        await self._write("setup")
        # Only now: while the journal names no process, any process with this memory counts as the guest's.
        await self._recovery_state.keep_descriptors([faults.uffd, *memory.fds])
        engine.arm(faults.uffd, faults.mappings)
        self.background(self._watch_guest())
        self.connection.alive.spawn(self._load_state(link))
        await self.hooks.before(State.PRECOPY)
        self._armed.set()
        await link.send(Ready(memory.page_bytes))
        self.set_state(State.PRECOPY)

    def _make_engine(self, *, recover: bool) -> TargetEngine:
        hello, memory = self.hello, self._memory
        engine = self.engine = TargetEngine(
            memory.pieces, hello.streams, memory.ledger_fd, hello.block_secret, recover=recover
        )
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        return engine

    def _require_engine(self) -> TargetEngine:
        if self.engine is None:
            raise MigratedError("no engine yet: this is a bug")
        return self.engine

    async def _write(self, stage: str) -> None:
        """Write the journal entry; see `TargetEntry` for the stages.  Raises HostError."""
        self._entry.stage = stage
        self._entry.peer = self.record.peer
        await self._recovery_state.write(self._entry)

    async def _load_state(self, link: ControlLink) -> None:
        await self._guest.load_state(link.pipe)
        await self._mapped.wait()
        self._laps.lap("load")
        self._entry.guest = self._guest.memento()
        if await self.hooks.before(State.POSTCOPY):
            self._laps.lap("hook")
        await self._write("loaded")
        await link.send(Loaded())
        self._laps.lap("journal")
        self.log.info("guest state loaded")

    async def _until_commit(self, link: ControlLink) -> None:
        while True:
            message = await link.receive()
            match message:
                case Populated(region=region, first_page=first_page, bits=bits):
                    self._require_engine().populate(region, first_page, bits, POPULATE_THREADS)
                case Round(number=number, dirty_bytes=dirty_bytes):
                    self.record.round = number
                    self.record.remaining_bytes = dirty_bytes
                case Switchover(stale_pages=stale_pages):
                    self._laps.start(time.monotonic())
                    self.record.stale_pages = stale_pages
                case StaleMap(region=region, first_page=first_page, bits=bits):
                    self._require_engine().stale_map(region, first_page, bits)
                case StaleMapEnd():
                    engine = self._require_engine()
                    engine.switchover()
                    self._mapped.set()
                    self.record.stale_bytes = engine.stats().stale_bytes
                    self.set_state(State.SWITCHOVER)  # only now: the guest, which is paused, waits for the map
                case Commit():
                    return
                case Abort(code=code, message=text, hint=hint):
                    raise PeerError(f"{link.peer}: {text}", code=code, hint=hint)
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} before COMMIT")

    # ------------------------------------------------------------ reconnecting

    async def dialled(self, link: ControlLink) -> None:
        """Take a new control link for this session.  It is not started; its first message is a Resume."""
        if self.over:
            await self._answer_late(link)
            return
        former, self._next = self._next, Connection(self, link)
        self._changed.set()
        self.fail(MigratedError(f"{link.peer} dials again", code="reconnected"))
        if former is not None:
            await former.close()

    async def add_stream(self, stream: int, connection: int | Channel) -> None:
        """Take a page connection that showed our token, and own its descriptor or channel."""
        try:
            if self.record.ended:
                raise RemoteProtocolError("a page connection for a session that has ended")
            async with within(STREAM_WAIT_SECONDS, "memory for a page connection"):
                await self._armed.wait()
            if stream != URGENT and stream >= self.hello.streams:
                raise RemoteProtocolError(f"page connection {stream} of {self.hello.streams}")
            engine = self.engine
            if engine is None or not engine.alive or not self.session.connected:
                raise ConnectionLostError("a page connection came without a control connection")
        except BaseException:
            if isinstance(connection, Channel):
                connection.close()
            else:
                os.close(connection)
            raise
        engine.add_stream(stream, connection)

    async def _resume(self, link: ControlLink) -> bool:
        """Send our standing and the lacking pages; return whether we are committed.  The source may abort instead."""
        self.session = self.session.resumed()
        link.start(self.session)
        self.set_state(State.RECOVERING)
        self.record.peer = link.peer
        limit = self._timeouts.handshake
        resume = await link.expect(Resume, limit_seconds=limit, what="the source to resume the session")
        if not resume.committed:
            return False
        state = self.session.standing
        engine = self.engine if self.engine is not None and self.engine.alive else None
        lacking = engine.stats().stale_pages if engine is not None else 0
        self.log.info("the source is back", state=state, lacking_pages=lacking)
        await link.send(Resumed(state, lacking))
        if engine is not None:
            for region, first_page, bits in engine.lacking_maps():
                await link.send(Lacking(region, first_page, bits))
        await link.send(LackingEnd())
        return state != "loaded"

    # ------------------------------------------------------------ after COMMIT

    def _run_here(self) -> None:
        """Run the guest, once.  COMMIT was given: nobody else will ever run it."""
        if self._running is not None:
            return
        if not self.session.guest_may_run_here:
            raise MigratedError("attempt to run the guest before COMMIT: this is a bug")
        if self._unserved is not None:  # it must not run without its fault server: it waits, and everything stays kept
            self._silent = True
            raise FinalError(self._unserved)
        self._laps.lap("commit")
        self._running = self.background(self._run_guest())
        self.background(self._note_commit())

    async def _run_guest(self) -> None:
        """Resume the guest.  Runs beside the flow: the guest's first page may have to wait for a broken network."""
        if not self._ran_before:
            await self._insist(self._guest.resume, "the guest does not run yet", RESUME_PAUSE_SECONDS)
            self._laps.lap("run")
        if self.record.downtime_seconds is None:
            self.record.downtime_seconds = self._laps.total
        self._runs.set()
        self._changed.set()
        self.log.info("the guest runs here")
        self._map_ahead()
        await self._noted.wait()
        if not self._ran_before:
            await log_errors(self._write("running"), self.log, "write the journal")

    def _map_ahead(self) -> None:
        """Start the background CONTINUE.  Not before the guest runs: loading and resuming it need the processors."""
        try:
            self._require_engine().background()
        except MigratedError as problem:  # then current pages are mapped when they are touched
            self.log.warning("cannot map pages ahead", error=str(problem))

    async def _note_commit(self) -> None:
        """Record in the journal that the guest is ours.

        This runs beside the resumption of the guest, which waits for nothing.  Until it is written, a restarted agent
        would ask the source, which would send COMMIT again.  So the source must not receive Done before.
        """
        if not self._ran_before:
            complaint = "the journal does not say yet that the guest is here"
            await self._insist(lambda: self._write("committed"), complaint, NOTE_PAUSE_SECONDS)
        self._noted.set()
        self._changed.set()

    async def _insist(self, act: Callable[[], Awaitable[None]], complaint: str, pause: float) -> None:
        """Try until it succeeds."""
        while True:
            try:
                return await act()
            except Exception as error:  # noqa: BLE001 - COMMIT was given: nobody else will ever do it
                self.log.warning(complaint, error=str(error))
                await asyncio.sleep(pause)

    async def _finish(self) -> None:
        """Release the guest: it no longer needs this agent."""
        self.refresh()
        try:
            await in_thread(self._require_engine().release)
        except MigratedError as problem:
            # Either the guest ended at this very moment, or its memory stays registered with nobody to serve faults.
            # Then everything stays kept, so that a restarted agent serves the guest and tries again.
            if problem.code in GUEST_OVER:
                await self._recovery_state.clear()
                problem = self._ended_early()
            raise FinalError(problem) from problem
        await log_errors(self._guest.release(), self.log, "release the guest")
        if self._released:
            await self._recovery_state.clear()
        else:  # the source has not heard that all pages have arrived, and will ask
            await self._recovery_state.close_entry()
        self.record.error = None
        if self._abandoned:
            error = MigratedError(
                f"abandoned: {self._abandoned} pages of {self.record.guest} never arrived",
                code="abandoned",
                hint="the guest runs here and gets a memory error where it touches one of them",
            )
            self.set_state(State.FAILED, error)
        else:
            self.set_state(State.COMPLETED)

    # ------------------------------------------------------------ giving up

    async def _give_up(self, error: BaseException, connection: Connection) -> None:
        """Remove the guest's process, memory and descriptors; then report that to the source, if it still listens."""
        error = await connection.reason_for(error)
        self.log.warning("migration failed, removing the guest", **log_fields(error))
        if connection.speaking and self.session.abort_allowed:
            with contextlib.suppress(MigratedError):
                await connection.link.send(abort_of(error))
        await self.stop_background()
        gone = await log_errors(self._guest.kill(), self.log, "end the guest process")
        await self._close_memory()
        if gone:
            await self._recovery_state.clear()
        elif await log_errors(self._write("setup"), self.log, "write the journal"):  # the next agent must end it
            await self._recovery_state.release_descriptors()
        if connection.speaking and self.session.may_send(Aborted()):
            with contextlib.suppress(MigratedError):
                await connection.link.send(Aborted())
        self.end_with(error)

    async def _close_memory(self) -> None:
        if self.engine is not None:
            await self.engine.close()
        self._memory.close()

    async def _let_go(self) -> None:
        await self.stop_background()
        if not self.record.ended:
            self.refresh()
        await self._close_memory()
        await self.connection.close()
        self.session.connection_lost()
        self._armed.set()  # page connections that wait for it are now refused
        await log_errors(self._guest.close(), self.log, "close the guest's connections")

    async def _after_the_end(self) -> None:
        if (late := self._next) is not None:
            await log_errors(self._answer_late(late.link), self.log, "answer a source that dialled at the end")

    async def _answer_late(self, link: ControlLink) -> None:
        if self._silent:
            await link.close()
            return
        lost = f"{self.record.guest} was here and has ended: {self._guest_over.message}" if self._guest_over else ""
        all_in, limit = self._all_in and not lost, self._timeouts.handshake
        if await answer(link, self.session, limit_seconds=limit, all_in=all_in, lost=lost):
            await self._recovery_state.clear()

    # ------------------------------------------------------------ recovery after a restart

    async def _take_up(self, recovered: Recovered) -> None:
        """Recover the guest: memory, ledger, faults.  One that cannot be served waits for the next agent."""
        self.record.page_size = max(recovered.entry.page_bytes)
        self.background(self._watch_guest())
        try:
            engine = self._make_engine(recover=True)
            engine.arm(recovered.faults.uffd, recovered.faults.mappings, recovered=True)
        except Exception as error:
            problem = as_migrated_error(error)
            if isinstance(problem, GuestError) and problem.code in GUEST_OVER:
                self._end_of_guest(problem)
                return
            self._unserved = MigratedError(
                f"{self.record.guest} is here, but its faults cannot be served: {problem.message}",
                code=problem.code,
                hint="the guest waits; start the target agent again, which tries again",
            )
            self.log.exception("cannot recover the guest")
            return
        self._mapped.set()
        self._armed.set()
        self.refresh()
        self.log.warning("recovered the guest after a restart of the agent", stage=recovered.entry.stage)

    # ------------------------------------------------------------ watching

    async def _watch_guest(self) -> None:
        how = await self._guest.died()
        text = f"the incoming process of {self.record.guest} {how}"
        self._end_of_guest(GuestError(text, code="guest-died", hint="see its log"))

    def _ended_early(self) -> GuestError:
        """Return the error with which the process ended, if it is known already."""
        text = f"{self.record.guest} ended before it was released from this migration"
        return self._guest_over or GuestError(text, code="guest-died", hint="see its log")

    def _end_of_guest(self, error: GuestError) -> None:
        if self._guest_over is None:
            self._guest_over = error
        self._changed.set()
        self.fail(error)

    def on_engine_event(self, event: Event) -> None:
        """Answer barriers.  Page connections that end when no page is lacking are not a failure."""
        match event:
            case Event(kind=EventKind.BARRIER, value=barrier):
                with contextlib.suppress(MigratedError):
                    self.connection.link.post(BarrierAck(barrier))
                gc.collect(1)  # the switchover may follow: now, and so not while the guest is paused
            case Event(kind=EventKind.ALL_CURRENT):
                self._all_current.set()
                self._changed.set()
            case Event(kind=EventKind.FAILED, error=GuestError() as error) if error.code in GUEST_OVER:
                self._end_of_guest(error)
            case Event(kind=EventKind.STREAM_LOST) if self._all_current.is_set():
                pass
            case _:
                super().on_engine_event(event)

    # ------------------------------------------------------------ verbs

    def abort(self) -> None:
        """Abort the migration; only before Loaded was sent.  Later only the source can."""
        if self.record.ended or not self.session.abort_allowed:
            raise ConflictError(
                f"migration {self.id} is {self.record.state} and cannot be aborted here",
                state=self.record.state.value,
                hint="it has ended"
                if self.record.ended
                else "the guest belongs to this host now: let it finish"
                if self.session.committed
                else "only the source knows whether COMMIT was given: abort it there",
            )
        self.fail(AbortedError(f"migration {self.id} was aborted on the target"))

    async def abandon(self) -> None:
        """Poison the missing pages, since the source is lost for good: the guest gets a memory error on access."""
        self.check_abandon()
        try:
            self._abandoned = await in_thread(self._require_engine().poison_stale)
        except GuestError as error:
            if error.code not in GUEST_OVER:
                raise
            self._end_of_guest(self._ended_early())  # the memory error killed it
            return
        self.log.warning("abandoned", poisoned_pages=self._abandoned)

    def check_abandon(self) -> None:
        """Raise ConflictError unless this is a paused post-copy."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING) or not self.session.committed:
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: only a paused post-copy can be abandoned",
                state=self.record.state.value,
            )

    async def force_run(self) -> None:
        """Run the guest on the operator's word: the source is gone, and only it knew whether it committed."""
        if not self._promised or self.session.committed or self._unserved is not None:
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: no guest waits here for COMMIT",
                state=self.record.state.value,
            )
        await self._write("committed")
        self.log.error("running the guest here on request")
        self._forced = True
        self._changed.set()
        self.fail(MigratedError("decided on request", code="forced"))

    async def discard(self) -> None:
        """End the guest here, whatever the source has said about it."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING):
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: only a guest that waits for its source can be discarded",
                state=self.record.state.value,
            )
        self.log.error("discarded on request")
        self._end_of_guest(GuestError("discarded on request", code="guest-died"))
        await self._guest.kill()

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """Update the record from the engine's counters."""
        if self.engine is not None and self.engine.alive:
            figures.of_target(self.record, self.engine.stats(), self._rates, mapped=self._mapped.is_set())

    def fault_server_alive(self, now_ns: int, limit_ns: int) -> bool:
        """Whether the fault thread has run recently (it runs at least every second)."""
        if self.engine is None or not self.engine.alive or not self._armed.is_set() or self._guest_over is not None:
            return True
        heartbeat = self.engine.stats().fault_thread_heartbeat_ns
        return heartbeat == 0 or now_ns - heartbeat <= limit_ns
