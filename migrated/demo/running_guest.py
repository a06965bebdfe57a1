"""Run the first process of a demo's guest in a session of its own.

We watch it over its console and end it if it is still there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from migrated.demo.console import GuestConsole
from migrated.waiting import within

END_SECONDS = 10


class RunningGuest:
    """The base class of the guests, which add a `start` of their own.  ``log_path`` has the process's output."""

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self.console = GuestConsole(name)
        self.process: asyncio.subprocess.Process | None = None

    async def _launch(self, *command: str, env: Mapping[str, str] | None = None) -> asyncio.subprocess.Process:
        with self.log_path.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        return self.process

    async def stop(self) -> None:
        """Close the console, and end the process if it still runs because the guest did not move."""
        await self.console.close()
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            async with within(END_SECONDS, f"the first process of {self.name} to end"):
                await process.wait()
