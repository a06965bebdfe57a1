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
from migrated.guests.driver import Region, TargetGuest
from migrated.guests.pidfd import process_started
from migrated.journal import TargetEntry
from migrated.memory.engine import Event, EventKind, TargetEngine
from migrated.migration import Failure, Migration, quietly
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
from migrated.rates import Rates
from migrated.record import Laps, Record, State
from migrated.target import figures
from migrated.target.connection import SourceConnection
from migrated.target.memory import GuestMemory
from migrated.target.reconnect import Reconnect
from migrated.target.rollback import Rollback
from migrated.target.stage import JournalledStage
from migrated.waiting import in_thread

if TYPE_CHECKING:
    from migrated.config import AgentConfig
    from migrated.link import ControlLink
    from migrated.protocol.session import Session
    from migrated.survival import Survival
    from migrated.target.stage import Recovered

#: Zeroing a huge page that was never used takes the hypervisor's time more than ours: two at once pay.
POPULATE_THREADS = 2
#: Codes of errors that say that there is no guest any more.
GUEST_OVER = frozenset({"guest-died", "guest-gone"})
#: Between two tries to run the guest after COMMIT.
RESUME_PAUSE_SECONDS = 0.2


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
                id=hello.session.hex()[:12],
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
        self._rollback = Rollback(self, self.connection, guest, self._memory, survival)
        self._mapped = asyncio.Event()
        self._laps = Laps(self.record.downtime_breakdown)  # from the Switchover message on
        self._guest_over = Failure()  # its process has ended: unlike `failure`, no reconnect mends that
        self._unserved: MigratedError | None = None  # why the guest that was found after a restart cannot be served
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
        faults = await self._guest.start(memory.pieces)  # its own limit: it can say what the guest wrote meanwhile
        # Should we die from here on, the next agent finds the guest, its memory and its faults.
        await self._survival.hold([faults.uffd, *memory.fds])
        entry = self._stage.entry
        entry.pid, entry.pid_started = faults.pid, process_started(faults.pid)
        entry.page_bytes = memory.page_bytes
        await self._stage.write("setup")
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
                    self._mapped.set()
                case Commit():
                    return
                case Abort(code=code, message=text, hint=hint):
                    raise PeerError(f"{self._link.peer}: {text}", code=code, hint=hint)
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} before COMMIT")

    async def _wait_for_word(self, error: BaseException) -> bool:
        """Before COMMIT something failed.  True: COMMIT was given after all (by reconnect); False: all is cleaned up."""
        while self.session.state in (SessionState.LOADED, SessionState.WAITING) and not self._guest_over.is_set:
            self.set_state(State.POSTCOPY_PAUSED, error)
            self.log.warning("the guest is loaded and waits here: only the source knows whether COMMIT was given")
            try:
                await self._guest_over.guard(self._reconnect.once())
                if self.session.committed:  # COMMIT had been read, but not taken, when the connection was lost
                    return True
                await self.failure.guard(self._converse())
            except Exception as again:  # noqa: BLE001 - wait on, or clean up
                error = self.failure.error or again
            if self.session.committed:
                return True
        await self._rollback.run(self._guest_over.error or error)
        return False

    # ------------------------------------------------------------ after COMMIT

    async def _after_commit(self) -> None:
        if self._guest_over.error is not None:  # before it could run here
            await self._lost_guest(self._guest_over.error)
            return
        self._laps.lap("commit")
        engine = self.connection.require_engine()
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
                break
            except Exception as error:  # noqa: BLE001 - after COMMIT every failure means the same: wait for the source
                reason = self._reason(error)
                if isinstance(reason, GuestError) and reason.code in GUEST_OVER:
                    await self._lost_guest(reason)
                    return
                if self.all_current.is_set():
                    break  # nobody is needed any more; a source that asks again is told so
                self.set_state(State.POSTCOPY_PAUSED, reason)
                with contextlib.suppress(GuestError):  # its end, told of above
                    if not await self._guest_over.guard(self._reconnect.until_back_or_all_in()):
                        break
        await self._finish()

    def _reason(self, error: BaseException) -> BaseException:
        """What is to be said of a wait that ended with ``error``."""
        return self._guest_over.error or self.failure.error or error

    async def _lost_guest(self, error: BaseException) -> None:
        """There is nothing any more that a next agent could go on with."""
        await self._survival.over()
        self.set_state(State.FAILED, error)

    async def _run_guest(self) -> None:
        """Run the guest, and go on trying: what it first touches may be a page that waits for a broken network.

        The journal is written beside it: the guest waits for nothing, and until "committed" is written a restarted agent
        would ask the source, which would say COMMIT once more.
        """
        if self._stage.entry.stage != "running":
            noted = self.background(quietly(self._stage.write("committed"), self.log, "write the journal"))
            while True:
                try:
                    await self._guest.resume()
                    break
                except MigratedError as error:
                    self.log.warning("the guest does not run yet", error=str(error))
                    await asyncio.sleep(RESUME_PAUSE_SECONDS)
            self._laps.lap("run")
            await noted
            self.log.info("the guest runs here")
            self.background(quietly(self._stage.write("running"), self.log, "write the journal"))
        if self.record.downtime_seconds is None:
            self.record.downtime_seconds = self._laps.total

    async def _until_current(self, running: asyncio.Task[None]) -> None:
        """Until every page is here; the engine does the work."""
        await asyncio.shield(running)
        if self.session.state is SessionState.COMMITTED:
            await self._link.send(Running())
        if self.session.connected:
            self.set_state(State.POSTCOPY)
        await self.all_current.wait()

    async def _finish(self) -> None:
        """Set the guest free of us."""
        engine = self.connection.require_engine()
        await self.connection.disconnect()
        self.refresh()
        try:
            await in_thread(engine.release)
        except MigratedError as problem:
            # A guest that ended at this very moment.  Anything else leaves it registered with nobody to answer: then what
            # is kept stays kept, so that a restarted agent serves it and tries again.
            if problem.code in GUEST_OVER:
                await self._survival.over()
            self.set_state(State.FAILED, problem)
            return
        await self.set_guest_free(self._guest, self._survival)
        if self._abandoned:
            error = MigratedError(
                f"abandoned: {self._abandoned} pages of {self.record.guest} never arrived",
                code="abandoned",
                hint="the guest runs here and gets a memory error where it touches one of them",
            )
            self.set_state(State.FAILED, error)
        else:
            self.set_state(State.COMPLETED)

    # ------------------------------------------------------------ connections that come later

    async def dialled(self, link: ControlLink) -> None:
        """The agent has a new control link for this session, not started, its first message a Resume."""
        if self.over:
            await self._reconnect.answer_late(link)
        else:
            self._reconnect.dialled(link)

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
        await self._reconnect.answer_those_waiting()

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

    async def abandon(self, confirm: str) -> None:
        """The source is lost for good: what is missing becomes a memory error in the guest."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING) or not self.session.committed:
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: only a paused post-copy can be abandoned",
                state=self.record.state.value,
            )
        if confirm != self.record.guest:
            raise ConflictError(
                f"abandoning {self.id} loses memory of {self.record.guest}: confirm it with the guest's name",
                state=self.record.state.value,
                code="confirm",
                hint=f"`migrated abandon {self.id} --confirm {self.record.guest}`",
            )
        self._abandoned = await in_thread(self.connection.require_engine().poison_stale)
        self.log.error("abandoned", poisoned_pages=self._abandoned)

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
