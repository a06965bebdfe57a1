"""Run the co-operative guest of the demo.

It needs no root, no QEMU and no huge pages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from migrated.demo.running_guest import RunningGuest
from migrated.guests.process.client import ENVIRONMENT

MIB = 1 << 20


class RunningProcess(RunningGuest):
    """``python -m migrated.demo.example`` with the source agent, and its console."""

    def __init__(self, directory: Path, *, memory_bytes: int, name: str = "demo", rate: int = 2000) -> None:
        super().__init__(name, directory / f"{name}.guest.log")
        self.memory_bytes = memory_bytes
        self._directory = directory
        self._rate = rate

    @property
    def socket(self) -> Path:
        """Where the source agent listens for the guest."""
        return self._directory / f"{self.name}.sock"

    @property
    def target_console(self) -> Path:
        """The console of the guest once it has arrived."""
        return self._directory / f"{self.name}.1.tty"

    def _command(self, console: Path) -> list[str]:
        size = str(self.memory_bytes // MIB)
        return [
            *(sys.executable, "-P", "-m", "migrated.demo.example", "--size", size, "--rate", str(self._rate)),
            *("--console", str(console)),
        ]

    def source_table(self) -> dict[str, Any]:
        """``[guests.NAME]`` of the source."""
        return {"driver": "process", "socket": str(self.socket), "page_size": "4K"}

    def target_table(self) -> dict[str, Any]:
        """``[guests.NAME]`` of the target."""
        return {"driver": "process", "page_size": "4K", "command": self._command(self.target_console)}

    async def start(self) -> None:
        """Start the guest and return once it has filled its memory.  The source agent must already run."""
        console = self._directory / f"{self.name}.tty"
        await self._launch(*self._command(console), env={**os.environ, ENVIRONMENT: str(self.socket)})
        await self.console.attach(console)
        await self.console.wait_booted()
