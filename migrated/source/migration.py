"""One migration, seen from the source: pre-copy, switch-over, commit, and serving what is still stale.

The order of things is what keeps the guest safe, so the flow is written down in one place, `SourceMigration.run`:

    until loaded   everything that can be undone.  Any failure cancels it and leads to `_give_up`: the guest runs on here.
    COMMIT         one message.  `Session.committed` turns true before its first byte leaves, and from then on nothing in
                   this file may make the guest run here.
    until done     only serving.  Any failure pauses it; `_reconnect` goes on from what the target says it lacks.

Waiting is done under `Failure.guard`: the engine's threads, the connection and the guest's process each report into one
`Failure`, and the first one ends whatever is being waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING

from migrated import __version__
from migrated.dialing import Dialer
from migrated.errors import (
    AbortedError,
    ConflictError,
    GuestError,
    MigratedError,
    PeerError,
    TimeoutExceededError,
    named,
)
from migrated.journal import SourceEntry, process_started
from migrated.link import ControlLink, StatePipe
from migrated.memory.engine import URGENT, Event, EventKind, SourceEngine
from migrated.memory.native import lib
from migrated.memory.tracker import Tracker
from migrated.migration import Migration, quietly
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import (
    PROTOCOL_VERSION,
    Aborted,
    Commit,
    Done,
    Hello,
    Lacking,
    LackingEnd,
    Loaded,
    Ready,
    RegionInfo,
    Released,
    Resume,
    Resumed,
    Running,
    StaleMap,
    StaleMapEnd,
    Switchover,
)
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.protocol.transitions import State as SessionState
from migrated.rates import Rates
from migrated.record import Record, State
from migrated.source import figures
from migrated.source.precopy import PreCopy
from migrated.waiting import in_thread, within

#: Of zstd: the fastest that still finds what a guest's memory repeats.
COMPRESSION_LEVEL = 1

if TYPE_CHECKING:
    from migrated.address import Address
    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest, SourceMemory
    from migrated.source.options import Options
    from migrated.survival import Survival


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died: the entry and, after COMMIT, the frozen memory."""

    entry: SourceEntry
    memory: SourceMemory

    @property
    def committed(self) -> bool:
        """Whether COMMIT was sent, or may have been."""
        return self.entry.stage == "committed"

    def session(self) -> Session:
        """The session as it stood."""
        state = SessionState.PAUSED if self.committed else SessionState.UNSETTLED
        ready = Ready(self.entry.page_bytes) if self.entry.page_bytes else None
        return Session(Role.SOURCE, state=state, hello=self.entry.hello, ready=ready)


