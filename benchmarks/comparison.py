"""Compare `migrated` with QEMU: both migrate the same guest over the same path under the same load, in alternating runs."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from benchmarks import builtin, external
from benchmarks.network import Link, link
from benchmarks.pool import SMALL_BYTES, touch, warm_pages
from benchmarks.report import Section, mebibytes, milliseconds, ratio, seconds
from benchmarks.sample import Sample, medians
from benchmarks.settings import MIB, Settings
from migrated.demo.qemu_guest import Memory

SYSTEMS = ("migrated", "qemu-precopy", "qemu-postcopy")
#: Memory of the guest: its kind, and the size of its pages on the source.  With `migrated` it arrives on pages of 2 MiB.
MEMORIES: dict[str, tuple[Memory, int]] = {"private": ("private", 4096), "memfd": ("memfd", 2 * MIB)}

NOTES = (
    (
        "Guest: the boot-sector load under KVM with one virtual processor. It writes all of its memory before the migration and "
        "verifies it afterwards. No column uses the Linux guest under TCG, because QEMU's own pre-copy loses writes there (that "
        "guest panics)."
    ),
    (
        "Loads rewrite whole 4 KiB blocks: sparse 20 000 random blocks a second, hot 50 000 (nine of ten in 1/64 of memory), "
        "dense 50 000 in sequence; idle none."
    ),
    (
        "Memory: `private` is QEMU's default (4 KiB, and what the kernel makes of them: transparent huge pages); `migrated` takes "
        "it to pages of 2 MiB, QEMU to private memory again. `memfd` is a memory-backend-memfd of 2 MiB pages on both sides."
    ),
    (
        "Total: from the moment both sides are ready (the incoming QEMU has started and waits) until the target has everything. "
        "`migrated` then ends the old QEMU, which QEMU's own migration leaves to somebody else. Downtime of "
        "migrated: from the stop command until the source is notified that the guest runs. Downtime of QEMU: from STOP on the "
        "source to RESUME on the target. Longest stall: the longest gap between two iterations of the guest's loop by its time "
        "stamp counter, or the downtime if that is longer (the counter stops while QEMU migrates it)."
    ),
    (
        "Pace: the guest's operations per second during pre-copy compared with before; only where pre-copy lasted for two of its "
        "half-second reports. CPU: agents and QEMU's threads of both sides, without the virtual processors. Extra memory: the "
        "largest growth of the same processes, without huge pages and file pages."
    ),
    (
        "QEMU: the same downtime limit, bandwidth unlimited; post-copy with postcopy-preempt, started after the first pass. QEMU "
        "sends over one connection, migrated over its default of two and one for demands. `throughput` measures multifd."
    ),
)


async def run(settings: Settings) -> Section:
    """Measure every memory, path, load and system several times, the systems in alternating runs."""
    section = Section(
        "comparison",
        "Compared with QEMU's own migration",
        (
            *("memory", "path", "load", "system", "total", "downtime", "longest stall", "pace", "wire", "CPU"),
            *("extra memory", "memory verified"),
        ),
        notes=[
            (
                f"QEMU {settings.host['qemu']}, {settings.memory_bytes // MIB} MiB; medians of {settings.runs} runs, on 1g of "
                f"{settings.slow_runs}, the systems alternating."
            ),
            *NOTES,
        ],
    )
    if "private" in settings.memories:
        touch(2 * settings.memory_bytes, SMALL_BYTES)
    with warm_pages(2 * settings.memory_bytes, 2 * MIB):
        for memory, path, load in itertools.product(settings.memories, settings.paths, settings.loads):
            samples: dict[str, list[Sample]] = {system: [] for system in SYSTEMS}
            for number in range(settings.runs_on(path)):
                for system in SYSTEMS:
                    with link(path) as made:
                        sample = await one(settings, made, system, memory, load)
                    settings.say(path, f"{memory} {load}", system, number, sample)
                    samples[system].append(sample)
            for system in SYSTEMS:
                _add(section, memory, path, load, system, samples[system])
            settings.save(section)
    return section


async def one(settings: Settings, made: Link, system: str, memory: str, load: str) -> Sample:
    """Migrate once."""
    kind, page_bytes = MEMORIES[memory]
    common: dict[str, Any] = {
        "memory": kind,
        "memory_bytes": settings.memory_bytes,
        "page_bytes": page_bytes,
        "limit_seconds": settings.limit_seconds,
    }
    if system == "migrated":
        return await external.move(made, load, target_page_bytes=2 * MIB, mode="hybrid", **common)
    return await builtin.move(made, load, system=system, **common)


def _add(section: Section, memory: str, path: str, load: str, system: str, samples: list[Sample]) -> None:
    result = medians(samples)
    if result["ended"]:
        wire = result["wire_bytes"]
        total = seconds(result["total_seconds"])
        checked = f"{result['verified']} of {result['ended']}"
        if result["ended"] < result["runs"]:
            total += f" ({result['ended']} of {result['runs']} ended)"
    else:
        wire, total, checked = samples[0].wire_bytes, result["outcomes"][0].splitlines()[0][:60], "-"
    section.rows.append(
        (
            *(memory, path, load, system, total, milliseconds(result["downtime_seconds"])),
            *(milliseconds(result["stall_seconds"]), ratio(result["pace"]), mebibytes(wire)),
            *(seconds(result["cpu_seconds"]), mebibytes(result["extra_memory_bytes"]), checked),
        )
    )
    section.data.append(
        {
            "memory": memory,
            "path": path,
            "load": load,
            "system": system,
            **result,
            "samples": [msgspec.to_builtins(sample) for sample in samples],
        }
    )
