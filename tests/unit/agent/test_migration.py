"""What both sides share: background work is kept, watchers see every change, and every end is named."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from migrated.agent.migration import TIMELINE_CHANGES, FinalError, Migration, log_errors
from migrated.agent.record import Laps, Record, State
from migrated.agent.tracing import Trace, Tracing
from migrated.config import HooksSection
from migrated.errors import AbortedError, GuestError, MigratedError, NativeError, PeerError
from migrated.memory.engine import Event, EventKind

PATIENCE_SECONDS = 30.0


# ---------------------------------------------------------------- Migration


class OneMigration(Migration):
    role = "target"

    def refresh(self) -> None:
        self.record.transferred_bytes += 1


@pytest.fixture
def migration() -> OneMigration:
    return OneMigration(Record(id="0123456789ab", guest="vm1", role="target", mode="hybrid"), HooksSection())


async def test_a_watcher_sees_the_record_now_and_at_every_change_until_the_end(migration: OneMigration) -> None:
    events = migration.events()
    seen = [(await anext(events)).state]
    for state in (State.PRECOPY, State.SWITCHOVER, State.POSTCOPY, State.COMPLETED):
        migration.set_state(state)
        seen.append((await anext(events)).state)
    assert seen == [State.SETUP, State.PRECOPY, State.SWITCHOVER, State.POSTCOPY, State.COMPLETED]
    with pytest.raises(StopAsyncIteration):
        await anext(events)
    assert not migration._watchers


class BrokenTracing(Tracing):
    def begin(self, record: Record, laps: Laps, *, parent: str, started_at: float) -> Trace:
        if not parent:
            raise ValueError("a bug of the library")
        return BrokenTrace()


class BrokenTrace(Trace):
    def enter(self, state: State, error: BaseException | None) -> None:
        raise ValueError("a bug of the library")


@pytest.mark.parametrize("parent", ["", "someone's"])
async def test_what_traces_a_migration_cannot_end_it(migration: OneMigration, parent: str) -> None:
    with capture_logs() as logs:
        migration.traced_by(BrokenTracing(), parent=parent, started_at=None)
        for state in (State.PRECOPY, State.SWITCHOVER, State.POSTCOPY, State.COMPLETED):
            migration.set_state(state)
    assert [line["event"] for line in logs].count("this migration is no longer traced") == 1
    assert migration.record.ended


async def test_a_slow_watcher_misses_steps_and_never_the_end(migration: OneMigration) -> None:
    events = migration.events()
    await anext(events)
    for state in (State.PRECOPY, State.SWITCHOVER, State.COMPLETED):
        migration.set_state(state)
    assert [record.state async for record in events] == [State.COMPLETED]


async def test_a_watcher_that_comes_late_is_told_the_end(migration: OneMigration) -> None:
    migration.set_state(State.FAILED, MigratedError("x"))
    assert [record.state async for record in migration.events()] == [State.FAILED]


async def test_watchers_do_not_disturb_each_other(migration: OneMigration) -> None:
    async def watch() -> list[State]:
        return [record.state async for record in migration.events()]

    async def leave_early() -> None:
        async for _ in migration.events():
            return

    watching = [asyncio.ensure_future(watch()) for _ in range(5)]
    await leave_early()
    for state in (State.PRECOPY, State.ABORTED):
        await asyncio.sleep(0)
        migration.set_state(state)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert all(states[-1] is State.ABORTED for states in await asyncio.gather(*watching))


async def test_figures_are_refreshed_and_told_while_it_runs(migration: OneMigration) -> None:
    ticking = asyncio.ensure_future(migration.tick())
    events = migration.events()
    first = (await anext(events)).transferred_bytes
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await anext(events)).transferred_bytes > first
    ticking.cancel()


async def test_background_work_that_crashes_ends_the_connection(migration: OneMigration) -> None:
    async def crash() -> None:
        raise ValueError("a bug")

    migration.background(crash())
    with pytest.raises(ValueError, match="a bug"):
        async with asyncio.timeout(PATIENCE_SECONDS), migration.connection.alive:
            await asyncio.Event().wait()


async def test_background_work_is_ended_at_the_end(migration: OneMigration) -> None:
    steps: list[str] = []

    async def long() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("over")

    for _ in range(3):
        migration.background(long())
    await asyncio.sleep(0)
    await migration.stop_background()
    assert steps == ["over"] * 3
    assert migration.connection.alive.failure is None


def event(kind: EventKind, value: int = 0, error: MigratedError | None = None) -> Event:
    return Event(kind, 1, value, error)


@pytest.mark.parametrize("kind", [EventKind.STREAM_LOST, EventKind.FAILED])
async def test_what_an_engine_cannot_live_with_ends_the_connection(migration: OneMigration, kind: EventKind) -> None:
    reason = NativeError("stream 1: reset", kind=1)
    with capture_logs() as logs:
        migration.on_engine_event(event(kind, error=reason))
    assert migration.connection.alive.failure is reason
    assert logs[0]["error"] == "stream 1: reset"


async def test_a_stream_that_ends_without_a_word_is_named(migration: OneMigration) -> None:
    migration.on_engine_event(event(EventKind.STREAM_LOST))
    assert "stream 1 ended" in str(migration.connection.alive.failure)


# ---------------------------------------------------------------- begin and end


class Flow(OneMigration):
    """Its flow is what the test makes it; notes what follows."""

    def __init__(self, flow: Callable[[OneMigration], Awaitable[None]]) -> None:
        super().__init__(Record(id="0123456789ab", guest="vm1", role="target", mode="hybrid"), HooksSection())
        self.steps: list[str] = []
        self._flow = flow

    async def _migrate(self) -> None:
        await self._flow(self)

    async def _let_go(self) -> None:
        await super()._let_go()
        self.steps.append(f"let go, over: {self.over}")

    async def _after_the_end(self) -> None:
        self.steps.append(f"after the end, over: {self.over}")


ENDED = ["let go, over: False", "after the end, over: True"]


async def test_a_migration_lets_go_and_is_over() -> None:
    async def flow(migration: OneMigration) -> None:
        migration.background(asyncio.Event().wait())
        migration.set_state(State.PRECOPY)
        migration.end_with(GuestError("it has died"))

    migration = Flow(flow)
    await migration.run()
    assert migration.record.state is State.FAILED
    assert migration.steps == ENDED
    assert not migration._background


async def test_a_mistake_of_ours_ends_in_a_named_state() -> None:
    async def flow(migration: OneMigration) -> None:
        migration.set_state(State.COMPLETED)  # no way there from the start

    migration = Flow(flow)
    with capture_logs() as logs:
        await migration.run()
    assert migration.record.state is State.FAILED
    assert migration.record.error is not None
    assert "this is a bug" in migration.record.error.message
    assert [line["log_level"] for line in logs] == ["error"]
    assert migration.steps == ENDED


async def test_what_no_connection_mends_is_the_end() -> None:
    async def flow(_: OneMigration) -> None:
        raise FinalError(GuestError("it is gone", code="guest-gone"))

    migration = Flow(flow)
    with capture_logs() as logs:
        await migration.run()
    assert migration.record.state is State.FAILED
    assert migration.record.error is not None
    assert migration.record.error.code == "guest-gone"
    assert [line["log_level"] for line in logs] == ["warning"]
    assert migration.steps == ENDED


async def test_what_nobody_foresaw_is_archived_too() -> None:
    async def flow(_: OneMigration) -> None:
        raise ValueError("a bug")

    migration = Flow(flow)
    archived: list[Record] = []
    migration.on_end = archived.append
    await migration.run()
    assert [record.state for record in archived] == [State.FAILED]
    assert migration.record.ended_at is not None


async def test_an_end_whose_figures_fail_is_archived_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flow(migration: OneMigration) -> None:
        monkeypatch.setattr(migration, "refresh", lambda: 1 / 0)
        migration.end_with(GuestError("it has died"))

    migration = Flow(flow)
    archived: list[Record] = []
    migration.on_end = archived.append
    await migration.run()
    assert [record.error.code for record in archived if record.error] == ["guest-failed"]
    assert migration.record.ended_at is not None


async def test_a_clean_up_that_fails_ends_the_migration_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flow(migration: OneMigration) -> None:
        migration.end_with(GuestError("it has died"))

    async def stuck() -> None:
        raise OSError("cannot let go")

    migration = Flow(flow)
    monkeypatch.setattr(migration, "stop_background", stuck)
    with capture_logs() as logs:
        await migration.run()
    assert migration.over
    assert "cannot let go" in [line.get("error") for line in logs]
    assert migration.record.error is not None
    assert migration.record.error.code == "guest-failed"
    assert migration.steps == ["after the end, over: True"]


async def test_a_cancelled_migration_lets_go_too() -> None:
    async def flow(_: OneMigration) -> None:
        await asyncio.Event().wait()

    migration = Flow(flow)
    running = asyncio.ensure_future(migration.run())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert migration.record.state is State.SETUP
    assert migration.steps == ENDED


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (AbortedError("on request"), State.ABORTED),
        (PeerError("on request, there", code="aborted"), State.ABORTED),
        (PeerError("it cannot", code="no-huge-pages"), State.FAILED),
        (ValueError("a bug"), State.FAILED),
    ],
)
async def test_aborted_is_what_somebody_asked_for(migration: OneMigration, error: Exception, state: State) -> None:
    migration.end_with(error)
    assert migration.record.state is state


# ---------------------------------------------------------------- log_errors


async def test_a_clean_up_goes_on_whatever_a_step_meets() -> None:
    async def broken() -> None:
        raise OSError("no such thing")

    said: list[Any] = []

    class Log:
        def warning(self, *words: Any, **fields: Any) -> None:
            said.append((words, fields))

    await log_errors(broken(), Log(), "tidy up")
    assert said[0][1] == {"step": "tidy up", "error": "no such thing"}


async def test_a_clean_up_can_still_be_cancelled() -> None:
    stepping = asyncio.ensure_future(log_errors(asyncio.Event().wait(), None, "wait"))
    await asyncio.sleep(0)
    stepping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stepping


async def test_background_work_that_loses_its_cancellation_is_cancelled_again(
    migration: OneMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrated.waiting.CANCEL_AGAIN_SECONDS", 0.01)

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    work = migration.background(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await migration.stop_background()
    assert work.cancelled()


async def test_a_link_that_flaps_for_weeks_does_not_make_the_record_grow() -> None:
    migration = Migration(Record(id="a", guest="vm1", role="source", mode="hybrid"), HooksSection())
    for state in (State.PRECOPY, State.SWITCHOVER, State.POSTCOPY):
        migration.set_state(state)
    for _ in range(1000):
        for state in (State.POSTCOPY_PAUSED, State.RECOVERING, State.POSTCOPY):
            migration.set_state(state)
    migration.set_state(State.COMPLETED)
    timeline = [change.state for change in migration.record.timeline]
    assert len(timeline) == TIMELINE_CHANGES
    assert timeline[:4] == [State.SETUP, State.PRECOPY, State.SWITCHOVER, State.POSTCOPY]
    assert timeline[-1] is State.COMPLETED
