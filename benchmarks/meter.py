"""Measure the cost of a migration: processor time and memory, read from /proc while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Self

SAMPLE_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
#: Prefix of QEMU's virtual processor threads with ``-name …,debug-threads=on``.
VCPU_PREFIX = "CPU "


@dataclasses.dataclass(frozen=True)
class CpuTimes:
    """Processor time of a process, including exited threads, and the part of it that ran a guest."""

    total: float
    guest: float

    @property
    def own(self) -> float:
        """Processor time without the guest's part."""
        return self.total - self.guest


@dataclasses.dataclass
class _Process:
    """Seconds and bytes of a process; ``base`` is at the start of watching."""

    base_memory: int
    memory: int
    base_cpu: CpuTimes
    cpu: CpuTimes


class Meter:
    """Watch processes while a block runs.  Figures cover the block alone, and never a guest's own work."""

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}
        self._task: asyncio.Task[None] | None = None
        self.peak_memory_bytes = 0

    def watch(self, pid: int) -> None:
        """Count this process from now on."""
        cpu, memory = cpu_times(pid), memory_bytes(pid)
        self._processes[pid] = _Process(memory, memory, cpu, cpu)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all processes since they were first watched."""
        return sum(process.cpu.own - process.base_cpu.own for process in self._processes.values())

    def sample(self) -> None:
        """Read all figures now."""
        for pid, process in self._processes.items():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has exited: keep its last figures
                memory, cpu = memory_bytes(pid), cpu_times(pid)
                # An exited guest thread stays in the total, but is no longer in the list.
                process.cpu = CpuTimes(cpu.total, max(cpu.guest, process.cpu.guest))
                process.memory = memory
        extra = sum(max(0, process.memory - process.base_memory) for process in self._processes.values())
        self.peak_memory_bytes = max(self.peak_memory_bytes, extra)

    async def _run(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.sample()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def cpu_times(pid: int) -> CpuTimes:
    """Return the times of a live process.  Raises ProcessLookupError if it has exited."""
    guest = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().startswith(VCPU_PREFIX):
                guest += _times(task / "stat")
    stat = Path(f"/proc/{pid}/stat")
    if stat.read_text().rpartition(")")[2].split()[0] in "ZX":
        raise ProcessLookupError(pid)
    return CpuTimes(_times(stat), guest)


def memory_bytes(pid: int) -> int:
    """Return the memory of a process without files and without huge pages (the guest's memory)."""
    kib = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024


def _times(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime
