"""The guest of every benchmark: the boot-sector load under KVM, which verifies its memory and measures its own stalls.

It reads time from the processor's time stamp counter.  QEMU migrates the counter's value with the guest, so the guest does
not see the time between the source's last reading and the start on the target.  `Watched.stall_seconds` is therefore the
larger of the guest's own measurement and the downtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.network import Link
from migrated.demo.console import GuestConsole, Load
from migrated.demo.pair import short_directory
from migrated.demo.pool import huge_pages
from migrated.demo.qemu_guest import Memory, QemuGuest, RunningQemu
from migrated.demo.run import cache_directory

MIB = 1 << 20
#: Loads of the guest: how many 4 KiB blocks it rewrites per second, and where.  ``max``: as fast as it can.
LOADS: dict[str, dict[str, Any]] = {
    "idle": {"pattern": "idle", "sweep_seconds": 0},
    "sparse": {"pattern": "sparse", "rate": 20_000, "sweep_seconds": 0},
    "hot": {"pattern": "hot", "rate": 50_000, "sweep_seconds": 0},
    "dense": {"pattern": "dense", "rate": 50_000, "sweep_seconds": 0},
    "slow": {"pattern": "sparse", "rate": 2_000, "sweep_seconds": 0},
    "max": {"pattern": "sparse", "rate": 0, "sweep_seconds": 0},
    "maxhot": {"pattern": "hot", "rate": 0, "sweep_seconds": 0},
}
BEFORE_SECONDS = 1.0


class TimedConsole(GuestConsole):
    """A console that records when each LOAD line arrived, by our clock, to relate it to the migration."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.timed: list[tuple[float, Load]] = []

    def _take(self, text: str) -> None:
        before = self._loads
        super()._take(text)
        if self._loads > before and self._load is not None:
            self.timed.append((time.monotonic(), self._load))

    def operations_per_second(self, start: float, end: float) -> float | None:
        """Return the rate between the first and the last line of an interval, by the guest's own time; None below two lines."""
        inside = [load for at, load in self.timed if start <= at <= end]
        if len(inside) < 2 or inside[-1].seconds <= inside[0].seconds:
            return None
        return (inside[-1].operations - inside[0].operations) / (inside[-1].seconds - inside[0].seconds)


@dataclasses.dataclass
class Watched:
    """A working guest on the source's side of a link."""

    guest: QemuGuest
    running: RunningQemu
    console: TimedConsole
    operations_before: float | None = None

    @property
    def pid(self) -> int:
        """Process id of the guest's QEMU."""
        if self.running.process is None:
            raise RuntimeError("the guest's QEMU is not running")
        return self.running.process.pid

    async def observe(self) -> None:
        """Measure the guest's pace before the migration, and reset its stall counter."""
        start = time.monotonic()
        await self.console.wait_for(lambda _: time.monotonic() - start > BEFORE_SECONDS, 30, "the load's pace")
        self.operations_before = self.console.operations_per_second(start, time.monotonic())
        await self.console.command("reset")
        await self.console.stats()

    async def verify(self) -> bool:
        """Have the guest verify all of its memory."""
        return await self.console.verified()

    async def stall_seconds(self, downtime_seconds: float | None) -> float:
        """Return the longest stall since `observe`, or the downtime if that is longer."""
        load = await self.console.stats()
        return max(load.stall_ms / 1000, downtime_seconds or 0.0)


@contextlib.asynccontextmanager
async def guest_at_work(
    link: Link,
    load: str | dict[str, Any],
    *,
    memory_bytes: int,
    memory: Memory = "memfd",
    page_bytes: int = 2 * MIB,
    target_page_bytes: int | None = None,
    extra: tuple[str, ...] = (),
) -> AsyncIterator[Watched]:
    """Boot a guest on the source's side, with huge pages for both sides; remove it, its files and its pages afterwards."""
    target_page_bytes = target_page_bytes or page_bytes
    directory = Path(tempfile.mkdtemp(prefix="mgb-", dir=short_directory()))
    try:
        guest = QemuGuest(
            directory=directory,
            cache=cache_directory(),
            name="bench",
            kind="boot",
            accel="kvm",
            memory_bytes=memory_bytes,
            memory=memory,
            page_bytes=page_bytes,
            target_page_bytes=target_page_bytes,
            load=LOADS[load] if isinstance(load, str) else load,
            extra=("-name", "bench,debug-threads=on", *extra),
        )
        await asyncio.to_thread(guest.source_command)
        with pages_for(memory_bytes, page_bytes, target_page_bytes):
            running = RunningQemu(guest)
            running.console = console = TimedConsole(guest.name)
            try:
                await running.start(prefix=link.source_prefix)
                yield Watched(guest, running, console)
            finally:
                await running.stop()
                await end_arrived(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def pages_for(memory_bytes: int, *sides: int) -> Iterator[None]:
    """Provide huge pages for a guest of this size on every side, by the page size of the side; 4 KiB needs none."""
    with contextlib.ExitStack() as stack:
        for page_bytes in {page for page in sides if page > 4096}:
            stack.enter_context(huge_pages(sides.count(page_bytes) * memory_bytes, page_bytes))
        yield


def arrived_pids(directory: Path) -> list[int]:
    """Return the guest processes that a target agent has started below ``directory``, which is of this benchmark alone."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if _belongs(pid, directory)]


async def end_arrived(directory: Path) -> None:
    """Kill the guests that the target agent started, and wait until they have exited and freed their huge pages."""
    for pid in arrived_pids(directory):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if _belongs(pid, directory):
                os.kill(pid, 9)
                await _gone(handle)
        except (OSError, TimeoutError):
            continue
        finally:
            os.close(handle)


def _belongs(pid: int, directory: Path) -> bool:
    """Return whether the process is a guest of this benchmark, and not another process that reuses the pid."""
    try:
        return f"{directory}/target/guests/".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


async def _gone(pidfd: int) -> None:
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(pidfd, done.set)
    try:
        await asyncio.wait_for(done.wait(), 10)
    finally:
        loop.remove_reader(pidfd)
