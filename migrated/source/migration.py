"""The source's side of one migration: pre-copy, switchover, COMMIT, and serving the pages that are still stale.

until COMMIT   There is one connection.  A failure leads to `SourceMigration._roll_back`: the guest keeps running here.
COMMIT         One message.  `Session.committed` becomes true before its first byte leaves; from then on nothing on this
               side may run the guest here.
until Done     The source only serves pages, over as many connections as it takes: a new one replaces each that fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from migrated import __version__
from migrated.agent import figures
from migrated.agent.connection import Connection
from migrated.agent.migration import FinalError, Migration, log_errors
from migrated.agent.rates import Rates
from migrated.agent.record import Record, State, id_of
from migrated.errors import (
    AbortedError,
    ConflictError,
    GuestError,
    MigratedError,
    PeerError,
    RemoteProtocolError,
    TimeoutExceededError,
    as_migrated_error,
    log_fields,
)
from migrated.guests.access.pidfd import process_lives, process_started
from migrated.link.dialing import Dialer
from migrated.memory.channel import Channel
from migrated.memory.engine import Event, EventKind, SourceEngine
from migrated.memory.native import lib
from migrated.memory.tracker import Tracker
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import (
    GUEST_LOST,
    PROTOCOL_VERSION,
    VERSION_MISMATCH,
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
from migrated.recovery.journal import SourceEntry
from migrated.source.precopy import PreCopy
from migrated.source.stage import RestartStage
from migrated.waiting import Backoff, in_thread, within

#: zstd level: the fastest that still finds the repetitions in guest memory.
COMPRESSION_LEVEL = 1
#: A dying process first closes its connections, and exists until its memory is freed.
DYING_SECONDS = 1.0

if TYPE_CHECKING:
    from migrated.address import Address
    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest
    from migrated.link.control_link import ControlLink
    from migrated.link.dialing import DialTerms
    from migrated.memory.regions import SourceMemory
    from migrated.recovery.state import RecoveryState
    from migrated.source.options import Options
    from migrated.source.stage import Recovered


class SourceMigration(Migration):
    """Construct it and call `run` once; the verbs may be called meanwhile."""

    role = "source"
    engine: SourceEngine | None

    def __init__(
        self,
        *,
        guest_name: str,
        driver: str,
        guest: SourceGuest,
        options: Options,
        config: AgentConfig,
        session_id: bytes,
        recovery_state: RecoveryState[SourceEntry],
        recovered: Recovered | None = None,
        terms: DialTerms,
    ) -> None:
        self.session = recovered.session() if recovered is not None else Session(Role.SOURCE)
        super().__init__(
            Record(
                id=id_of(session_id),
                guest=guest_name,
                role=self.role,
                mode=options.mode,
                peer=str(options.target),
                driver=driver,
                max_bandwidth_bytes_per_second=options.max_bandwidth,
                state=State.POSTCOPY_PAUSED if self.session.committed else State.SETUP,
            ),
            config.hooks,
        )
        self.session_id = session_id
        self.options = options
        self._guest = guest
        self._timeouts = config.timeouts
        self._recovery_state = recovery_state
        self._recovered = recovered
        self._token = recovered.entry.hello.token if recovered is not None else os.urandom(32)
        self._secret = recovered.entry.hello.block_secret if recovered is not None else os.urandom(lib.MGD_SECRET_BYTES)
        self._dialer = Dialer(options.target, session_id=session_id, token=self._token, terms=terms)
        entry = recovered.entry if recovered is not None else None
        self._stage = RestartStage(recovery_state, guest, self._dialer, options, log=self.log, entry=entry)
        self._tracker: Tracker | None = None  # set while the guest is tracked
        self._rounds_done: asyncio.Queue[int] = asyncio.Queue()
        self._switch_now = asyncio.Event()
        self._tries = Backoff(self._timeouts.reconnect_interval, self._timeouts.reconnect_interval_limit)
        self._stuck = False  # the process could not be resumed, or ended: the next agent must find it
        self._released = False
        self._rates = Rates()

    # ------------------------------------------------------------ the flow

    async def _migrate(self) -> None:
        reason: BaseException | None = None
        if self._recovered is not None:
            reason = await self._take_up(self._recovered)
        else:
            async with self.connection as connection:
                try:
                    async with connection.alive:
                        await self._until_loaded(connection)
                        await self._stage.write("committed")
                        connection.alive.check()
                        connection.link.post(Commit())  # the guest is no longer ours: nothing may follow
                except Exception as error:  # noqa: BLE001 - COMMIT was not sent: the guest keeps running here
                    reason = await self._roll_back(error, connection)
                else:
                    self._laps.lap("commit")
                    await self._serve(connection)
        if reason is None:
            await self._until_done()
            needed = await self._end_old_guest()
            self.record.error = None
            self.set_state(State.COMPLETED)
            if not needed:
                await self._survival_over()
        else:
            await self._settle(reason)

    # ------------------------------------------------------------ until COMMIT

    async def _until_loaded(self, connection: Connection) -> None:
        await self.hooks.before(State.SETUP)
        memory = await self._guest.open()
        self.record.total_bytes = sum(region.size_bytes for region in memory.regions)
        self.background(self._watch_guest())
        host_pages = await self._greet(connection, memory)
        engine = self._make_engine(memory, host_pages)
        await self._open_streams(engine)
        await self.hooks.before(State.PRECOPY)
        self.set_state(State.PRECOPY)
        precopy = await self._track(connection.link, memory, engine)
        finish = await precopy.run() if self.options.mode != "postcopy" else False
        await self._switch_over(connection.link, engine, precopy, finish=finish)

    def _require_engine(self) -> SourceEngine:
        if self.engine is None:
            raise MigratedError("no engine yet: this is a bug")
        return self.engine

    def _make_engine(self, memory: SourceMemory, host_pages: tuple[int, ...]) -> SourceEngine:
        engine = self.engine = SourceEngine(memory, host_pages, self.options.streams, self._secret)
        engine.watch(asyncio.get_running_loop(), self.on_engine_event)
        engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        if self.options.compression != "off":
            engine.set_compression(COMPRESSION_LEVEL)
        return engine

    async def _greet(self, connection: Connection, memory: SourceMemory) -> tuple[int, ...]:
        """Send Hello and wait for Ready; return the target's page sizes."""
        link = await self._dial(connection)
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
            traceparent=self.trace.traceparent,
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
            compression=self.options.compression,
            traceparent=self.trace.parent,
        )
        await link.send(hello)
        ready = await link.expect(
            Ready, limit_seconds=self._timeouts.guest_start + self._timeouts.handshake, what="the target to be ready"
        )
        self.record.page_size = max(ready.page_bytes)
        entry.page_bytes = ready.page_bytes
        return ready.page_bytes

    async def _track(self, link: ControlLink, memory: SourceMemory, engine: SourceEngine) -> PreCopy:
        """Attach dirty tracking.  This is the first step that touches the guest."""
        await self._recovery_state.keep_descriptors(memory.memory_fds)
        await self._stage.write("active")
        await self._recovery_state.supersede_others(self.record.guest)
        uffd = await self._guest.tracking_uffd()
        await self._stage.write("active")  # again: records what the driver has left in the guest
        tracker = self._tracker = Tracker(memory, uffd)
        precopy = PreCopy(
            engine=engine,
            tracker=tracker,
            guest=self._guest,
            link=link,
            options=self.options,
            record=self.record,
            rates=self._rates,
            rounds_done=self._rounds_done,
            switch_now=self._switch_now,
            barrier_seconds=self._timeouts.switchover,
            trace=self.trace,
            log=self.log,
        )
        await precopy.arm()
        return precopy

    async def _switch_over(self, link: ControlLink, engine: SourceEngine, precopy: PreCopy, *, finish: bool) -> None:
        """Pause the guest, scan, send the stale map and the guest state; return when the target has loaded it."""
        await self.hooks.before(State.SWITCHOVER)
        self.set_state(State.SWITCHOVER)
        gc.collect(1)  # while the guest runs, and so not while it is paused
        started = time.monotonic()
        await self._guest.pause(link.pipe)
        self._laps.start(self._guest.paused_at or started)
        self._laps.lap("stop", self._guest.stopped_at)
        self._laps.lap("save")
        stale = await precopy.scan_last(everything=self.options.mode == "postcopy", freeze=not finish)
        self._laps.lap("scan")
        if finish:
            await precopy.send_marked(self.record.round + 1)
            await precopy.barrier()
            stale = await in_thread(engine.freeze)
            self._laps.lap("send")
        async with within(self._timeouts.switchover, "the stale map to be sent", who=link.peer):
            # At once: the guest of the target waits for the end of the map.
            await link.send(Switchover(stale), *(StaleMap(*piece) for piece in engine.stale_maps()), StaleMapEnd())
        engine.serve(drain=False)
        self._laps.lap("map")
        self.record.stale_pages, self.record.stale_bytes = stale, engine.stats().stale_bytes_left
        await self._guest.send_state(link.pipe)
        self._laps.lap("transfer")
        await precopy.require_unwritten()  # while the target loads
        self.log.info("paused", stale_pages=stale, steps=self.record.downtime_breakdown)
        await link.expect(Loaded, limit_seconds=self._timeouts.guest_state, what="the guest state to be loaded")
        self._laps.lap("load")

    # ------------------------------------------------------------ connections

    def _next_connection(self) -> Connection:
        self.connection = Connection(self)
        return self.connection

    async def _dial(self, connection: Connection) -> ControlLink:
        """Dial a control link, for a new session or to continue the session."""
        link = await self._dialer.control()
        if not self.session.connected:
            self.session = self.session.resumed()
        link.start(self.session)
        connection.attach(link)
        return link

    def _resume(self, *, committed: bool) -> Resume:
        """Return the message that resumes the session; ``committed``: COMMIT was sent, or may have been."""
        return Resume(PROTOCOL_VERSION, self.session_id, self._token, committed=committed)

    async def _open_streams(self, engine: SourceEngine) -> None:
        """Dial the page connections and pass them to the engine."""
        with contextlib.ExitStack() as undo:
            dialled = await self._dialer.pages(self.options.streams)
            for _, connection in dialled:
                undo.callback(connection.close)  # unless the engine has it by then
            for stream, connection in dialled:
                engine.add_stream(stream, connection if isinstance(connection, Channel) else connection.detach())

    # ------------------------------------------------------------ after COMMIT

    async def _until_done(self) -> None:
        """Reconnect and serve until the target has every page."""
        limit, lost_at = self._timeouts.reconnect, time.monotonic()
        while not self.session.position.done:
            await self._tries.pause()
            async with self._next_connection() as connection:
                if await self._serve(connection, resume=True):
                    lost_at = time.monotonic()
                    continue
            if limit and time.monotonic() - lost_at > limit:
                raise FinalError(
                    TimeoutExceededError(
                        f"{self._dialer.address} could not be reached for {limit:g} s; the guest waits there",
                        hint="once it can be reached again, start the source agent anew: it goes on with what is kept; "
                        "timeouts.reconnect = 0 never gives up",
                    )
                )

    async def _serve(self, connection: Connection, *, resume: bool = False) -> bool:
        """Serve until Done; a failure pauses the migration.  Return whether the session was (re)established."""
        on = not resume
        try:
            async with connection.alive:
                standing = "loaded"
                if resume:
                    standing = await self._resume_session(connection)
                    on = True
                await self._until_all_sent(connection.link, standing)
        except Exception as error:  # noqa: BLE001 - after COMMIT any failure means: try the next connection
            if not on:
                self.log.info("reconnect failed", error=str(error), next_try_seconds=self._tries.seconds)
            if not self.session.position.done:  # Done may have been read and still be queued
                self.set_state(State.POSTCOPY_PAUSED, await self._judged(error))
        if self.session.position.done:
            await self._say_farewell(connection)
        return on

    async def _resume_session(self, connection: Connection) -> str:
        """Learn the target's standing and the pages it lacks, and serve those; return the standing."""
        link = await self._dial(connection)
        self.set_state(State.RECOVERING)
        await link.send(self._resume(committed=True))
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
                raise RemoteProtocolError(f"{type(message).__name__} among the lacking pages")
            engine.lacking(message.region, message.first_page, message.bits)
            lacking = True
        self.record.stale_pages, self.record.stale_bytes = resumed.lacking_pages, engine.stats().stale_bytes_left
        if lacking:  # a target that lacks nothing needs no page connections, and may refuse them
            await self._open_streams(engine)
            engine.serve(drain=True)
        if resumed.state == "loaded":
            await link.send(Commit())
        self.log.info("reconnected", target=resumed.state, lacking_pages=resumed.lacking_pages)
        self._tries.reset()
        self.record.error = None
        return resumed.state

    async def _until_all_sent(self, link: ControlLink, standing: str) -> None:
        """Serve until the target, whose standing is given, has every page.

        The messages show what has arrived; the session's state does not, since it may be several messages ahead.
        """
        if standing == "loaded":
            await link.expect(Running, limit_seconds=self._timeouts.switchover, what="the guest to run there")
        if self.record.downtime_seconds is None and self._laps.total is not None:
            self._laps.lap("run")
            self.record.downtime_seconds = self._laps.total
            self.log.info("downtime", seconds=self.record.downtime_seconds, steps=self.record.downtime_breakdown)
        self.set_state(State.POSTCOPY)
        if standing != "done":
            self._require_engine().serve(drain=True)
            message = await link.receive()  # no limit: a slow drain may take hours, and heartbeats watch the peer
            if not isinstance(message, Done):
                raise RemoteProtocolError(f"{type(message).__name__} came instead of Done")

    async def _judged(self, error: Exception) -> Exception:
        """Return the error to record for a failed connection.  Raises FinalError if no other connection can help."""
        if isinstance(error, GuestError) and error.code == "guest-gone":  # reported by the engine
            await self._recovery_state.clear()
            raise FinalError(
                GuestError(
                    f"the paused process of {self.record.guest} has ended, and with it pages that had not been sent",
                    code="guest-memory-lost",
                    hint="private memory goes with its process.  The guest waits on the target: `migrated abandon` there gives "
                    "it a memory error where it touches one of these pages",
                )
            ) from error
        if not isinstance(error, PeerError) or error.code == VERSION_MISMATCH:
            return error  # a peer of another version says nothing about the guest
        if error.code == GUEST_LOST:
            raise FinalError(
                MigratedError(
                    f"the target refuses to go on: {error.message}",
                    code="target-lost-guest",
                    hint="COMMIT may have been obeyed: make sure the guest runs nowhere else, then "
                    f"`migrated force-run {self.id}` runs it here, `migrated discard {self.id}` gives it up",
                )
            ) from error
        where = self._dialer.address
        return MigratedError(
            f"{where} refuses to go on: {error.message}",
            code="target-refuses",
            hint=f"is {where} where the guest is?  `migrated resume {self.id} --to HOST:PORT` asks elsewhere; if it is nowhere: "
            f"`migrated force-run {self.id}` runs it here, `migrated discard {self.id}` gives it up",
        )

    async def _say_farewell(self, connection: Connection) -> None:
        """Record `released`, then send Released: the target forgets the session, so no agent may resume it."""
        try:
            await self._stage.write("released")
            if self.session.may_send(Released()):
                await connection.link.send(Released())
        except MigratedError as problem:  # the target does not need it
            self.log.info("cannot send Released", error=str(problem))

    async def _end_old_guest(self) -> bool:
        """End the paused process.  If that fails, it stays in the journal: it must never be moved or run again.

        Return whether the next agent still needs everything that is kept.
        """
        self._released = True
        entry = self._stage.require_entry()
        try:
            if self._recovered is not None and process_lives(entry.pid, entry.pid_started):
                await self._guest.adopt(entry.pid, entry.guest)
            await self._guest.release()
        except MigratedError as problem:
            self.log.warning("cannot end the guest's old process", error=str(problem))
            self._stuck = process_lives(entry.pid, entry.pid_started)
            if (
                self._stuck
                and entry.stage != "released"
                and not await log_errors(self._stage.write("released"), self.log, "write the journal")
            ):
                return True  # it asks the target once more
        return False

    # ------------------------------------------------------------ rolling back: COMMIT was not sent

    async def _roll_back(self, error: BaseException, connection: Connection) -> BaseException:
        """Resume the guest here, untracked; abort on the target if it can be reached; return the error to report there.

        The order keeps the guest in one place: the session rules out COMMIT, then the journal does, then the guest
        resumes.  Nothing before that waits for the network.
        """
        if not self.session.guest_may_run_here:
            raise MigratedError("attempt to resume the guest here after COMMIT: this is a bug")
        self.log.warning("migration failed, rolling back", **log_fields(error))
        if not connection.speaking:
            self.session.connection_lost()
        elif self.session.abort_allowed:
            with contextlib.suppress(MigratedError):
                connection.link.post(abort_of(error))
        await self._withdraw_commit()
        problem = await self._run_on(self._guest.resume()) if self._tracker is not None else None
        if self._stuck:
            await self._write_again()
        error = self._outcome(await connection.reason_for(error), problem)
        await connection.drop_streams()
        await self._stop_tracking()
        told = connection.speaking and await self._confirmed(connection.link)
        await connection.close()
        if told or not self.session.must_reconnect:
            await self._survival_over()
        self.end_with(error)
        return error

    async def _withdraw_commit(self) -> None:
        """Withdraw COMMIT from the journal, since the next agent would trust it.  Until then the guest stays paused."""
        while not await self._stage.withdraw_commit():  # noqa: ASYNC110 - each round is a try
            await asyncio.sleep(self._timeouts.reconnect_interval)

    async def _write_again(self) -> None:
        """Write the entry again: the next agent must find a guest that does not run, or a target that was not told."""
        if not self._stage.written:
            await log_errors(self._stage.write("active"), self.log, "write the journal")

    async def _run_on(self, work: Coroutine[Any, Any, None]) -> Exception | None:
        """Run the guest here; return the error if it does not run although its process exists."""
        try:
            await work
        except Exception as problem:  # noqa: BLE001 - the rest of the rollback continues
            self.log.error("cannot resume the guest here", error=str(problem))  # noqa: TRY400 - expected: no traceback
            entry = self._stage.entry
            if entry is None or await _ends(entry):
                return None  # the watcher reports that the process exited, if that is news
            self._stuck = True
            return problem
        return None

    @staticmethod
    def _outcome(error: BaseException, problem: Exception | None) -> BaseException:
        """Return the error to end with: ``error``, or that the guest does not run."""
        if problem is None:
            return error
        why = as_migrated_error(problem)
        return GuestError(
            f"{as_migrated_error(error).message}; and the guest does not run on here: {why.message}",
            code="guest-not-resumed",
            hint=why.hint
            if why.code == "guest-not-resumed" and why.hint
            else "it is here and may be paused: start the source agent again, which tries again, or let it run by hand",
        )

    async def _confirmed(self, link: ControlLink) -> bool:
        """Wait for the target to confirm that nothing of the guest is left there; return whether it did."""
        try:
            async with within(self._timeouts.abort, "the target to clean up"):
                while not isinstance(await link.receive(after_abort=True), Aborted):
                    pass
        except Exception as problem:  # noqa: BLE001 - `_settle` tries again
            self.log.warning("the target did not confirm the abort", error=str(problem))
            return False
        return True

    async def _settle(self, error: BaseException) -> None:
        """Keep trying to abort on a target that may hold a loaded guest and wait for our decision."""
        while self.session.must_reconnect:
            await self._write_again()
            await self._tries.pause()
            async with self._next_connection() as connection:
                try:
                    link = await self._dial(connection)
                    await link.send(self._resume(committed=False))
                    await link.send(abort_of(error))
                    if await self._confirmed(link):
                        self.log.info("settled: nothing is left on the target")
                except Exception as problem:  # noqa: BLE001 - the next try follows
                    self.log.info(
                        "cannot abort on the target yet", error=str(problem), next_try_seconds=self._tries.seconds
                    )
        await self._survival_over()

    async def _survival_over(self) -> None:
        """The next agent need not go on with this.  First the record: an evacuation asks it how the migration ended."""
        await self.recorded()
        await (self._recovery_state.release_descriptors() if self._stuck else self._recovery_state.clear())

    # ------------------------------------------------------------ recovery after a restart

    async def _take_up(self, recovered: Recovered) -> BaseException | None:
        """Continue for the previous agent: roll back (return the error), or serve the frozen memory again."""
        entry = recovered.entry
        if not self.session.committed:
            if not process_lives(entry.pid, entry.pid_started):
                error: BaseException = GuestError(
                    "the source agent was restarted before COMMIT; the guest has ended", code="guest-died"
                )
            elif recovered.superseded:  # only this migration's target must still be told
                error = MigratedError(
                    "the source agent was restarted before COMMIT; a later migration has the guest",
                    code="agent-restarted",
                )
            else:
                error = self._outcome(recovered.error, await self._run_on(self._guest.reclaim(entry.guest)))
            self.end_with(error)
            return error
        if not self.session.position.done:
            self.record.page_size = max(entry.page_bytes)
            self.record.total_bytes = sum(region.size_bytes for region in recovered.memory.regions)
            await in_thread(self._make_engine(recovered.memory, entry.page_bytes).freeze_whole)
            self.log.warning("recovered the frozen memory after a restart of the agent")
        return None

    # ------------------------------------------------------------ clean-up

    async def _stop_tracking(self) -> None:
        """Remove dirty tracking from the guest, also if it was only partly attached."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            await log_errors(in_thread(tracker.disarm), self.log, "disarm dirty tracking")
            tracker.close()
        await log_errors(self._guest.release_tracking(), self.log, "release dirty tracking")

    async def _let_go(self) -> None:
        await self.stop_background()
        await self.connection.close()
        if self._tracker is not None and self.session.guest_may_run_here:
            await self._stop_tracking()
        elif self._tracker is not None:  # the tracking in the guest stays: the guest never runs here again
            self._tracker.close()
        if self.engine is not None:
            await self.engine.close()
        recovered, self._recovered = self._recovered, None
        if recovered is not None:  # kept descriptors belong to us, not to the driver
            for fd in recovered.memory.memory_fds:
                os.close(fd)
        await log_errors(self._guest.close(), self.log, "close the guest's connections")

    # ------------------------------------------------------------ watching

    async def _watch_guest(self) -> None:
        how = await self._guest.died()
        if self._released:
            return
        if self.session.committed:
            self.log.warning("the paused guest's process has exited; only its shared memory is left", how=how)
            return
        self.fail(
            GuestError(
                f"guest {self.record.guest} {how} while it was being moved",
                code="guest-died",
                hint="nothing was left on the target; see the guest's own log",
            )
        )

    def on_engine_event(self, event: Event) -> None:
        """Handle an engine event.  After Done the page connections end, which is not a failure."""
        if event.kind is EventKind.ROUND_DONE:
            self._rounds_done.put_nowait(event.value)
        elif event.kind is not EventKind.STREAM_LOST or not self.session.position.done:
            super().on_engine_event(event)

    # ------------------------------------------------------------ verbs

    def abort(self) -> None:
        """Abort the migration; only before COMMIT."""
        if self.session.committed or self.record.ended:
            raise ConflictError(
                f"migration {self.id} is {self.record.state} and cannot be aborted any more",
                state=self.record.state.value,
                hint="the guest belongs to the target now: let it finish, or `migrated resume` if it is paused"
                if self.session.committed
                else "it has ended",
            )
        self.fail(AbortedError(f"migration {self.id} was aborted on request"))

    def switchover(self) -> None:
        """End pre-copy after the current round."""
        if self.record.state not in (State.SETUP, State.PRECOPY):
            raise ConflictError(
                f"migration {self.id} is {self.record.state}: there is no pre-copy to end",
                state=self.record.state.value,
            )
        self._switch_now.set()

    def resume(self, address: Address | None = None) -> None:
        """Reconnect now, optionally to another address."""
        if self.record.state not in (State.POSTCOPY_PAUSED, State.RECOVERING):
            raise ConflictError(
                f"migration {self.id} is {self.record.state}, not postcopy-paused", state=self.record.state.value
            )
        if address is not None:
            self._dialer.address = address
            self.record.peer = str(address)
            self.background(log_errors(self._stage.rewrite(), self.log, "write the journal"))
        self._tries.skip()

    def limits_changed(self) -> None:
        """Apply limits that `set` has changed."""
        self.record.max_bandwidth_bytes_per_second = self.options.max_bandwidth
        if self.engine is not None and self.engine.alive:
            self.engine.set_bandwidth(self.options.max_bandwidth, self.options.drain_bandwidth)
        self.background(log_errors(self._stage.rewrite(), self.log, "write the journal"))
        self.notify()

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """Update the record from the engine's counters."""
        if self.engine is not None and self.engine.alive:
            figures.of_source(self.record, self.engine.stats(), self._rates, frozen=self.session.committed)


async def _ends(entry: SourceEntry) -> bool:
    """Return whether the guest's process has exited, or exits within `DYING_SECONDS`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DYING_SECONDS):
            while process_lives(entry.pid, entry.pid_started):  # noqa: ASYNC110 - it need not be a child of ours
                await asyncio.sleep(0.02)
    return not process_lives(entry.pid, entry.pid_started)
