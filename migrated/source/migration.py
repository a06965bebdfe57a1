"""One migration, seen from the source: pre-copy, switch-over, commit, and serving what is still stale.

The order of things is what keeps the guest safe, so the flow is written down in one place, `SourceMigration._migrate`:

    until loaded   everything that can be undone.  Any failure cancels it and leads to rollback.py: the guest runs on here.
    COMMIT         one message.  `Session.committed` turns true before its first byte leaves, and from then on nothing on
                   this side may make the guest run here.
    until done     only serving.  Any failure pauses it; reconnect.py dials until the same session goes on.

Waiting is done under `Failure.guard`: the engine's threads, the connection and the guest's process each report into one
`Failure`, and the first one ends whatever is being waited for.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from migrated import __version__
from migrated.agent.migration import Migration, quietly
from migrated.agent.rates import Rates
from migrated.agent.record import Laps, Record, State, id_of
from migrated.errors import AbortedError, ConflictError, GuestError, MigratedError, PeerError
from migrated.guests.access.pidfd import process_lives, process_started
from migrated.link.dialing import Dialer
from migrated.memory.engine import Event, EventKind, SourceEngine
from migrated.memory.native import lib
from migrated.memory.tracker import Tracker
from migrated.protocol.messages import (
    PROTOCOL_VERSION,
    Commit,
    Done,
    Hello,
    Loaded,
    Ready,
    RegionInfo,
    Released,
    Running,
    StaleMap,
    StaleMapEnd,
    Switchover,
)
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import SourceEntry
from migrated.source import figures
from migrated.source.connection import TargetConnection
from migrated.source.precopy import PreCopy
from migrated.source.reconnect import Reconnect
from migrated.source.rollback import Rollback
from migrated.source.stage import JournalledStage
from migrated.source.tracking import Tracking
from migrated.waiting import in_thread, within

#: Of zstd: the fastest that still finds what a guest's memory repeats.
COMPRESSION_LEVEL = 1

if TYPE_CHECKING:
    from migrated.address import Address
    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest
    from migrated.memory.regions import SourceMemory
    from migrated.recovery.state import Survival
    from migrated.source.options import Options
    from migrated.source.stage import Recovered


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
                id=id_of(session_id),
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
        self._timeouts = config.timeouts
        self._survival = survival
        self._legacy = legacy
        self._token = legacy.entry.hello.token if legacy is not None else os.urandom(32)
        self._secret = legacy.entry.hello.block_secret if legacy is not None else os.urandom(lib.MGD_SECRET_BYTES)
        self._session = legacy.session() if legacy is not None else Session(Role.SOURCE)
        dialer = Dialer(options.target, session_id=session_id, token=self._token, timeouts=config.timeouts)
        self._connection = TargetConnection(self, self._session, dialer, bulk_streams=options.streams)
        self._tracking = Tracking(guest, self.log)
        self._stage = JournalledStage(
            survival, guest, dialer, log=self.log, entry=legacy.entry if legacy is not None else None
        )
        self._reconnect = Reconnect(self, self._connection, config.timeouts)
        self._rollback = Rollback(
            self,
            self._connection,
            guest,
            tracking=self._tracking,
            stage=self._stage,
            survival=survival,
            timeouts=config.timeouts,
        )
        self._laps = Laps(self.record.downtime_breakdown)
        self._to_adopt: SourceEntry | None = None  # of a paused process that was not found yet
        self._released = False
        self._memory_lost: GuestError | None = None
        self._running_there = False
        self._all_there = False
        self._switch_now = asyncio.Event()
        self._rates = Rates()

    # ------------------------------------------------------------ the flow

    async def _migrate(self) -> None:
        if self._legacy is not None:
            await self._after_restart(self._legacy)
            return
        try:
            await self.failure.guard(self._until_loaded())
            await self._stage.write("committed")
            if self.failure.error is not None:  # while that was written
                raise self.failure.error
            await self._connection.require_link().send(Commit())
            self._laps.lap("commit")
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest must be brought to a safe place
            if not self._session.committed:
                await self._rollback.run(self.failure.error or error)
                return
            self.failure.set(error)
        await self._after_commit()

    async def _until_loaded(self) -> None:
        """Everything before COMMIT."""
        memory = await self._guest.open()
        self.record.total_bytes = sum(region.size_bytes for region in memory.regions)
        self.background(self._watch_guest())
        host_pages = await self._greet(memory)
        engine = self._make_engine(memory, host_pages)
        if self.options.compression != "off":
            engine.set_compression(COMPRESSION_LEVEL)
        await self._connection.open_streams()
        self.set_state(State.PRECOPY)
        precopy = await self._track(memory, engine)
        finish = await precopy.run() if self.options.mode != "postcopy" else False
        await self._switch_over(engine, precopy, finish=finish)

    def _make_engine(self, memory: SourceMemory, host_pages: tuple[int, ...]) -> SourceEngine:
        engine = self._connection.engine = SourceEngine(memory, host_pages, self.options.streams, self._secret)
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        return engine

    async def _greet(self, memory: SourceMemory) -> tuple[int, ...]:
        """Hello → Ready; returns the target's page sizes."""
        link = await self._connection.dial()
        self._connection.begin(link)
        hello = Hello(
            version=PROTOCOL_VERSION,
            session=self.session_id,
            token=self._token,
            guest=self.record.guest,
            driver=self.record.driver,
            mode=self.options.mode,
            streams=self.options.streams,
            block_secret=self._secret,
            regions=tuple(RegionInfo(r.name, r.size_bytes, r.page_bytes, r.device) for r in memory.regions),
            agent=f"migrated {__version__}",
            description=self._guest.describe(),
        )
        entry = self._stage.entry = SourceEntry(
            hello=hello,
            stage="active",
            target=str(self.options.target),
            file_offsets=memory.file_offsets,
            private=memory.private,
            file_behind=memory.file_behind,
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
        entry.page_bytes = ready.page_bytes
        return ready.page_bytes

    async def _track(self, memory: SourceMemory, engine: SourceEngine) -> PreCopy:
        """Attach dirty tracking; from here on the guest is touched."""
        await self._survival.hold(memory.memory_fds)
        await self._stage.write("active")
        await self._survival.supersede_others(self.record.guest)
        uffd = await self._guest.tracking_uffd()
        await self._stage.write("active")  # with what the driver has left in the guest
        tracker = self._tracking.tracker = Tracker(memory, uffd)
        precopy = PreCopy(
            engine=engine,
            tracker=tracker,
            guest=self._guest,
            link=self._connection.require_link(),
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
        link = self._connection.require_link()
        self.set_state(State.SWITCHOVER)
        started = time.monotonic()
        await self._guest.pause(self._connection.pipe)
        self._laps.start(self._guest.paused_at or started)
        self._laps.lap("stop", self._guest.stopped_at)
        self._laps.lap("save")
        if self.options.mode == "postcopy":
            await in_thread(engine.mark_populated, precopy.tracker)
        await precopy.scan(quiesced=True)
        self._laps.lap("scan")
        if finish:
            await precopy.send_marked(self.record.round + 1)
            await precopy.barrier()
            self._laps.lap("send")
        stale = await in_thread(engine.freeze)
        self.record.stale_pages, self.record.stale_bytes = stale, engine.stats().stale_bytes_left
        async with within(self._timeouts.switchover, "the stale map to be sent", who=link.peer):
            await link.send(Switchover(stale))
            for region, first_page, bits in engine.stale_maps():
                await link.send(StaleMap(region, first_page, bits))
            await link.send(StaleMapEnd())
        engine.serve(drain=False)
        self._laps.lap("map")
        self.log.info("paused", stale_pages=stale, steps=self.record.downtime_breakdown)
        await self._guest.send_state(self._connection.pipe)
        await link.expect(Loaded, limit_seconds=self._timeouts.guest_state, what="the guest state to be loaded")
        self._laps.lap("load")

    # ------------------------------------------------------------ after COMMIT

    async def _after_commit(self, *, connected: bool = True) -> None:
        """Serve, over as many connections as it takes, until the target needs nothing more."""
        while not (connected and await self._serve()):
            if self._memory_lost is not None:  # no connection brings it back
                await self._survival.over()
                self.set_state(State.FAILED, self._memory_lost)
                return
            try:
                resumed = await self._reconnect.run()
            except Exception as error:  # noqa: BLE001 - only a refusal or the operator's limit leads here
                self.set_state(State.FAILED, error)
                return
            if resumed is None:
                break
            self._running_there = resumed.state != "loaded"
            self._all_there = resumed.state == "done"
            connected = True
        await self._say_farewell()
        await self._connection.disconnect()
        await self._end_old_guest()
        self.record.error = None
        self.set_state(State.COMPLETED)

    async def _say_farewell(self) -> None:
        """Released, once the journal says so: the target forgets this session, and a next agent must not ask for it."""
        try:
            await self._stage.write("released")
            link = self._connection.link
            if link is not None and self._session.may_send(Released()):
                await link.send(Released())
        except MigratedError as problem:  # the target goes on without it
            self.log.info("the farewell was not said", error=str(problem))

    async def _end_old_guest(self) -> None:
        """A paused process that cannot be ended stays in the journal: it must never be moved, or run, again."""
        self._released = True
        try:
            if self._to_adopt is not None:
                await self._adopt(self._to_adopt)
            await self._guest.release()
        except MigratedError as problem:
            self.log.warning("the old process of the guest is still here", error=str(problem))
            entry = self._stage.entry
            if entry is not None and process_lives(entry.pid, entry.pid_started):
                await self._survival.let_go()
                return
        await self._survival.over()

    async def _serve(self) -> bool:
        """Whether it came to the end over this connection; otherwise the migration is paused."""
        try:
            await self.failure.guard(self._until_done())
        except Exception as error:  # noqa: BLE001 - after COMMIT every failure means the same: pause and reconnect
            reason = self.failure.error or error
            # Done may have been read and not yet been taken from the queue when the failure came: it counts.
            if not self._all_there and self._session.state not in (SessionState.DONE, SessionState.CLOSED):
                if isinstance(reason, GuestError) and reason.code == "guest-gone":  # the engine met it
                    self._memory_lost = GuestError(
                        f"the paused process of {self.record.guest} has ended, and with it pages that had not been sent",
                        code="guest-memory-lost",
                        hint="private memory goes with its process.  The guest waits on the target: `migrated abandon` there gives "
                        "it a memory error where it touches one of these pages",
                    )
                self.set_state(State.POSTCOPY_PAUSED, reason)
                return False
        return True

    async def _until_done(self) -> None:
        """Serve until the target has everything.

        What has arrived is taken from the messages, never from the session's state: that may be several messages ahead.
        """
        link = self._connection.require_link()
        if not self._running_there:
            await link.expect(Running, limit_seconds=self._timeouts.switchover, what="the guest to run there")
            self._running_there = True
        if self.record.downtime_seconds is None and self._laps.total is not None:
            self._laps.lap("run")
            self.record.downtime_seconds = self._laps.total
            self.log.info("downtime", seconds=self.record.downtime_seconds, steps=self.record.downtime_breakdown)
        self.set_state(State.POSTCOPY)
        if not self._all_there:
            self._connection.require_engine().serve(drain=True)
            message = await link.receive()  # no limit: a slow drain may take hours, and heartbeats watch the peer
            if not isinstance(message, Done):
                raise PeerError(f"{type(message).__name__} came instead of Done", code="protocol-remote")
            self._all_there = True

    # ------------------------------------------------------------ after an agent that died

    async def _after_restart(self, legacy: Recovered) -> None:
        """Go on where the agent before us was: undo, or serve the frozen memory again."""
        if legacy.entry.stage == "released":
            self._to_adopt = legacy.entry
            await self._end_old_guest()
            self.set_state(State.COMPLETED)
            return
        if not legacy.committed:
            await self._rollback.after_restart(legacy.entry.guest, legacy.error, superseded=legacy.superseded)
            return
        self.record.page_size = max(legacy.entry.page_bytes)
        self.record.total_bytes = sum(region.size_bytes for region in legacy.memory.regions)
        self._to_adopt = legacy.entry
        await quietly(self._adopt(legacy.entry), self.log, "find the paused guest")
        engine = self._make_engine(legacy.memory, legacy.entry.page_bytes)
        await in_thread(engine.freeze_whole)
        self.log.warning("the frozen memory is found again after a restart of the agent")
        await self._after_commit(connected=False)

    async def _adopt(self, entry: SourceEntry) -> None:
        """Find the paused process again, unless its number is another's by now."""
        if process_lives(entry.pid, entry.pid_started):
            await self._guest.adopt(entry.pid, entry.guest)
        self._to_adopt = None

    # ------------------------------------------------------------ the end

    async def _let_go(self) -> None:
        await self.stop_background()
        if self._tracking.tracker is not None and self._session.guest_may_run_here:
            await self._connection.drop_streams()
            await self._tracking.stop()
        self._tracking.close()
        await self._connection.close_engine()
        legacy, self._legacy = self._legacy, None
        if legacy is not None:  # what was kept for us is ours, not the driver's
            for fd in legacy.memory.memory_fds:
                os.close(fd)
        await self._connection.close_link()
        await quietly(self._guest.close(), self.log, "close the guest's connections")

    # ------------------------------------------------------------ watching

    async def _watch_guest(self) -> None:
        how = await self._guest.died()
        if self._released:
            return
        if self._session.committed:
            self.log.warning("the paused guest's process has ended; only its shared memory is still there", how=how)
            return
        self.failure.set(
            GuestError(
                f"guest {self.record.guest} {how} while it was being moved",
                code="guest-died",
                hint="nothing was left on the target; see the guest's own log",
            )
        )

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
        self._reconnect.now(address)
        if address is not None:
            self.record.peer = str(address)
            self.background(quietly(self._stage.write("committed"), self.log, "write the journal"))

    def limits_changed(self) -> None:
        """Options were changed while running."""
        self.record.max_bandwidth_bytes_per_second = self.options.max_bandwidth
        engine = self._connection.engine
        if engine is not None and engine.alive:
            engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        entry = self._stage.entry
        if entry is not None:  # the next write has it
            entry.max_bandwidth, entry.drain_bandwidth = self.options.max_bandwidth, self.options.drain_bandwidth
        self.notify()

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """From the engine's counters."""
        engine = self._connection.engine
        if engine is None or not engine.alive:
            return
        figures.update(self.record, engine.stats(), self._rates, frozen=self._session.committed)
