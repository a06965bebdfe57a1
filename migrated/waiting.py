"""Every wait has a limit, every limit an error that names what was waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from migrated.errors import TimeoutExceededError

T = TypeVar("T")


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
