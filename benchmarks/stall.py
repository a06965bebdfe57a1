"""Measure how long tracking stalls a guest that maps and unmaps memory: native/tests/test_tracker_stall.c, repeated."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections import defaultdict
from pathlib import Path

from benchmarks.report import Section, milliseconds
from benchmarks.sample import median
from benchmarks.settings import Settings
from migrated.errors import HostError

NATIVE = Path(__file__).parents[1] / "native"
LIMIT_SECONDS = 300
GIBIBYTES = 8
STEPS = ("untracked", "arm", "scan", "disarm")
_KIND = re.compile(r"^a_guest_that_maps_goes_on, (.+)$")
_STEP = re.compile(r"^ +(\w+) +longest mmap and munmap: +([\d.]+) ms$")


async def stall(settings: Settings) -> Section:
    """Measure a guest of 8 GiB on 4 KiB pages, one thread of which does nothing but map and unmap a page."""
    section = Section(
        "stall",
        f"The longest mmap and munmap of a tracked guest of {GIBIBYTES} GiB on 4 KiB pages",
        ("memory", *STEPS),
        notes=[
            (
                f"Medians of {settings.runs} runs, and the longest of all. Arming happens at the start of a migration, disarming when "
                "it is aborted; a guest that has migrated is not disarmed. The steps of tracker.c bound how long it holds the "
                "kernel's mmap_lock; on busy processors the figures include the time that a thread waits for a processor."
            )
        ],
    )
    program = await asyncio.to_thread(_build, settings.output)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(settings.runs):
        process = await asyncio.create_subprocess_exec(
            str(program), str(GIBIBYTES), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(LIMIT_SECONDS):
            output, _ = await process.communicate()
        if process.returncode:
            raise HostError(f"{program} failed: {output.decode(errors='replace')[-500:]}")
        for kind, step, value in parse(output.decode()):
            found.setdefault(kind, defaultdict(list))[step].append(value)
    for kind, steps in found.items():
        cells = (f"{milliseconds(median(steps[step]))} ({milliseconds(max(steps[step]))})" for step in STEPS)
        section.rows.append((kind, *cells))
        section.data.append({"memory": kind, "seconds": dict(steps)})
        settings.note(f"stall: {kind}: {dict(steps)}")
    settings.save(section)
    return section


def parse(output: str) -> list[tuple[str, str, float]]:
    """Parse the program's output into ``(kind of memory, step, seconds)``."""
    kind, found = "", []
    for line in output.splitlines():
        if match := _KIND.match(line):
            kind = match[1]
        elif match := _STEP.match(line):
            found.append((kind, match[1], float(match[2]) / 1e3))
    return found


def _build(output: Path) -> Path:
    build = output / "tests"
    for command in (
        ["cmake", "-S", str(NATIVE), "-B", str(build), "-G", "Ninja", "-DMGD_TESTS=ON", "--log-level=WARNING"],
        ["cmake", "--build", str(build), "--target", "test_tracker_stall"],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        if done.returncode:
            raise HostError(f"{' '.join(command[:3])} failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return build / "test_tracker_stall"
