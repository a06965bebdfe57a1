"""Every wait has a limit, every limit an error that names what was waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

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


async def end(task: asyncio.Future[Any]) -> None:
    """Cancel it and wait until it is over.

    Cancelled again now and then: a cancellation that meets the end of an ``asyncio.wait_for`` is lost (Python 3.11), and a
    library's may be; the work would go on as if nothing had been asked.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)
