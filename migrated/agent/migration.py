"""What a migration is on either side: a record that follows the table, people who watch it, and one task that does it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from migrated.agent.connection import Connection
from migrated.agent.record import NEXT, ErrorInfo, Record, State, StateChange
from migrated.errors import AbortedError, MigratedError, as_migrated_error
from migrated.memory.engine import Event, EventKind
from migrated.waiting import cancel_and_wait

if TYPE_CHECKING:
    from migrated.memory.engine import SourceEngine, TargetEngine

#: Figures are told to watchers at most this often.
TICK_SECONDS = 0.5
#: Changes of state that a record keeps.
TIMELINE_CHANGES = 200


class FinalError(Exception):
    """What no later connection mends: the migration has failed with ``error``, and what is kept for the next agent stays."""

    def __init__(self, error: MigratedError) -> None:
        super().__init__(str(error))
        self.error = error


class Migration:
    """Base of both sides."""

    role = ""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.log = structlog.get_logger(f"migrated.{self.role}").bind(migration=record.id, guest=record.guest)
        self.connection = Connection(self)  # the present one, or between two of them the one before
        self.engine: SourceEngine | TargetEngine | None = None
        self.on_end: Callable[[Record], None] | None = None
        self._over = False
        self._watchers: set[asyncio.Event] = set()
        self._background: set[asyncio.Task[Any]] = set()
        record.timeline.append(StateChange(record.state, record.started_at))

    # ------------------------------------------------------------ state

    @property
    def id(self) -> str:
        """As in the record."""
        return self.record.id

    def set_state(self, state: State, error: BaseException | None = None) -> None:
        """The only place a migration's state changes: checks the table, writes the time line, logs, tells watchers."""
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
                self.on_end(self.record)
        level = self.log.warning if error is not None else self.log.info
        level("state", before=before.value, state=state.value, **({"error": str(error)} if error else {}))
        self.notify()

    def _add_to_timeline(self, change: StateChange) -> None:
        """Its beginning and its end stay; a link that flaps for weeks must not make the record grow."""
        timeline = self.record.timeline
        timeline.append(change)
        if len(timeline) > TIMELINE_CHANGES:
            del timeline[TIMELINE_CHANGES // 2]

    def notify(self) -> None:
        """Wake watchers."""
        for watcher in self._watchers:
            watcher.set()

    def fail(self, error: BaseException) -> None:
        """End what is being done over the present connection."""
        self.connection.alive.fail(error)

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run beside the flow, over all connections; cancelled by `stop_background`; a crash ends the present connection."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    async def stop_background(self) -> None:
        """Cancel everything `background` still runs."""
        tasks = [task for task in self._background if task is not asyncio.current_task()]
        await asyncio.gather(*(cancel_and_wait(task) for task in tasks))

    @property
    def over(self) -> bool:
        """Whether `run` has returned: nothing of this migration is left in this process but the record."""
        return self._over

    @property
    def waits_for_peer(self) -> bool:
        """Whether only the other agent can bring it on."""
        return self.record.state in (State.POSTCOPY_PAUSED, State.RECOVERING) or self.record.ended

    # ------------------------------------------------------------ begin and end

    async def run(self) -> None:
        """The whole migration; ends in a final state, never raises."""
        ticker = asyncio.ensure_future(self.tick())
        try:
            await self._migrate()
        except FinalError as final:
            self.set_state(State.FAILED, final.error)
        except Exception as error:  # noqa: BLE001 - the last resort
            self._fail_unforeseen(error)
        finally:
            ticker.cancel()
            try:
                await self._let_go()
            except Exception as error:  # noqa: BLE001 - what is left of it must not keep the agent from ending
                self._fail_unforeseen(error)
            finally:
                self._over = True
            await log_errors(self._after_the_end(), self.log, "say the last")

    async def _migrate(self) -> None:
        """The flow, failures included; returns in a final state."""
        raise NotImplementedError

    async def _let_go(self) -> None:
        """Descriptors, threads, tasks: whatever the end was, cancelled too.  Leaves the guest as it is."""
        await self.stop_background()

    async def _after_the_end(self) -> None:
        """What is still to be said once nothing of the migration is left."""

    def end_with(self, error: BaseException) -> None:
        """As aborted where somebody asked for it, here or on the other side, else as failed."""
        asked = as_migrated_error(error).code == AbortedError.default_code
        self.set_state(State.ABORTED if asked else State.FAILED, error)

    def _fail_unforeseen(self, error: Exception) -> None:
        """The last resort of `run`: a mistake of ours ends this migration in a named state, never the agent."""
        self.log.error("a migration met an error nobody foresaw: this is a bug", error=str(error), exc_info=error)
        if not self.record.ended:
            self.record.state = State.FAILED
            self.record.error = ErrorInfo.of(error)
            self.record.timeline.append(StateChange(State.FAILED, time.time()))
        if self.record.ended_at is None:  # also when it was the end itself that failed
            self.record.ended_at = time.time()
            try:
                if self.on_end is not None:
                    self.on_end(self.record)
            except Exception as problem:  # noqa: BLE001 - as above
                self.log.warning("the end of a migration cannot be recorded", error=str(problem))
        self.notify()

    def abort(self) -> None:
        """Give up; ConflictError when that cannot be done any more."""
        raise NotImplementedError

    # ------------------------------------------------------------ figures

    def refresh(self) -> None:
        """Bring the record's figures up to date; each side knows how."""

    async def tick(self) -> None:
        """Refresh and tell watchers, until the end or cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self.record.ended:
                return  # the figures of the end stay
            self.refresh()
            self.notify()

    async def events(self) -> AsyncIterator[Record]:
        """The record now and whenever it changes, until it has ended."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                ended = self.record.ended  # it may end while the watcher holds what we give: then once more
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
        """What ends a connection, on both sides; runs in the loop."""
        if event.kind in (EventKind.STREAM_LOST, EventKind.FAILED):
            error = event.error or MigratedError(f"stream {event.stream} ended")
            self.log.warning("engine", kind=event.kind.name, stream=event.stream, error=str(error))
            self.fail(error)


async def log_errors(work: Coroutine[Any, Any, Any], log: Any, what: str) -> bool:
    """Run one step of a clean-up and return whether it worked: what fails is logged, the next step still runs."""
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - a clean-up goes on whatever one of its steps meets
        log.warning("clean-up step failed", step=what, error=str(error))
        return False
    return True
