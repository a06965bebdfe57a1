"""Every wait has a limit, every limit an error that names what was waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from migrated.errors import TimeoutExceededError


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
