"""One migration, seen from the target: memory, fault server, guest process, switch-over, and the last page.

until committed   everything that can be undone.  A failure before `Loaded` was sent leads to rollback.py: nothing of the
                  guest is left here.  After `Loaded` only the source knows whether COMMIT was given: a lost connection
                  then means waiting for it to come back (state postcopy-paused), with the guest paused and kept.
after COMMIT      the guest runs.  The engine's threads serve its faults whatever happens to our tasks; a lost connection
                  makes it wait for the pages that are missing, until the source dials again (reconnect.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from typing import TYPE_CHECKING

from migrated.agent.migration import Failure, Migration, quietly
from migrated.agent.rates import Rates
from migrated.agent.record import Laps, Record, State, id_of
from migrated.errors import (
    AbortedError,
    ConflictError,
    ConnectionLostError,
    GuestError,
    MigratedError,
    PeerError,
    RemoteProtocolError,
    named,
)
from migrated.guests.access.pidfd import process_started
from migrated.guests.driver import TargetGuest
from migrated.memory.engine import Event, EventKind, TargetEngine
from migrated.memory.regions import Region
from migrated.protocol.messages import (
    Abort,
    BarrierAck,
    Commit,
    Done,
    Hello,
    Loaded,
    Populated,
    Ready,
    Released,
    Round,
    Running,
    StaleMap,
    StaleMapEnd,
    Switchover,
)
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import TargetEntry
from migrated.target import figures
from migrated.target.connection import SourceConnection
from migrated.target.memory import GuestMemory
from migrated.target.reconnect import Reconnect
from migrated.target.rollback import Rollback
from migrated.target.stage import JournalledStage
from migrated.waiting import in_thread

if TYPE_CHECKING:
    from migrated.config import AgentConfig
    from migrated.link.control_link import ControlLink
    from migrated.protocol.session import Session
    from migrated.recovery.state import Survival
    from migrated.target.stage import Recovered

#: Zeroing a huge page that was never used takes the hypervisor's time more than ours: two at once pay.
POPULATE_THREADS = 2
#: Codes of errors that say that there is no guest any more.
GUEST_OVER = frozenset({"guest-died", "guest-gone"})
#: Between two tries to run the guest after COMMIT.
RESUME_PAUSE_SECONDS = 0.2
#: Between two tries to write to the journal that COMMIT was given.
NOTE_PAUSE_SECONDS = 1.0


class TargetMigration(Migration):
    """Construct with the Hello, then `run` once."""

    role = "target"

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
        survival: Survival[TargetEntry],
        legacy: Recovered | None = None,
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
                state=State.SETUP if legacy is None else State.POSTCOPY_PAUSED,
            )
        )
        self.hello = hello
        self.session = session
        self._guest = guest
        self._page_bytes = page_bytes
        self._reserve = reserve
        self._timeouts = config.timeouts
        self._survival = survival
        self._legacy = legacy
        if legacy is not None:
            entry, self._memory = legacy.entry, legacy.memory
        else:
            entry = TargetEntry(hello=hello, stage="setup", peer=self.record.peer, started_at=self.record.started_at)
            self._memory = GuestMemory()
        self._stage = JournalledStage(survival, entry, self.record)
        self.connection = SourceConnection(self, session, link, bulk_streams=hello.streams)
        self._reconnect = Reconnect(self, self.connection, config.timeouts)
        self._rollback = Rollback(self, self.connection, guest, self._memory, self._stage)
        self._mapped = asyncio.Event()
        self._laps = Laps(self.record.downtime_breakdown)  # from the Switchover message on
        self._guest_over = Failure()  # its process has ended: unlike `failure`, no reconnect mends that
        self._decided = Failure()  # somebody has decided to run the guest here, in the place of a source that is gone
        self._unserved: MigratedError | None = None  # why the guest that was found after a restart cannot be served
        self._ran_before = entry.stage == "running"  # it was run by an agent before us
        self._noted: asyncio.Task[None] | None = None
        self._released = False  # the source has heard that all is in
        self._abandoned = 0  # pages poisoned since their source is lost
        self._rates = Rates()

    def authentic(self, token: bytes) -> bool:
        """Whether a connection shows this session's token."""
        return hmac.compare_digest(token, self.hello.token)

    # ------------------------------------------------------------ the flow

    async def _migrate(self) -> None:
        try:
            if self._legacy is not None:
                await self._take_up(self._legacy)
            else:
                self.connection.watch(self._link)
                await self.failure.guard(self._until_committed())
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends in a named state
            reason = self.failure.error or error
            if not self.session.committed and not await self._wait_for_word(reason):
                return
        if self._unserved is None:
            await self._after_commit()
        else:  # a guest must not run without its fault server: it waits, and what is kept for the next agent stays kept
            self._reconnect.silent = True
            self.set_state(State.FAILED, self._unserved)

    async def _until_committed(self) -> None:
        hello = self.hello
        regions = tuple(Region(r.name, r.size_bytes, r.page_bytes, r.device) for r in hello.regions)
        await self._guest.check(regions, hello.description)
        memory = self._memory
        await memory.allocate(regions, self._page_bytes, reserve=self._reserve)
        self.record.page_size = max(memory.page_bytes)
        engine = self._make_engine(recover=False)
        entry = self._stage.entry
        entry.page_bytes, entry.memory_inodes = memory.page_bytes, memory.inodes
        await self._stage.write("setup")  # should we die from here on, the next agent finds a process by its memory
        faults = await self._guest.start(memory.pieces)  # its own limit: it can say what the guest wrote meanwhile
        entry.pid, entry.pid_started = faults.pid, process_started(faults.pid)
        await self._stage.write("setup")
        # Only now: a process that holds the memory is the guest's, as long as the journal names none.
        await self._survival.hold([faults.uffd, *memory.fds])
        engine.arm(faults.uffd, faults.mappings)
        self.background(self._watch_guest())
        load = self.background(self._load_state())
        self.connection.streams_wanted.set()
        await self._link.send(Ready(memory.page_bytes))
        self.set_state(State.PRECOPY)
        try:
            await self._converse()
        finally:
            if not self.session.committed:
                load.cancel()

    def _make_engine(self, *, recover: bool) -> TargetEngine:
        hello, memory = self.hello, self._memory
        engine = self.connection.engine = TargetEngine(
            memory.pieces, hello.streams, memory.ledger_fd, hello.block_secret, recover=recover
        )
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        return engine

    async def _load_state(self) -> None:
        await self._guest.load_state(self.connection.pipe)
        await self._mapped.wait()
        self._laps.lap("load")
        self._stage.entry.guest = self._guest.memento()
        await self._stage.write("loaded")
        await self._link.send(Loaded())
        self._laps.lap("journal")
        self.log.info("guest state loaded")

    async def _recover(self, legacy: Recovered) -> None:
        """Take the guest back from an agent that died: its memory, its ledger, its faults; then go on where that one was."""
        self.record.page_size = max(legacy.entry.page_bytes)
        self.background(self._watch_guest())
        engine = self._make_engine(recover=True)
        engine.arm(legacy.faults.uffd, legacy.faults.mappings, recovered=True)
        self._mapped.set()
        self.connection.streams_wanted.set()
        self.refresh()
        self.log.warning("taken back after a restart of the agent", stage=legacy.entry.stage)

    async def _take_up(self, legacy: Recovered) -> None:
        """`_recover`; a guest that cannot be served is noted.  Raises before COMMIT: the source must be waited for."""
        try:
            await self._recover(legacy)
        except Exception as error:
            problem = named(error)
            if isinstance(problem, GuestError) and problem.code in GUEST_OVER:
                self._guest_over.set(problem)
            else:
                self._unserved = MigratedError(
                    f"{self.record.guest} is here and its faults cannot be served: {problem.message}",
                    code=problem.code,
                    hint="the guest waits; start the target agent again, which tries again",
                )
                self.log.exception("not taken back")
        if not self.session.committed:
            raise self._unserved or ConnectionLostError("the agent was restarted", code="agent-restarted")

    async def _converse(self) -> None:
        """Obey the source until it says COMMIT."""
        engine = self.connection.require_engine()
        while True:
            message = await self._link.receive()
            match message:
                case Populated(region=region, first_page=first_page, bits=bits):
                    engine.populate(region, first_page, bits, POPULATE_THREADS)
                case Round(number=number, dirty_bytes=dirty_bytes):
                    self.record.round = number
                    self.record.remaining_bytes = dirty_bytes
                case Switchover(stale_pages=stale_pages):
                    self._laps.start(time.monotonic())
                    self.record.stale_pages = stale_pages
                    self.set_state(State.SWITCHOVER)
                case StaleMap(region=region, first_page=first_page, bits=bits):
                    engine.stale_map(region, first_page, bits)
                case StaleMapEnd():
                    engine.switchover()
                    self.record.stale_bytes = engine.stats().stale_bytes
                    self._mapped.set()
                case Commit():
                    return
                case Abort(code=code, message=text, hint=hint):
                    raise PeerError(f"{self._link.peer}: {text}", code=code, hint=hint)
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} before COMMIT")

    async def _wait_for_word(self, error: BaseException) -> bool:
        """Before COMMIT something failed.  True: COMMIT was given after all (by reconnect); False: all is cleaned up."""
        while self.session.bound and not self._guest_over.is_set:
            self.set_state(State.POSTCOPY_PAUSED, error)
            self.log.warning("the guest is loaded and waits here: only the source knows whether COMMIT was given")
            try:
                await self._decided.guard(self._guest_over.guard(self._reconnect.once()))
                if self.session.committed:  # COMMIT had been read, but not taken, when the connection was lost
                    return True
                await self._decided.guard(self.failure.guard(self._converse()))
            except Exception as again:  # noqa: BLE001 - wait on, or clean up
                error = self.failure.error or again
            if self._decided.is_set and self.session.bound:
                await self.connection.disconnect()
                self.session.commit_by_hand()
            if self.session.committed:
                return True
        if self._guest_over.error is not None:
            self._note_lost(self._guest_over.error)
        await self._rollback.run(self._guest_over.error or error)
        return False

    # ------------------------------------------------------------ after COMMIT

    async def _after_commit(self) -> None:
        if self._guest_over.error is not None:  # before it could run here
            await self._lost_guest(self._guest_over.error)
            return
        self._laps.lap("commit")
        engine = self.connection.require_engine()
        self._noted = self.background(self._note_commit())
        running = self.background(self._run_guest())
        engine.background()
        while True:
            try:
                if self._guest_over.error is not None:
                    raise self._guest_over.error
                await self.failure.guard(self._until_current(running))
                if self.session.state is SessionState.POSTCOPY:
                    await self._link.send(Done())
                    with contextlib.suppress(MigratedError):
                        await self._link.expect(Released, limit_seconds=self._timeouts.release, what="the farewell")
                        self._released = True
                break
            except Exception as error:  # noqa: BLE001 - after COMMIT every failure means the same: wait for the source
                reason = self._reason(error)
                if isinstance(reason, GuestError) and reason.code in GUEST_OVER:
                    await self._lost_guest(reason)
                    return
                if running.done() and self._noted.done() and self.all_current.is_set():
                    break  # nobody is needed any more; a source that asks again is told so
                self.set_state(State.POSTCOPY_PAUSED, reason)
                with contextlib.suppress(GuestError):  # its end, told of above
                    if not await self._guest_over.guard(self._reconnect.until_back_or(self._until_all_in(running))):
                        break
        await self._finish()

    def _reason(self, error: BaseException) -> BaseException:
        """What is to be said of a wait that ended with ``error``."""
        return self._guest_over.error or self.failure.error or error

    async def _lost_guest(self, error: BaseException) -> None:
        """There is nothing any more that a next agent could go on with."""
        self._note_lost(error)
        gone = await quietly(self._guest.kill(), self.log, "see the guest process end")
        await self._stage.end(gone=gone)
        self.set_state(State.FAILED, error)

    def _note_lost(self, error: BaseException) -> None:
        """What a source is told that asks for the guest."""
        self._reconnect.lost = f"{self.record.guest} was here and has ended: {named(error).message}"

    async def _run_guest(self) -> None:
        """Run the guest, and go on trying: what it first touches may be a page that waits for a broken network."""
        if not self._ran_before:
            while True:
                try:
                    await self._guest.resume()
                    break
                except Exception as error:  # noqa: BLE001 - COMMIT was given: nobody else will ever run it
                    self.log.warning("the guest does not run yet", error=str(error))
                    await asyncio.sleep(RESUME_PAUSE_SECONDS)
            self._laps.lap("run")
            self.log.info("the guest runs here")
            self.background(self._note_run())
        if self.record.downtime_seconds is None:
            self.record.downtime_seconds = self._laps.total

    async def _until_current(self, running: asyncio.Task[None]) -> None:
        """Until every page is here; the engine does the work."""
        await asyncio.shield(running)
        if self.session.state is SessionState.COMMITTED:
            await self._link.send(Running())
        if self.session.connected:
            self.set_state(State.POSTCOPY)
        await self._until_all_in(running)

    async def _until_all_in(self, running: asyncio.Task[None]) -> None:
        """Until the guest runs and needs nobody any more."""
        await asyncio.shield(running)
        await self.all_current.wait()
        if self._noted is not None:
            await asyncio.shield(self._noted)

    async def _note_commit(self) -> None:
        """Have the journal say that the guest is ours, and go on trying.

        This runs beside the guest's start, which waits for nothing.  Until it is written a restarted agent would ask the
        source, which would say COMMIT once more: so the source is not told Done before.
        """
        if self._ran_before:
            return
        while True:
            try:
                await self._stage.write("committed")
                return
            except MigratedError as error:
                self.log.warning("the journal does not say yet that the guest is here", error=str(error))
                await asyncio.sleep(NOTE_PAUSE_SECONDS)

    async def _note_run(self) -> None:
        if self._noted is not None:
            await asyncio.shield(self._noted)
        await quietly(self._stage.write("running"), self.log, "write the journal")

    async def _finish(self) -> None:
        """Set the guest free of us."""
        engine = self.connection.require_engine()
        await self.connection.disconnect()
        self.refresh()
        self._reconnect.all_in = True
        try:
            await in_thread(engine.release)
        except MigratedError as problem:
            # A guest that ended at this very moment.  Anything else leaves it registered with nobody to answer: then what
            # is kept stays kept, so that a restarted agent serves it and tries again.
            if problem.code in GUEST_OVER:
                await self._survival.over()
            self.set_state(State.FAILED, problem)
            return
        await quietly(self._guest.release(), self.log, "release the guest")
        await self._leave_word()
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

    async def _leave_word(self) -> None:
        """A next agent need not keep anything, but for the word that all is in: a source that has not heard it will ask."""
        if self._released:
            await self._survival.over()
        else:
            await self._survival.leave_word()

    # ------------------------------------------------------------ connections that come later

    async def dialled(self, link: ControlLink) -> None:
        """The agent has a new control link for this session, not started, its first message a Resume."""
        if not self.over:
            self._reconnect.dialled(link)
        elif await self._reconnect.answer_late(link):
            await self._survival.over()

    # ------------------------------------------------------------ the end

    async def _let_go(self) -> None:
        await self.stop_background()
        if not self.record.ended:
            self.refresh()
        await self.connection.close_engine()
        self._memory.close()
        await self.connection.close_link()
        self.session.connection_lost()
        await quietly(self._guest.close(), self.log, "close the guest's connections")

    async def _after_the_end(self) -> None:
        while (late := self._reconnect.waiting()) is not None:
            await quietly(self.dialled(late), self.log, "answer a source that dialled at the end")

    # ------------------------------------------------------------ watching

    async def _watch_guest(self) -> None:
        how = await self._guest.died()
        error = GuestError(f"the incoming process of {self.record.guest} {how}", code="guest-died", hint="see its log")
        self._guest_over.set(error)
        self.failure.set(error)

    def on_engine_event(self, event: Event) -> None:
        """Barriers are answered; page connections that end when nothing is lacking are no failure."""
        if event.kind is EventKind.BARRIER:
            self.background(self._acknowledge(event.value))
            return
        if event.kind is EventKind.FAILED and isinstance(event.error, GuestError) and event.error.code in GUEST_OVER:
            self._guest_over.set(event.error)
        if event.kind is not EventKind.STREAM_LOST or not self.all_current.is_set():
            super().on_engine_event(event)

    async def _acknowledge(self, barrier: int) -> None:
        with contextlib.suppress(MigratedError):
            await self._link.send(BarrierAck(barrier))

    # ------------------------------------------------------------ verbs

    def abort(self) -> None:
        """Before Loaded was sent, by ourselves; later only the source can."""
        if self.record.ended or not self.session.abort_allowed:
            raise ConflictError(
                f"migration {self.id} is {self.record.state} and cannot be aborted here",
                state=self.record.state.value,
                hint="it is over"
                if self.record.ended
                else "the guest belongs to this host now: let it finish"
                if self.session.committed
                else "only the source knows whether COMMIT was given: abort it there",
            )
        self.failure.set(AbortedError(f"migration {self.id} was aborted on the target"))

    async def abandon(self) -> None:
        """The source is lost for good: what is missing becomes a memory error in the guest."""
        self.check_abandon()
        self._abandoned = await in_thread(self.connection.require_engine().poison_stale)
        self.log.error("abandoned", poisoned_pages=self._abandoned)

    def check_abandon(self) -> None:
        """ConflictError where nothing is missing for good."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING) or not self.session.committed:
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: only a paused post-copy can be abandoned",
                state=self.record.state.value,
            )

    async def force_run(self) -> None:
        """The source is gone, and with it the word whether COMMIT was given: run the guest."""
        if not self.session.bound or self._unserved is not None or self._guest_over.is_set:
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: no guest waits here for COMMIT",
                state=self.record.state.value,
            )
        await self._stage.write("committed")
        self.log.error("the guest is made to run here on request")
        self._decided.set(MigratedError("decided on request", code="forced"))

    async def discard(self) -> None:
        """The guest is not to run here, whatever the source has said of it."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING):
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: only a guest that waits for its source can be discarded",
                state=self.record.state.value,
            )
        self.log.error("discarded on request")
        self._guest_over.set(GuestError("discarded on request", code="guest-died"))
        await self._guest.kill()

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """From the engine's counters."""
        engine = self.connection.engine
        if engine is None or not engine.alive:
            return
        figures.update(self.record, engine.stats(), self._rates, mapped=self._mapped.is_set())

    def fault_server_alive(self, now_ns: int, limit_ns: int) -> bool:
        """Whether the fault thread has turned lately (it does at least every second)."""
        engine = self.connection.engine
        if engine is None or not engine.alive or not self.connection.streams_wanted.is_set():
            return True
        if self._guest_over.is_set or (self.failure.error is not None and named(self.failure.error).code in GUEST_OVER):
            return True  # the thread has ended with the guest
        heartbeat = engine.stats().fault_thread_heartbeat_ns
        return heartbeat == 0 or now_ns - heartbeat <= limit_ns

    @property
    def _link(self) -> ControlLink:
        return self.connection.require_link()
