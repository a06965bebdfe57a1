"""The first process of a demo's guest: started apart from us, watched over its console, ended if it is still there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from migrated.demo.console import GuestConsole
from migrated.waiting import within

END_SECONDS = 10


class RunningGuest:
    """Base of the kinds of guest; each adds a `start` of its own.  What the process says is in ``log_path``."""

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
        """Let go of the console, end the process if it is still there: it is, if the guest did not move."""
        await self.console.close()
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            async with within(END_SECONDS, f"the first process of {self.name} to end"):
                await process.wait()
