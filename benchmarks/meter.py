"""What a move costs: processor time, memory and bytes on the wire, read from /proc while it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Self

SAMPLE_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
#: QEMU names its virtual processors' threads so with ``-name …,debug-threads=on``.
VCPU_PREFIX = "CPU "


@dataclasses.dataclass(frozen=True)
class CpuTimes:
    """Processor time of a process, ended threads included, and what of it ran a guest."""

    total: float
    guest: float

    @property
    def own(self) -> float:
        """Without the guest's part."""
        return self.total - self.guest


@dataclasses.dataclass
class _Process:
    """Seconds and bytes; ``base``: at the start of watching."""

    base_memory: int
    memory: int
    base_cpu: CpuTimes
    cpu: CpuTimes


class Meter:
    """Watch processes while a block runs.  Figures are of the block alone, and never of a guest's own work."""

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
        """Of all processes since they were watched."""
        return sum(process.cpu.own - process.base_cpu.own for process in self._processes.values())

    def sample(self) -> None:
        """Read all figures now."""
        for pid, process in self._processes.items():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended: its last figures stand
                memory, cpu = memory_bytes(pid), cpu_times(pid)
                # A guest's thread that has ended is in the total for ever, and in the list no more.
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
    """Of a living process; raises ProcessLookupError for one that has ended."""
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
    """Memory of a process that is its own: not files, and not huge pages (the guest's memory)."""
    kib = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024


def _times(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime
