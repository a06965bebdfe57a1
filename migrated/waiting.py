"""Helpers for waiting and for structured concurrency on asyncio.

Every wait has a limit and an error that names what was awaited, and tasks that belong together fail together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from migrated.errors import TimeoutExceededError

T = TypeVar("T")

#: A cancelled task that has not finished after this time is cancelled again.
CANCEL_AGAIN_SECONDS = 3.0


async def in_thread(function: Callable[..., T], *arguments: Any, undo: Callable[[T], None] | None = None) -> T:
    """Run ``asyncio.to_thread``, but return only when the thread has finished, even if cancelled.

    A thread cannot be cancelled.  If it outlived a cancellation, the caller's clean-up would race with it.  ``undo``
    disposes of the result (a descriptor, say) that a cancelled caller no longer takes; it also runs in a thread.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None and undo is not None:
            await asyncio.to_thread(undo, task.result())
        raise


@contextlib.asynccontextmanager
async def within(limit_seconds: float, what: str, *, who: str = "") -> AsyncIterator[None]:
    """Limit the block to ``limit_seconds``; raise a TimeoutExceededError that names ``what`` it waited for."""
    try:
        async with asyncio.timeout(limit_seconds):
            yield
    except TimeoutError as error:
        subject = f"{who}: " if who else ""
        raise TimeoutExceededError(
            f"{subject}waited {limit_seconds:g} s for {what}",
            hint="look at the other agent's log too; the limits are in [timeouts] of the configuration",
        ) from error


async def cancel_and_wait(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has finished.

    The cancellation is repeated: one that coincides with the end of an ``asyncio.wait_for`` is lost (Python 3.11), and
    a library may lose one too.  The task would then continue as if nobody had cancelled it.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)


async def drop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have finished; something else reports what they raise.

    A task may fail just before it is cancelled.  asyncio would log that as an exception that nobody retrieved.
    """
    await asyncio.gather(*(cancel_and_wait(task) for task in tasks))
    for task in tasks:
        if not task.cancelled():
            task.exception()


class Scope:
    """A block, and tasks beside it, that fail together.

        async with scope:
            scope.spawn(read())
            await write()

    The first failure, reported by `fail` or raised by a task, cancels the block and is raised where the block ends;
    failures that follow from it are not.  A block that reaches its end has succeeded, whatever else failed.  All tasks
    have finished when the block is left.

    This differs from ``asyncio.TaskGroup`` in three ways: others may report a failure, even before the block is
    entered; it raises one exception, not a group; and it repeats the cancellation until the block ends (see
    `cancel_and_wait`).
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._block: asyncio.Task[Any] | None = None  # the task that is executing the block
        self._cancel_at: asyncio.Handle | None = None
        self._cancelled = 0

    def fail(self, error: BaseException) -> None:
        """End the block with ``error``, unless it has failed already."""
        if self.failure is None:
            self.failure = error
            if self._block is not None:
                self._cancel_at = asyncio.get_running_loop().call_soon(self._cancel)

    def check(self) -> None:
        """Raise the failure, if there is one: `fail` cancels the block only a moment later."""
        if self.failure is not None:
            raise self.failure

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work`` beside the block."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def _cancel(self) -> None:
        if self._block is not None:
            self._cancelled += 1
            self._block.cancel()
            self._cancel_at = asyncio.get_running_loop().call_later(CANCEL_AGAIN_SECONDS, self._cancel)

    async def __aenter__(self) -> Self:
        self._block = asyncio.current_task()
        if self.failure is not None:
            self._cancel_at = asyncio.get_running_loop().call_soon(self._cancel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        if self._cancel_at is not None:
            self._cancel_at.cancel()
        from_outside = block is not None and block.cancelling() > self._cancelled
        while block is not None and self._cancelled:
            self._cancelled -= 1
            block.uncancel()
        await asyncio.gather(*(cancel_and_wait(task) for task in set(self._tasks)))
        if error is not None and self.failure is not None and not (kind is asyncio.CancelledError and from_outside):
            raise self.failure


class Backoff:
    """Pauses between tries: ``first`` seconds, then twice as long after each failed try, up to ``limit``.

    The first try starts at once.  So does the try after a success (`reset`), but no sooner than ``first`` seconds after
    the successful one began: a peer that closes every connection is not dialled in a tight loop.
    """

    def __init__(self, first: float, limit: float) -> None:
        self.seconds = first  # the pause after the current try, if it fails
        self._first, self._limit = first, limit
        self._failing = False
        self._not_before = 0.0
        self._now = asyncio.Event()

    async def pause(self) -> None:
        """Wait until it is time for the next try, or until `skip`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.seconds if self._failing else self._not_before
        if self._failing:
            self.seconds = min(2 * self.seconds, self._limit)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._now.wait()
        self._now.clear()  # before the try: a `skip` during it means the next one
        self._failing = True
        self._not_before = loop.time() + self._first

    def skip(self) -> None:
        """Start the next try now."""
        self._now.set()

    def reset(self) -> None:
        """Report that the current try has succeeded."""
        self._failing = False
        self.seconds = self._first
