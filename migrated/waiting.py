"""Every wait has a limit and an error that names what was waited for; tasks that belong together fail together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from migrated.errors import TimeoutExceededError

T = TypeVar("T")

#: A cancelled piece of work that is not over after so long is cancelled again.
CANCEL_AGAIN_SECONDS = 3.0


async def in_thread(function: Callable[..., T], *arguments: Any, undo: Callable[[T], None] | None = None) -> T:
    """``asyncio.to_thread`` that is over when it returns, cancelled or not.

    A thread cannot be cancelled: whoever cleans up after a cancellation would otherwise do so beside it.  ``undo`` takes
    the result (a descriptor, say) back when nobody is left to take it; it runs in a thread too.
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
    """End the block after ``limit_seconds`` with a TimeoutExceededError that says ``what`` was waited for."""
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
    """Cancel it and wait until it is over.

    Cancelled again now and then: a cancellation that meets the end of an ``asyncio.wait_for`` is lost (Python 3.11), and a
    library's may be; the work would go on as if nothing had been asked.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)


class Scope:
    """A block, and tasks beside it, that fail together.

        async with scope:
            scope.spawn(read())
            await write()

    The first failure, reported by `fail` or raised by a task, cancels the block and is raised where the block ends, whatever
    else broke because of it.  A block that has come to its end has succeeded, whatever failed meanwhile.  The tasks are over
    when the block is left.

    This is ``asyncio.TaskGroup`` but for three things: others may report a failure, also before the block is entered; one
    exception is raised, not a group; and the block is cancelled again and again until it ends (see `cancel_and_wait`).
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._block: asyncio.Task[Any] | None = None  # the task that executes the block, while it does
        self._cancel_at: asyncio.Handle | None = None
        self._cancelled = 0

    def fail(self, error: BaseException) -> None:
        """End the block with ``error``, or with the failure before it."""
        if self.failure is None:
            self.failure = error
            if self._block is not None:
                self._cancel_at = asyncio.get_running_loop().call_soon(self._cancel)

    def check(self) -> None:
        """Raise the failure, if there is one: the block is told a moment after `fail`."""
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
    """Pauses between tries: ``first`` seconds, then twice as long after each try that fails, up to ``limit``.

    The first try is made at once.  So is one after a success (`reset`), but not within ``first`` seconds of the beginning of
    the try that succeeded: a peer that ends every connection is not dialled in a loop.
    """

    def __init__(self, first: float, limit: float) -> None:
        self.seconds = first  # the pause that follows the present try, should it fail
        self._first, self._limit = first, limit
        self._failing = False
        self._not_before = 0.0
        self._now = asyncio.Event()

    async def pause(self) -> None:
        """Until it is time for the next try, or `skip`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.seconds if self._failing else self._not_before
        if self._failing:
            self.seconds = min(2 * self.seconds, self._limit)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._now.wait()
        self._now.clear()  # before the try: who asks while it is under way means the next one
        self._failing = True
        self._not_before = loop.time() + self._first

    def skip(self) -> None:
        """Begin the next try now."""
        self._now.set()

    def reset(self) -> None:
        """The present try has succeeded."""
        self._failing = False
        self.seconds = self._first
