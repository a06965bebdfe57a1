"""One migration, seen from the target: memory, fault server, guest process, switch-over, and the last page.

until committed   everything that can be undone.  A failure before `Loaded` was sent leads to `_clean_up`: nothing of the
                  guest is left here.  After `Loaded` only the source knows whether COMMIT was given: a lost connection
                  then means waiting for it to come back (state postcopy-paused), with the guest paused and kept.
after COMMIT      the guest runs.  The engine's threads serve its faults whatever happens to this file's tasks; a lost
                  connection makes it wait for the pages that are missing, until the source dials again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import os
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
from migrated.guests.driver import FaultSource, Region, TargetGuest, TargetMemory
from migrated.journal import TargetEntry, process_started
from migrated.link import ControlLink, StatePipe
from migrated.memory import memfd
from migrated.memory.engine import URGENT, Event, EventKind, TargetEngine, ledger_bytes
from migrated.migration import Migration, quietly
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
from migrated.rates import Rates
from migrated.record import Record, State
from migrated.target import figures
from migrated.waiting import in_thread, within

if TYPE_CHECKING:
    from migrated.config import AgentConfig
    from migrated.protocol.session import Session
    from migrated.survival import Survival

#: How long a page connection may wait for the engine it belongs to.
STREAM_WAIT_SECONDS = 10.0
#: Zeroing a huge page that was never used takes the hypervisor's time more than ours: two at once pay.
POPULATE_THREADS = 2
#: Codes of errors that say that there is no guest any more.
GUEST_OVER = frozenset({"guest-died", "guest-gone"})
#: Between two tries to run the guest after COMMIT.
RESUME_PAUSE_SECONDS = 0.2

#: What a target answers a Resume with.
STANDING = {
    SessionState.RESUMING_LOADED: "loaded",
    SessionState.RESUMING_RUNNING: "running",
    SessionState.RESUMING_DONE: "done",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died."""

    entry: TargetEntry
    memory: tuple[TargetMemory, ...]
    ledger_fd: int
    faults: FaultSource


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
        self._reserved = reserve
        self._config = config
        self._timeouts = config.timeouts
        self._survival = survival
        self._legacy = legacy
        self._entry = TargetEntry(hello=hello, stage="setup", peer=self.record.peer, started_at=self.record.started_at)
        self._current_link = link
        self._pipe = StatePipe()
        if link is not None:
            self._pipe.attach(link)
        self._engine: TargetEngine | None = None
        self._memory: tuple[TargetMemory, ...] = ()
        self._ledger_fd = -1
        self._streams_wanted = asyncio.Event()
        self._mapped = asyncio.Event()
        self._reattached: asyncio.Queue[ControlLink] = asyncio.Queue()
        self._paused_at: float | None = None
        self._abandoned = 0  # pages poisoned since their source is lost
        self._rates = Rates()

    def authentic(self, token: bytes) -> bool:
        """Whether a connection shows this session's token."""
        return hmac.compare_digest(token, self.hello.token)

    # ------------------------------------------------------------ the flow

    async def run(self) -> None:
        """The whole migration; ends in a final state, never raises."""
        ticker = asyncio.ensure_future(self.tick())
        try:
            try:
                if self._legacy is not None:
                    await self._recover(self._legacy)
                else:
                    self.background(self._watch_link(self._link))
                    await self.failure.guard(self._until_committed())
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends in a named state
                reason = self.failure.error or error
                if not self.session.committed and not await self._wait_for_word(reason):
                    return
            await self._after_commit()
        except Exception as error:  # noqa: BLE001 - the last resort
            self.fail_unforeseen(error)
        finally:
            ticker.cancel()
            await self._let_go()
            self._over = True
            while not self._reattached.empty():  # dialled while we came to the end, when nobody waited for it any more
                late = self._reattached.get_nowait()
                await quietly(self.answer_late(late), self.log, "answer a source that dialled at the end")

    async def _until_committed(self) -> None:
        hello = self.hello
        regions = tuple(Region(r.name, r.size_bytes, r.page_bytes) for r in hello.regions)
        await self._guest.check(regions)
        self._memory = await self._reserve(regions)
        self.record.page_size = max(piece.region.page_bytes for piece in self._memory)
        self._ledger_fd = os.memfd_create("migrated-ledger", os.MFD_CLOEXEC)
        os.ftruncate(self._ledger_fd, ledger_bytes(self._memory))
        engine = self._engine = TargetEngine(self._memory, hello.streams, self._ledger_fd, hello.block_secret)
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        async with within(self._timeouts.guest_start, f"the incoming process of {hello.guest} to start"):
            faults = await self._guest.start(self._memory)
        # Should we die from here on, the next agent finds the guest, its memory and its faults.
        await self._survival.hold([faults.uffd, self._ledger_fd, *(piece.memory_fd for piece in self._memory)])
        self._entry.pid, self._entry.pid_started = faults.pid, process_started(faults.pid)
        self._entry.page_bytes = tuple(piece.region.page_bytes for piece in self._memory)
        await self._note("setup")
        engine.arm(faults.uffd, faults.mappings)
        self.background(self._watch_guest())
        load = self.background(self._load_state())
        self._streams_wanted.set()
        await self._link.send(Ready(tuple(piece.region.page_bytes for piece in self._memory)))
        self.set_state(State.PRECOPY)
        try:
            await self._converse()
        finally:
            if not self.session.committed:
                load.cancel()

    async def _reserve(self, regions: tuple[Region, ...]) -> tuple[TargetMemory, ...]:
        """A memfd a region, reserved (unless not so wanted) before anything is started; none is left when one fails."""
        fds: list[int] = []
        try:
            memory = []
            for region in regions:
                fd, page_bytes = await in_thread(
                    functools.partial(
                        memfd.reserve,
                        region.size_bytes,
                        self._page_bytes,
                        name=region.name,
                        reserved=self._reserved,
                    ),
                    undo=lambda reserved: os.close(reserved[0]),
                )
                fds.append(fd)
                piece = Region(region.name, region.size_bytes, page_bytes)
                memory.append(TargetMemory(piece, fd, reserve=self._reserved))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return tuple(memory)

    async def _load_state(self) -> None:
        await self._guest.load_state(self._pipe)
        await self._mapped.wait()
        self._entry.guest = self._guest.memento()
        await self._note("loaded")
        await self._link.send(Loaded())
        self.log.info("guest state loaded")

    async def _note(self, stage: str) -> None:
        """Write down how far we are."""
        self._entry.stage = stage
        self._entry.peer = self.record.peer
        await self._survival.write(self._entry)

    async def _recover(self, legacy: Recovered) -> None:
        """Take the guest back from an agent that died: its memory, its ledger, its faults; then go on where that one was."""
        self._entry = legacy.entry
        self._memory, self._ledger_fd = legacy.memory, legacy.ledger_fd
        self.record.page_size = max(legacy.entry.page_bytes)
        hello = self.hello
        engine = self._engine = TargetEngine(
            self._memory, hello.streams, self._ledger_fd, hello.block_secret, recover=True
        )
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        engine.arm(legacy.faults.uffd, legacy.faults.mappings, recovered=True)
        self.background(self._watch_guest())
        self._mapped.set()
        self._streams_wanted.set()
        self.refresh()
        self.log.warning("taken back after a restart of the agent", stage=legacy.entry.stage)
        if not self.session.committed:
            raise ConnectionLostError("the agent was restarted", code="agent-restarted")

    async def _converse(self) -> None:
        """Obey the source until it says COMMIT."""
        engine = self._require_engine()
        while True:
            message = await self._link.receive()
            match message:
                case Populated(region=region, first_page=first_page, bits=bits):
                    engine.populate(region, first_page, bits, POPULATE_THREADS)
                case Round(number=number, dirty_bytes=dirty_bytes):
                    self.record.round = number
                    self.record.remaining_bytes = dirty_bytes
                case Switchover(stale_pages=stale_pages):
                    self._paused_at = time.monotonic()
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
        while self.session.state in (SessionState.LOADED, SessionState.WAITING):
            self.set_state(State.POSTCOPY_PAUSED, error)
            self.log.warning("the guest is loaded and waits here: only the source knows whether COMMIT was given")
            try:
                await self._reattach()
                await self.failure.guard(self._converse())
            except Exception as again:  # noqa: BLE001 - wait on, or clean up
                error = self.failure.error or again
            if self.session.committed:
                return True
        await self._clean_up(error)
        return False

    # ------------------------------------------------------------ after COMMIT

    async def _after_commit(self) -> None:
        engine = self._require_engine()
        running = self.background(self._run_guest())
        engine.background()
        while True:
            try:
                await self.failure.guard(self._until_current(running))
                if self.session.state is SessionState.POSTCOPY:
                    await self._link.send(Done())
                    with contextlib.suppress(MigratedError):
                        await self._link.expect(Released, limit_seconds=self._timeouts.release, what="the farewell")
                break
            except Exception as error:  # noqa: BLE001 - after COMMIT every failure means the same: wait for the source
                reason = self.failure.error or error
                if isinstance(reason, GuestError) and reason.code in GUEST_OVER:
                    await self._survival.over()
                    self.set_state(State.FAILED, reason)
                    return
                if self._all_in():
                    break  # nobody is needed any more; a source that asks again is told so
                self.set_state(State.POSTCOPY_PAUSED, reason)
                if not await self._reattach_or_all_in():
                    break
        await self._finish()

    async def _run_guest(self) -> None:
        """Run the guest, and go on trying: what it first touches may be a page that waits for a broken network.

        The journal is written beside it: the guest waits for nothing, and until "committed" is written a restarted agent
        would ask the source, which would say COMMIT once more.
        """
        if self._entry.stage != "running":
            noted = self.background(quietly(self._note("committed"), self.log, "write the journal"))
            while True:
                try:
                    await self._guest.resume()
                    break
                except MigratedError as error:
                    self.log.warning("the guest does not run yet", error=str(error))
                    await asyncio.sleep(RESUME_PAUSE_SECONDS)
            await noted
            self.log.info("the guest runs here")
            self.background(quietly(self._note("running"), self.log, "write the journal"))
        if self._paused_at is not None and self.record.downtime_seconds is None:
            self.record.downtime_seconds = time.monotonic() - self._paused_at

    async def _until_current(self, running: asyncio.Task[None]) -> None:
        """Until every page is here and mapped; the engine does the work."""
        await asyncio.shield(running)
        if self.session.state is SessionState.COMMITTED:
            await self._link.send(Running())
        if self.session.connected:
            self.set_state(State.POSTCOPY)
        await self.all_current.wait()
        await self.all_mapped.wait()

    def _all_in(self) -> bool:
        return self.all_current.is_set() and self.all_mapped.is_set()

    async def _finish(self) -> None:
        """Set the guest free of us."""
        engine = self._require_engine()
        await self._close_link()
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
        await quietly(self._guest.release(), self.log, "release the guest")
        await self._survival.over()
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

    # ------------------------------------------------------------ reconnect

    def reattach(self, link: ControlLink) -> None:
        """The agent has a new control connection for this session, its first message a Resume."""
        self._reattached.put_nowait(link)
        self.failure.set(MigratedError(f"{link.peer} dials again", code="reconnected"))

    async def _reattach_or_all_in(self) -> bool:
        """Wait for the source; False when nobody is needed any more: the last page was in, or the rest was abandoned."""

        async def all_in() -> None:
            await self.all_current.wait()
            await self.all_mapped.wait()

        back = asyncio.ensure_future(self._reattach_forever())
        enough = asyncio.ensure_future(all_in())
        try:
            await asyncio.wait({back, enough}, return_when=asyncio.FIRST_COMPLETED)
            if back.done():
                back.result()
            return back.done()
        finally:
            for task in (back, enough):
                task.cancel()
            await asyncio.wait({back, enough})

    async def _reattach_forever(self) -> None:
        while True:
            try:
                await self._reattach()
            except Exception as error:  # noqa: BLE001 - the next connection may do better
                self.log.warning("reconnect failed", error=str(error))
                if self.record.state is State.RECOVERING:
                    self.set_state(State.POSTCOPY_PAUSED, error)
            else:
                return

    async def _close_link(self) -> None:
        if self._engine is not None and self._engine.alive:
            await in_thread(self._engine.drop_streams)
        if self._current_link is not None:
            await self._current_link.close()
        self.session.connection_lost()

    async def _reattach(self) -> None:
        """Wait for the source to dial; tell it where we stand and what is lacking."""
        await self._close_link()
        link = await self._reattached.get()
        while not self._reattached.empty():
            await link.close()
            link = self._reattached.get_nowait()
        self.failure.clear()
        self.set_state(State.RECOVERING)
        self._current_link = link
        self.record.peer = link.peer
        self.session.reconnected()
        self._pipe.attach(link)
        link.start()
        self.background(self._watch_link(link))
        limit = self._timeouts.handshake
        resume = await link.expect(Resume, limit_seconds=limit, what="the source to resume the session")
        if not resume.committed:
            return  # Abort follows
        await self._tell_standing(link)

    async def _tell_standing(self, link: ControlLink) -> None:
        """Answer Resume."""
        state = STANDING[self.session.state]
        engine = self._engine if self._engine is not None and self._engine.alive else None
        lacking = engine.stats().stale_pages if engine is not None else 0
        self.log.info("the source is back", state=state, lacking_pages=lacking)
        await link.send(Resumed(state, lacking))
        if engine is not None:
            for region, first_page, bits in engine.lacking_maps():
                await link.send(Lacking(region, first_page, bits))
        await link.send(LackingEnd())

    async def answer_late(self, link: ControlLink) -> None:
        """A source that missed the end asks again: tell it how this ended."""
        self.session.connection_lost()
        self.session.reconnected()
        link.start()
        try:
            limit = self._timeouts.handshake
            resume = await link.expect(Resume, limit_seconds=limit, what="the source to resume the session")
            # It may have completed without a source to say Done to: then that is said now.
            if resume.committed and self.record.state is State.COMPLETED and self.session.state in STANDING:
                await self._tell_standing(link)
                if self.session.may_send(Done()):
                    await link.send(Done())
                await link.expect(Released, limit_seconds=limit, what="the farewell")
            elif self.session.may_send(Aborted()):
                await link.send(Aborted())
            elif not resume.committed:
                async with within(limit, "the source's Abort"):
                    await link.receive(after_abort=True)
                await link.send(Aborted())
            else:
                await link.send(Abort("unknown-session", "nothing of this guest is left here"))
        finally:
            await link.close()
            self.session.connection_lost()

    async def add_stream(self, stream: int, fd: int) -> None:
        """A page connection that showed our token; the descriptor is ours now."""
        try:
            async with within(STREAM_WAIT_SECONDS, "memory for a page connection"):
                await self._streams_wanted.wait()
            if stream != URGENT and stream >= self.hello.streams:
                raise RemoteProtocolError(f"page connection {stream} of {self.hello.streams}")
            engine = self._require_engine()
            if not engine.alive:
                raise ConnectionLostError("a page connection came when the migration was over")
        except MigratedError:
            os.close(fd)
            raise
        engine.add_stream(stream, fd)

    # ------------------------------------------------------------ the end before COMMIT

    async def _clean_up(self, error: BaseException) -> None:
        """No process, memory or descriptor of this guest stays here; then the source is told so."""
        link = self._current_link
        if link is not None:
            error = await link.explained(error)
        self.log.warning("giving up", error=str(error))
        reason = named(error)
        if link is not None and link.broken is None and self.session.abort_allowed:
            with contextlib.suppress(MigratedError):
                await link.send(abort_of(reason))
        await self._release_everything()
        if link is not None and link.broken is None and self.session.may_send(Aborted()):
            with contextlib.suppress(MigratedError):
                await link.send(Aborted())
        asked = reason.code == AbortedError.default_code
        self.set_state(State.ABORTED if asked else State.FAILED, error)

    async def _release_everything(self) -> None:
        await self.stop_background()
        await quietly(self._guest.kill(), self.log, "end the guest process")
        await self._let_go_of_memory()
        await self._survival.over()

    async def _let_go_of_memory(self) -> None:
        if self._engine is not None:
            await self._engine.close()
        for piece in self._memory:
            os.close(piece.memory_fd)
        self._memory = ()
        if self._ledger_fd >= 0:
            os.close(self._ledger_fd)
            self._ledger_fd = -1

    async def _let_go(self) -> None:
        await self.stop_background()
        if not self.record.ended:
            self.refresh()
        await self._let_go_of_memory()
        if self._current_link is not None:
            await self._current_link.close()
        self.session.connection_lost()
        await quietly(self._guest.close(), self.log, "close the guest's connections")

    # ------------------------------------------------------------ watching

    async def _watch_guest(self) -> None:
        how = await self._guest.died()
        self.failure.set(
            GuestError(f"the incoming process of {self.record.guest} {how}", code="guest-died", hint="see its log")
        )

    async def _watch_link(self, link: ControlLink) -> None:
        error = await link.wait_lost()
        if link is self._current_link:
            self.failure.set(error)

    def on_engine_event(self, event: Event) -> None:
        """Barriers are answered; page connections that end when nothing is lacking are no failure."""
        if event.kind is EventKind.BARRIER:
            self.background(self._acknowledge(event.value))
        elif event.kind is not EventKind.STREAM_LOST or not self.all_current.is_set():
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
        self._abandoned = await in_thread(self._require_engine().poison_stale)
        self.log.error("abandoned", poisoned_pages=self._abandoned)

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """From the engine's counters."""
        engine = self._engine
        if engine is None or not engine.alive:
            return
        figures.update(self.record, engine.stats(), self._rates, mapped=self._mapped.is_set())

    def fault_server_alive(self, now_ns: int, limit_ns: int) -> bool:
        """Whether the fault thread has turned lately (it does at least every second)."""
        if self._engine is None or not self._engine.alive or not self._streams_wanted.is_set():
            return True
        if self.failure.error is not None and named(self.failure.error).code in GUEST_OVER:
            return True  # the thread has ended with the guest
        heartbeat = self._engine.stats().fault_thread_heartbeat_ns
        return heartbeat == 0 or now_ns - heartbeat <= limit_ns

    @property
    def _link(self) -> ControlLink:
        if self._current_link is None:
            raise ConnectionLostError("the source has not dialled yet")
        return self._current_link

    def _require_engine(self) -> TargetEngine:
        if self._engine is None:
            raise MigratedError("no engine yet: this is a bug")
        return self._engine