class SourceMigration(Migration):
    """Construct, then `run` once; the verbs may be called meanwhile."""

    role = "source"

    def __init__(
        self,
        *,
        guest_name: str,
        driver: str,
        guest: SourceGuest,
        options: Options,
        config: AgentConfig,
        session_id: bytes,
        survival: Survival[SourceEntry],
        legacy: Recovered | None = None,
    ) -> None:
        self.session_id = session_id
        super().__init__(
            Record(
                id=self.session_id.hex()[:12],
                guest=guest_name,
                role=self.role,
                mode=options.mode,
                peer=str(options.target),
                driver=driver,
                max_bandwidth_bytes_per_second=options.max_bandwidth,
                state=State.POSTCOPY_PAUSED if legacy is not None and legacy.committed else State.SETUP,
            )
        )
        self.options = options
        self._guest = guest
        self._config = config
        self._timeouts = config.timeouts
        self._survival = survival
        self._legacy = legacy
        self._entry = legacy.entry if legacy is not None else None
        self._token = legacy.entry.hello.token if legacy is not None else os.urandom(32)
        self._secret = legacy.entry.hello.block_secret if legacy is not None else os.urandom(lib.MGD_SECRET_BYTES)
        self._session = legacy.session() if legacy is not None else Session(Role.SOURCE)
        self._dialer = Dialer(options.target, session_id=self.session_id, token=self._token, timeouts=config.timeouts)
        self._link: ControlLink | None = None
        self._pipe = StatePipe()
        self._engine: SourceEngine | None = None
        self._tracker: Tracker | None = None
        self._memory: SourceMemory | None = None
        self._paused_at = 0.0
        self._released = False
        self._running_there = False
        self._all_there = False
        self._switch_now = asyncio.Event()
        self._reconnect_now = asyncio.Event()
        self._rates = Rates()

    # ------------------------------------------------------------ the flow

    async def run(self) -> None:
        """The whole migration; ends in a final state, never raises."""
        ticker = asyncio.ensure_future(self.tick())
        try:
            if self._legacy is not None:
                await self._go_on(self._legacy)
                return
            try:
                await self.failure.guard(self._until_loaded())
                await self._note("committed")
                if self.failure.error is not None:  # while that was written
                    raise self.failure.error
                await self._require_link().send(Commit())
            except Exception as error:  # noqa: BLE001 - whatever it is, the guest must be brought to a safe place
                if not self._session.committed:
                    await self._give_up(self.failure.error or error)
                    return
                self.failure.set(error)
            await self._after_commit()
        except Exception as error:  # noqa: BLE001 - the last resort
            self.fail_unforeseen(error)
        finally:
            ticker.cancel()
            await self._let_go()
            self._over = True

    async def _until_loaded(self) -> None:
        """Everything before COMMIT."""
        self._memory = memory = await self._guest.open()
        self.record.total_bytes = sum(region.size_bytes for region in memory.regions)
        self.background(self._watch_guest())
        host_pages = await self._greet(memory)
        engine = self._engine = SourceEngine(memory, host_pages, self.options.streams, self._secret)
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        if self.options.compression != "off":
            engine.set_compression(COMPRESSION_LEVEL)
        await self._open_streams()
        self.set_state(State.PRECOPY)
        precopy = await self._track(memory, engine)
        finish = await precopy.run() if self.options.mode != "postcopy" else False
        await self._switch_over(engine, precopy, finish=finish)

    async def _greet(self, memory: SourceMemory) -> tuple[int, ...]:
        """Hello → Ready; returns the target's page sizes."""
        link = self._link = await self._dialer.control(self._session)
        self._pipe.attach(link)
        link.start()
        self.background(self._watch_link(link))
        hello = Hello(
            version=PROTOCOL_VERSION,
            session=self.session_id,
            token=self._token,
            guest=self.record.guest,
            driver=self.record.driver,
            mode=self.options.mode,
            streams=self.options.streams,
            block_secret=self._secret,
            regions=tuple(RegionInfo(r.name, r.size_bytes, r.page_bytes) for r in memory.regions),
            agent=f"migrated {__version__}",
        )
        self._entry = SourceEntry(
            hello=hello,
            stage="active",
            target=str(self.options.target),
            file_offsets=memory.file_offsets,
            pid=memory.pid,
            pid_started=process_started(memory.pid),
            started_at=self.record.started_at,
            max_bandwidth=self.options.max_bandwidth,
            drain_bandwidth=self.options.drain_bandwidth,
        )
        await link.send(hello)
        ready = await link.expect(
            Ready, limit_seconds=self._timeouts.guest_start + self._timeouts.handshake, what="the target to be ready"
        )
        self.record.page_size = max(ready.page_bytes)
        self._entry.page_bytes = ready.page_bytes
        return ready.page_bytes

    async def _note(self, stage: str) -> None:
        """Write down how far we are: before the guest is touched, and before COMMIT is sent."""
        if self._entry is None:
            raise MigratedError("nothing to note yet: this is a bug")
        self._entry.stage = stage
        self._entry.target = str(self._dialer.address)
        self._entry.guest = self._guest.memento()
        await self._survival.write(self._entry)

    async def _open_streams(self) -> None:
        engine = self._require_engine()
        bulk, urgent = await self._dialer.pages(self.options.streams)
        waiting = [(URGENT, urgent), *reversed(list(enumerate(bulk)))]
        try:
            while waiting:
                engine.add_stream(*waiting.pop())  # takes the descriptor, whatever comes of it
        finally:
            for _, fd in waiting:
                os.close(fd)

    async def _track(self, memory: SourceMemory, engine: SourceEngine) -> PreCopy:
        """Attach dirty tracking; from here on the guest is touched."""
        await self._survival.hold(memory.memory_fds)
        await self._note("active")
        uffd = await self._guest.tracking_uffd()
        await self._note("active")  # with what the driver has left in the guest
        self._tracker = Tracker(memory, uffd)
        precopy = PreCopy(
            engine=engine,
            tracker=self._tracker,
            guest=self._guest,
            link=self._require_link(),
            options=self.options,
            record=self.record,
            rates=self._rates,
            rounds_done=self.rounds_done,
            switch_now=self._switch_now,
            barrier_seconds=self._timeouts.switchover,
            log=self.log,
        )
        await precopy.arm()
        return precopy

    async def _switch_over(self, engine: SourceEngine, precopy: PreCopy, *, finish: bool) -> None:
        """Pause, last scan, stale map, guest state; returns when the target has loaded it."""
        link = self._require_link()
        self.set_state(State.SWITCHOVER)
        self._paused_at = time.monotonic()
        await self._guest.pause(self._pipe)
        self._paused_at = self._guest.paused_at or self._paused_at
        if self.options.mode == "postcopy":
            await in_thread(engine.mark_populated, precopy.tracker)
        await precopy.scan(quiesced=True)
        if finish:
            await precopy.send_marked(self.record.round + 1)
            await precopy.barrier()
        stale = await in_thread(engine.freeze)
        self.record.stale_pages = stale
        await link.send(Switchover(stale))
        for region, first_page, bits in engine.stale_maps():
            await link.send(StaleMap(region, first_page, bits))
        await link.send(StaleMapEnd())
        engine.serve(drain=False)
        self.log.info("paused", stale_pages=stale, seconds=round(time.monotonic() - self._paused_at, 4))
        await self._guest.send_state(self._pipe)
        await link.expect(Loaded, limit_seconds=self._timeouts.guest_state, what="the guest state to be loaded")

    # ------------------------------------------------------------ after COMMIT

    async def _after_commit(self, *, connected: bool = True) -> None:
        while True:
            try:
                if connected:
                    await self.failure.guard(self._until_done())
                    break
                connected = True
            except Exception as error:  # noqa: BLE001 - after COMMIT every failure means the same: pause and reconnect
                reason = self.failure.error or error
                # Done may have been read and not yet been taken from the queue when the failure came: it counts.
                if self._all_there or self._session.state in (SessionState.DONE, SessionState.CLOSED):
                    break
                self.set_state(State.POSTCOPY_PAUSED, reason)
            try:
                await self._reconnect()
            except Exception as error:  # noqa: BLE001 - only a refusal or the operator's limit leads here
                self.set_state(State.FAILED, error)
                return
            if self._session.state is SessionState.CLOSED:
                break
        await self._disconnect()
        self._released = True
        await quietly(self._guest.release(), self.log, "release the guest")
        await self._survival.over()
        self.record.error = None
        self.set_state(State.COMPLETED)

    async def _until_done(self) -> None:
        """Serve until the target has everything.

        What has arrived is taken from the messages, never from the session's state: that may be several messages ahead.
        """
        link = self._require_link()
        if not self._running_there:
            await link.expect(Running, limit_seconds=self._timeouts.guest_command * 2, what="the guest to run there")
            self._running_there = True
        if self.record.downtime_seconds is None and self._paused_at > 0:
            self.record.downtime_seconds = time.monotonic() - self._paused_at
        self.set_state(State.POSTCOPY)
        if not self._all_there:
            self._require_engine().serve(drain=True)
            message = await link.receive()  # no limit: a slow drain may take hours, and heartbeats watch the peer
            if not isinstance(message, Done):
                raise PeerError(f"{type(message).__name__} came instead of Done", code="protocol-remote")
            self._all_there = True
        await link.send(Released())

    async def _disconnect(self) -> None:
        if self._engine is not None:
            await in_thread(self._engine.drop_streams)
        if self._link is not None:
            await self._link.close()
        self._session.connection_lost()

    async def _reconnect(self) -> None:
        """Dial until the same session goes on.  Raises PeerError when the target has nothing of it any more."""
        pause = self._timeouts.reconnect_interval
        started = time.monotonic()
        while True:
            await self._disconnect()
            self.failure.clear()
            if self._session.state is SessionState.CLOSED:
                return  # Done was read while the connection was let go of
            try:
                await self._resume_session()
            except PeerError as error:
                raise MigratedError(
                    f"the target refuses to go on: {error.message}",
                    code="target-lost-guest",
                    hint="COMMIT may have been obeyed: make sure the guest runs nowhere else before you run it here by hand",
                ) from error
            except Exception as error:
                self.log.info("reconnect failed", error=str(error), next_try_seconds=pause)
                if self.record.state is State.RECOVERING:
                    self.set_state(State.POSTCOPY_PAUSED, error)
                limit = self._timeouts.reconnect
                if limit and time.monotonic() - started > limit:
                    raise TimeoutExceededError(
                        f"{self._dialer.address} could not be reached for {limit:g} s; the guest waits there",
                        hint="`migrated resume` goes on once it can be reached again; timeouts.reconnect = 0 never gives up",
                    ) from error
                self._reconnect_now.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._reconnect_now.wait(), pause)
                pause = min(2 * pause, self._timeouts.reconnect_interval_limit)
            else:
                self.record.error = None
                return

    async def _resume_session(self) -> None:
        link = self._link = await self._dialer.control(self._session)
        self.set_state(State.RECOVERING)
        self._session.reconnected()
        self._pipe.attach(link)
        link.start()
        self.background(self._watch_link(link))
        await link.send(Resume(PROTOCOL_VERSION, self.session_id, self._token, committed=True))
        limit = self._timeouts.switchover
        resumed = await link.expect(Resumed, limit_seconds=limit, what="the target to say where it stands")
        engine = self._require_engine()
        engine.lacking_begin()
        lacking = resumed.lacking_pages > 0
        while True:
            async with within(limit, "the map of lacking pages"):
                message = await link.receive()
            if isinstance(message, LackingEnd):
                break
            if not isinstance(message, Lacking):
                raise PeerError(f"{type(message).__name__} among the lacking pages", code="protocol-remote")
            engine.lacking(message.region, message.first_page, message.bits)
            lacking = True
        self.record.stale_pages = resumed.lacking_pages
        self._running_there = resumed.state != "loaded"
        self._all_there = resumed.state == "done"
        if lacking:  # a target that has everything may have closed its side: it only wants to say Done
            await self._open_streams()
            engine.serve(drain=True)
        if not self._running_there:
            await link.send(Commit())
        self.log.info("reconnected", target=resumed.state, lacking_pages=resumed.lacking_pages)

    # ------------------------------------------------------------ giving up before COMMIT

    async def _give_up(self, error: BaseException) -> None:
        """The guest runs on here, untracked; the target is told; nothing of ours stays."""
        link = self._link
        if link is not None:
            error = await link.explained(error)
        self.log.warning("giving up", error=str(error))
        # First of all the session must rule out COMMIT: then the guest may run here.
        if link is None or link.broken is not None:
            self._session.connection_lost()
        elif self._session.abort_allowed:
            with contextlib.suppress(MigratedError):
                await link.send(abort_of(named(error)))
        if not await self._committed_struck_out():
            self.set_state(State.FAILED, error)
            return
        if self._tracker is not None:
            await quietly(self._guest.resume(), self.log, "resume the guest here")
        await self._stop_tracking()
        told = link is not None and link.broken is None and await self._confirmed(link)
        await self._disconnect()
        if told or not self._session.must_reconnect:
            await self._survival.over()
        aborted = named(error).code == AbortedError.default_code  # on request, here or on the target
        self.set_state(State.ABORTED if aborted else State.FAILED, error)
        if not told and self._session.must_reconnect:
            await self._settle(error)

    async def _committed_struck_out(self) -> bool:
        """Make sure that no journal says COMMIT before the guest runs on: the next agent would believe it."""
        if self._entry is None or self._entry.stage != "committed":
            return True
        try:
            await self._note("active")
        except MigratedError as problem:
            try:
                self._survival.strike()
            except OSError:
                self.log.error(  # noqa: TRY400 - expected: no traceback
                    "the guest stays paused: the journal says COMMIT, which was not sent, and cannot be changed",
                    error=str(problem),
                )
                return False
        return True

    async def _go_on(self, legacy: Recovered) -> None:
        """After a restart of the agent."""
        if not legacy.committed:
            error = MigratedError(
                "the source agent was restarted before COMMIT: the guest runs on here",
                code="agent-restarted",
                hint="start the migration again",
            )
            await quietly(self._guest.reclaim(legacy.entry.guest), self.log, "run the guest on here")
            self.set_state(State.FAILED, error)
            await self._settle(error)
            return
        self.record.page_size = max(legacy.entry.page_bytes)
        self.record.total_bytes = sum(region.size_bytes for region in legacy.memory.regions)
        await quietly(self._guest.adopt(legacy.entry.pid, legacy.entry.guest), self.log, "find the paused guest")
        engine = self._engine = SourceEngine(legacy.memory, legacy.entry.page_bytes, self.options.streams, self._secret)
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        await in_thread(engine.freeze_whole)
        self.log.warning("the frozen memory is found again after a restart of the agent")
        await self._after_commit(connected=False)

    async def _confirmed(self, link: ControlLink) -> bool:
        """Whether the target says that nothing of the guest is left there."""
        try:
            async with within(self._timeouts.abort, "the target to clean up"):
                while not isinstance(await link.receive(after_abort=True), Aborted):
                    pass
        except Exception as problem:  # noqa: BLE001 - then it is settled later
            self.log.warning("the target did not confirm the abort", error=str(problem))
            return False
        return True

    async def _settle(self, error: BaseException) -> None:
        """The target may hold a loaded guest that waits for our word: keep trying to say that it is over."""
        pause = self._timeouts.reconnect_interval
        while self._session.must_reconnect:
            try:
                link = self._link = await self._dialer.control(self._session)
                self._session.reconnected()
                link.start()
                await link.send(Resume(PROTOCOL_VERSION, self.session_id, self._token, committed=False))
                await link.send(abort_of(named(error)))
                if await self._confirmed(link):
                    self.log.info("settled: nothing is left on the target")
            except Exception as problem:  # noqa: BLE001 - tried again
                self.log.info("cannot settle yet", error=str(problem), next_try_seconds=pause)
            await self._disconnect()
            if self._session.must_reconnect:
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._timeouts.reconnect_interval_limit)
        await self._survival.over()

    async def _stop_tracking(self) -> None:
        engine, tracker = self._engine, self._tracker
        if engine is not None:
            await in_thread(engine.drop_streams)
        if tracker is not None:
            self._tracker = None
            await quietly(in_thread(tracker.disarm), self.log, "disarm dirty tracking")
            tracker.close()
        await quietly(self._guest.release_tracking(), self.log, "release dirty tracking")

    async def _let_go(self) -> None:
        """Descriptors, threads, tasks: whatever the end was.  Does not touch the guest, except for its tracking."""
        await self.stop_background()
        if self._tracker is not None and self._session.guest_may_run_here:
            await self._stop_tracking()
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        if self._engine is not None:
            await self._engine.close()
        legacy, self._legacy = self._legacy, None
        if legacy is not None:  # what was kept for us is ours, not the driver's
            for fd in legacy.memory.memory_fds:
                os.close(fd)
        if self._link is not None:
            await self._link.close()
        await quietly(self._guest.close(), self.log, "close the guest's connections")

    # ------------------------------------------------------------ watching

    async def _watch_guest(self) -> None:
        how = await self._guest.died()
        if self._released:
            return
        if self._session.committed:
            self.log.warning("the paused guest's process has ended; its memory is still held", how=how)
            return
        self.failure.set(
            GuestError(
                f"guest {self.record.guest} {how} while it was being moved",
                code="guest-died",
                hint="nothing was left on the target; see the guest's own log",
            )
        )

    async def _watch_link(self, link: ControlLink) -> None:
        error = await link.wait_lost()
        if link is self._link:
            self.failure.set(error)

    def on_engine_event(self, event: Event) -> None:
        """After Done the page connections end: that is no failure."""
        over = self._session.state in (SessionState.DONE, SessionState.CLOSED)
        if event.kind is EventKind.STREAM_LOST and over:
            return
        super().on_engine_event(event)

    # ------------------------------------------------------------ verbs

    def abort(self) -> None:
        """Before COMMIT only."""
        if self._session.committed or self.record.ended:
            raise ConflictError(
                f"migration {self.id} is {self.record.state} and cannot be aborted any more",
                state=self.record.state.value,
                hint="the guest belongs to the target now: let it finish, or `migrated resume` if it is paused"
                if self._session.committed
                else "it is over",
            )
        self.failure.set(AbortedError(f"migration {self.id} was aborted on request"))

    def switchover(self) -> None:
        """End pre-copy after the round under way."""
        if self.record.state not in (State.SETUP, State.PRECOPY):
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: there is no pre-copy to end",
                state=self.record.state.value,
            )
        self._switch_now.set()

    def resume(self, address: Address | None = None) -> None:
        """Reconnect now, perhaps elsewhere."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING):
            raise ConflictError(
                f"migration {self.id} is {self.record.state}, not postcopy-paused", state=self.record.state.value
            )
        if address is not None:
            self._dialer.address = address
            self.record.peer = str(address)
        self._reconnect_now.set()

    @property
    def committed(self) -> bool:
        """Whether COMMIT was sent."""
        return self._session.committed

    def limits_changed(self) -> None:
        """Options were changed while running."""
        self.record.max_bandwidth_bytes_per_second = self.options.max_bandwidth
        if self._engine is not None and self._engine.alive:
            self._engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        self.notify()

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """From the engine's counters."""
        engine = self._engine
        if engine is None or not engine.alive:
            return
        figures.update(self.record, engine.stats(), self._rates, frozen=self._session.committed)

    def _require_engine(self) -> SourceEngine:
        if self._engine is None:
            raise MigratedError("no engine yet: this is a bug")
        return self._engine

    def _require_link(self) -> ControlLink:
        if self._link is None:
            raise MigratedError("no connection yet: this is a bug")
        return self._link
