"""A scope: the first failure ends the block and all beside it.  Pauses between tries."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from migrated.errors import AbortedError, GuestError, MigratedError
from migrated.waiting import Backoff, Scope, drop, within

PATIENCE_SECONDS = 30.0


class Block:
    """A block in a scope, executed by a task of its own; takes its time to end."""

    def __init__(self) -> None:
        self.scope = Scope()
        self.begun = asyncio.Event()
        self.proceed = asyncio.Event()
        self.stopped = asyncio.Event()  # done or cancelled
        self.cleaned = asyncio.Event()
        self.steps: list[str] = []

    async def run(self) -> str:
        async with self.scope:
            self.begun.set()
            try:
                await self.proceed.wait()
                self.steps.append("done")
                self.stopped.set()
            except asyncio.CancelledError:
                self.steps.append("cancelled")
                self.stopped.set()
                await self.cleaned.wait()
                self.steps.append("cleaned")
                raise
        return "result"


@pytest.fixture
def block() -> Block:
    return Block()


async def begin(block: Block) -> asyncio.Task[str]:
    running = asyncio.ensure_future(block.run())
    await block.begun.wait()
    return running


async def fail(scope: Scope, failing: Scope) -> None:
    """Wait in one for the failure of that or of another."""
    async with scope:
        failing.fail(GuestError("enough"))
        await asyncio.Event().wait()


async def test_a_block_that_succeeds(block: Block) -> None:
    block.proceed.set()
    assert await block.run() == "result"
    assert block.scope.failure is None


async def test_a_failure_cancels_the_block_and_waits_for_its_end(block: Block) -> None:
    running = await begin(block)
    block.scope.fail(AbortedError("enough"))
    await block.stopped.wait()
    assert not running.done()
    block.cleaned.set()
    with pytest.raises(AbortedError, match="enough"):
        await running
    assert block.steps == ["cancelled", "cleaned"]


async def test_a_block_that_has_come_to_its_end_has_succeeded() -> None:
    scope = Scope()
    async with scope:
        await asyncio.sleep(0)
        scope.fail(AbortedError("too late"))
    with pytest.raises(AbortedError, match="too late"):
        scope.check()


async def test_a_block_that_cannot_be_stopped_any_more_has_succeeded() -> None:
    scope = Scope()
    async with scope:
        scope.fail(AbortedError("enough"))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def test_the_failure_is_raised_where_the_block_failed_of_it() -> None:
    """The link is lost: the block sees a broken pipe, the user reads why."""

    async def fail_twice(scope: Scope) -> None:
        async with scope:
            scope.fail(GuestError("the guest has died", code="guest-died"))
            raise OSError("broken pipe")

    with pytest.raises(GuestError, match="has died"):
        await fail_twice(Scope())


async def test_a_block_that_fails_by_itself_says_why() -> None:
    with pytest.raises(MigratedError, match="no"):
        async with Scope():
            raise MigratedError("no")


async def test_a_failure_from_before_ends_the_block_at_its_first_wait(block: Block) -> None:
    block.scope.fail(AbortedError("enough"))
    block.cleaned.set()
    for _ in range(2):  # it stays failed
        with pytest.raises(AbortedError):
            await block.run()


async def test_the_first_failure_is_kept(block: Block) -> None:
    running = await begin(block)
    block.cleaned.set()
    block.scope.fail(GuestError("first"))
    block.scope.fail(AbortedError("second"))
    with pytest.raises(GuestError, match="first"):
        await running


async def test_a_task_that_fails_ends_the_block(block: Block) -> None:
    async def crash() -> None:
        raise ValueError("a bug")

    running = await begin(block)
    block.cleaned.set()
    block.scope.spawn(crash())
    with pytest.raises(ValueError, match="a bug"):
        await running


@pytest.mark.parametrize("fails", [True, False])
async def test_the_tasks_are_over_when_the_block_is_left(fails: bool) -> None:
    steps: list[str] = []

    async def long() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("over")

    scope = Scope()
    with contextlib.suppress(AbortedError):
        async with scope:
            for _ in range(3):
                scope.spawn(long())
            await asyncio.sleep(0)
            if fails:
                scope.fail(AbortedError("enough"))
                await asyncio.Event().wait()
    assert steps == ["over"] * 3


@pytest.mark.parametrize("failed", [True, False])
async def test_cancelled_from_outside_it_is_cancelled(block: Block, failed: bool) -> None:
    running = await begin(block)
    if failed:
        block.scope.fail(AbortedError("enough"))
    running.cancel()
    await block.stopped.wait()
    assert not running.done()
    block.cleaned.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert block.steps == ["cancelled", "cleaned"]


async def test_the_failure_of_one_around_it_is_not_its_own() -> None:
    steps: list[str] = []

    async def one_in_the_other(outer: Scope) -> None:
        async with outer:
            try:
                await fail(Scope(), outer)
            except MigratedError:
                steps.append("taken for the inner one's")

    with pytest.raises(GuestError, match="enough"):
        await one_in_the_other(Scope())
    assert not steps


async def test_after_a_failure_its_task_goes_on_as_if_it_had_never_been_cancelled() -> None:
    scope = Scope()
    with pytest.raises(GuestError):
        await fail(scope, scope)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(MigratedError, match="nothing"):
        async with within(0.01, "nothing"):
            await asyncio.Event().wait()


async def test_a_block_that_loses_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrated.waiting.CANCEL_AGAIN_SECONDS", 0.01)
    swallowed = 0

    async def stubborn(scope: Scope) -> None:
        nonlocal swallowed
        async with scope:
            scope.fail(MigratedError("enough"))
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    swallowed += 1
                    if swallowed > 1:
                        raise

    with pytest.raises(MigratedError, match="enough"):
        await stubborn(Scope())
    assert swallowed == 2


async def test_a_task_that_fails_as_it_is_dropped_is_not_reported() -> None:
    """The connection ends, and the migration is cancelled: the end is reported once, and not as a bug."""
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def lost() -> None:
        raise MigratedError("the connection is lost")

    tasks = [asyncio.ensure_future(lost()), asyncio.ensure_future(asyncio.Event().wait())]
    await asyncio.sleep(0)
    await drop(*tasks)
    assert all(task.done() for task in tasks)
    tasks.clear()
    gc.collect()
    assert reported == []


# ---------------------------------------------------------------- pauses between tries


async def test_the_first_try_is_made_at_once_and_each_pause_doubles() -> None:
    tries = Backoff(0.001, 0.003)
    pauses = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        for _ in range(4):
            await tries.pause()
            pauses.append(tries.seconds)
        tries.reset()
    assert [*pauses, tries.seconds] == [0.001, 0.002, 0.003, 0.003, 0.001]


async def test_after_a_success_the_next_try_is_not_made_at_once() -> None:
    """A peer that ends every connection as soon as it is made is not dialled without a pause."""
    tries = Backoff(3600.0, 3600.0)
    await tries.pause()
    tries.reset()
    waiting = asyncio.ensure_future(tries.pause())
    await asyncio.sleep(0)
    assert not waiting.done()
    tries.skip()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await waiting


async def test_a_skip_during_a_try_counts_for_the_next_pause() -> None:
    tries = Backoff(3600.0, 3600.0)
    await tries.pause()
    tries.skip()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await tries.pause()
