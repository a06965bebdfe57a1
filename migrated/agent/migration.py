"""The base of a migration on either side: its record, its watchers and the one task that runs it.

The source's and the target's flows build on `Migration`, which owns the state changes and the final clean-up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from migrated.agent.connection import Connection
from migrated.agent.history import History
from migrated.agent.hooks import Hooks
from migrated.agent.record import NEXT, ErrorInfo, Laps, Record, State, StateChange
from migrated.agent.tracing import Trace, Tracing
from migrated.errors import AbortedError, MigratedError, as_migrated_error, log_fields
from migrated.memory.engine import Event, EventKind
from migrated.waiting import cancel_and_wait

if TYPE_CHECKING:
    from migrated.config import HooksSection
    from migrated.memory.engine import SourceEngine, TargetEngine

#: Watchers are notified of new figures at most this often.
TICK_SECONDS = 0.5
#: State changes that a record keeps.
TIMELINE_CHANGES = 200


class FinalError(Exception):
    """A failure that no new connection can repair.  The migration fails; what is kept for the next agent stays."""

    def __init__(self, error: MigratedError) -> None:
        super().__init__(str(error))
        self.error = error


class Migration:
    """Base of both sides."""

    role = ""

    def __init__(self, record: Record, hooks: HooksSection) -> None:
        self.record = record
        self.log = structlog.get_logger(f"migrated.{self.role}").bind(migration=record.id, guest=record.guest)
        self.connection = Connection(self)  # the current one, or the previous one until the next is made
        self.engine: SourceEngine | TargetEngine | None = None
        self.trace = Trace()  # the agent puts a real one in its place
        self.hooks = Hooks(hooks, record, self.log)
        self.history = History(record.id)
        self._laps = Laps(record.downtime_breakdown)  # of the downtime
        self.on_end: Callable[[Record], asyncio.Future[None] | None] | None = None  # what it returns stores the record
        self._recording: asyncio.Future[None] | None = None
        self._over = False
        self._watchers: set[asyncio.Event] = set()
        self._background: set[asyncio.Task[Any]] = set()
        record.timeline.append(StateChange(record.state, record.started_at))

    # ------------------------------------------------------------ state

    @property
    def id(self) -> str:
        """The migration's id, as in the record."""
        return self.record.id

    def set_state(self, state: State, error: BaseException | None = None) -> None:
        """Change the state (only here): check the table, append to the time line, log, notify watchers."""
        before = self.record.state
        if state is before:
            return
        if state not in NEXT[before]:
            raise MigratedError(f"migration {self.id}: no way from {before} to {state}: this is a bug")
        now = time.time()
        if error is not None:
            self.record.error = ErrorInfo.of(error)
        self._add_to_timeline(StateChange(state, now))
        self.record.state = state
        if self.record.ended:
            self.refresh()
            self.record.ended_at = now
            if self.on_end is not None:
                self._recording = self.on_end(self.record)
        self.history.sample(self.record, always=True)
        level = self.log.warning if error is not None else self.log.info
        level("state", before=before.value, state=state.value, **(log_fields(error) if error is not None else {}))
        self._enter_in_trace(state, error)
        self.hooks.on(state)
        self.notify()

    async def recorded(self) -> None:
        """Wait until the record of a migration that has ended is stored, where records are stored."""
        if self._recording is not None:
            await asyncio.wait([self._recording])

    def _add_to_timeline(self, change: StateChange) -> None:
        """Append a change.  If full, drop one in the middle: a link that flaps for weeks must not grow the record."""
        timeline = self.record.timeline
        timeline.append(change)
        if len(timeline) > TIMELINE_CHANGES:
            del timeline[TIMELINE_CHANGES // 2]

    def traced_by(self, tracing: Tracing, *, parent: str, started_at: float | None) -> None:
        """Trace this migration from now on.  ``started_at``: when a former agent began it."""
        began = self.record.started_at if started_at is None else started_at
        try:
            self.trace = tracing.begin(self.record, self._laps, parent=parent, started_at=began)
        except Exception as problem:  # noqa: BLE001 - as below
            self._stop_tracing(problem)

    def _enter_in_trace(self, state: State, error: BaseException | None) -> None:
        try:
            self.trace.enter(state, error)
        except Exception as problem:  # noqa: BLE001 - a library's: it must not end a migration, least of all after COMMIT
            self._stop_tracing(problem)

    def _stop_tracing(self, problem: Exception) -> None:
        self.trace = Trace()
        self.log.warning("this migration is no longer traced", error=str(problem))

    def notify(self) -> None:
        """Wake the watchers."""
        for watcher in self._watchers:
            watcher.set()

    def fail(self, error: BaseException) -> None:
        """Cancel the work on the current connection with ``error``."""
        self.connection.alive.fail(error)

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task beside the flow, across connections, until `stop_background`.  Its crash fails the connection."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    async def stop_background(self) -> None:
        """Cancel all running background tasks and wait for them."""
        tasks = [task for task in self._background if task is not asyncio.current_task()]
        await asyncio.gather(*(cancel_and_wait(task) for task in tasks))

    @property
    def over(self) -> bool:
        """Whether `run` has finished: only the record of this migration is left in this process."""
        return self._over

    @property
    def waits_for_peer(self) -> bool:
        """Whether only the other agent can make progress."""
        return self.record.state in (State.POSTCOPY_PAUSED, State.RECOVERING) or self.record.ended

    # ------------------------------------------------------------ running

    async def run(self) -> None:
        """Run the whole migration.  It ends in a final state; this never raises an Exception."""
        structlog.contextvars.bind_contextvars(migration=self.id, guest=self.record.guest)  # also for the driver's log
        ticker = asyncio.ensure_future(self.tick())
        try:
            await self._migrate()
            await log_errors(self.history.page_map(self.engine, now=True), self.log, "read the last page map")
        except FinalError as final:
            self.set_state(State.FAILED, final.error)
        except Exception as error:  # noqa: BLE001 - the last resort
            self._fail_unforeseen(error)
        finally:
            ticker.cancel()
            try:
                await self._let_go()
            except Exception as error:  # noqa: BLE001 - a failed clean-up must not keep the agent from exiting
                self._fail_unforeseen(error)
            finally:
                self._over = True
            await log_errors(self._after_the_end(), self.log, "finish")
            await self.hooks.finish()

    async def _migrate(self) -> None:
        """Run the flow, failures included; return in a final state."""
        raise NotImplementedError

    async def _let_go(self) -> None:
        """Release descriptors, threads and tasks, also when cancelled.  The guest stays as it is."""
        await self.stop_background()

    async def _after_the_end(self) -> None:
        """Do what remains after everything has been released."""

    def end_with(self, error: BaseException) -> None:
        """End as aborted if somebody on either side asked for it, else as failed."""
        asked = as_migrated_error(error).code == AbortedError.default_code
        self.set_state(State.ABORTED if asked else State.FAILED, error)

    def _fail_unforeseen(self, error: Exception) -> None:
        """Handle an unexpected error in `run`: a bug ends this migration in a defined state, never the agent."""
        self.log.error("unexpected error in a migration: this is a bug", error=str(error), exc_info=error)
        if not self.record.ended:
            self.record.state = State.FAILED
            self.record.error = ErrorInfo.of(error)
            self.record.timeline.append(StateChange(State.FAILED, time.time()))
            self._enter_in_trace(State.FAILED, error)
        if self.record.ended_at is None:  # also when ending it is what failed
            self.record.ended_at = time.time()
            try:
                if self.on_end is not None:
                    self.on_end(self.record)
            except Exception as problem:  # noqa: BLE001 - as above
                self.log.warning("cannot record the end of a migration", error=str(problem))
        self.notify()

    def abort(self) -> None:
        """Abort the migration; ConflictError when that is no longer possible."""
        raise NotImplementedError

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """Update the record's figures.  Each side implements this."""

    async def tick(self) -> None:
        """Refresh the figures and notify watchers until the migration has ended."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self.record.ended:
                return  # the final figures stay
            self.refresh()
            self.history.sample(self.record)
            self.notify()

    async def events(self) -> AsyncIterator[Record]:
        """Yield the record now and whenever it changes, until it has ended."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                ended = self.record.ended  # it may end while the watcher handles this one: then yield again
                if not ended:
                    self.refresh()
                yield self.record
                if ended:
                    return
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    def on_engine_event(self, event: Event) -> None:
        """Fail the connection on a lost stream or a failed engine.  Runs in the event loop."""
        if event.kind in (EventKind.STREAM_LOST, EventKind.FAILED):
            error = event.error or MigratedError(f"stream {event.stream} ended")
            self.log.warning("engine", kind=event.kind.name, stream=event.stream, error=str(error))
            self.fail(error)


async def log_errors(work: Coroutine[Any, Any, Any], log: Any, what: str) -> bool:
    """Run one clean-up step and return whether it succeeded.  A failure is logged, and the next step still runs."""
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - one failed step must not stop the clean-up
        log.warning("clean-up step failed", step=what, error=str(error))
        return False
    return True
