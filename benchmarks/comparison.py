"""Compare `migrated` with QEMU: both migrate the same guest over the same path under the same load, in alternating runs."""

from __future__ import annotations

import msgspec

from benchmarks import builtin, external
from benchmarks.network import Link, link
from benchmarks.pool import warm_pages
from benchmarks.report import Section, mebibytes, milliseconds, ratio, seconds
from benchmarks.sample import Sample, medians
from benchmarks.settings import MIB, Settings

SYSTEMS = ("migrated", "qemu-precopy", "qemu-postcopy")

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
        "Total: from the moment both sides are ready (the incoming QEMU has started and waits) to the end on both. Downtime: "
        "from QEMU's STOP on the source to RESUME on the target. Longest stall: the longest gap between two iterations of the "
        "guest's loop by its time stamp counter, or the downtime if that is longer (the counter stops while QEMU migrates it)."
    ),
    (
        "Pace: the guest's operations per second during pre-copy compared with before; only where pre-copy lasted for two of its "
        "half-second reports. CPU: agents and QEMU's threads of both sides, without the virtual processors. Extra memory: the "
        "largest growth of the same processes, without huge pages and file pages."
    ),
    (
        "QEMU: 7.2, the same downtime limit, bandwidth unlimited; post-copy with postcopy-preempt, started after the first pass. "
        "QEMU sends over one connection (post-copy cannot use multifd in 7.2), migrated over its default of two and one for "
        "demands."
    ),
)


async def run(settings: Settings) -> Section:
    """Measure every path, load and system ``settings.runs`` times, the systems in alternating runs."""
    section = Section(
        "comparison",
        "Compared with QEMU's own migration",
        (
            *("path", "load", "system", "total", "downtime", "longest stall", "pace", "wire", "CPU"),
            *("extra memory", "memory verified"),
        ),
        notes=[
            (
                f"{settings.memory_bytes // MIB} MiB of memory on 2 MiB pages on both sides; medians of "
                f"{settings.runs} runs, the systems alternating."
            ),
            *NOTES,
        ],
    )
    with warm_pages(2 * settings.memory_bytes, 2 * MIB):
        for path in settings.paths:
            for load in settings.loads:
                samples: dict[str, list[Sample]] = {system: [] for system in SYSTEMS}
                for number in range(settings.runs):
                    for system in SYSTEMS:
                        with link(path) as made:
                            sample = await one(settings, made, system, load)
                        settings.say(path, load, system, number, sample)
                        samples[system].append(sample)
                for system in SYSTEMS:
                    _add(section, path, load, system, samples[system])
                settings.save(section)
    return section


async def one(settings: Settings, made: Link, system: str, load: str) -> Sample:
    """Migrate once."""
    if system == "migrated":
        return await external.move(
            made, load, memory_bytes=settings.memory_bytes, limit_seconds=settings.limit_seconds, mode="hybrid"
        )
    return await builtin.move(
        made, load, system=system, memory_bytes=settings.memory_bytes, limit_seconds=settings.limit_seconds
    )


def _add(section: Section, path: str, load: str, system: str, samples: list[Sample]) -> None:
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
            *(path, load, system, total, milliseconds(result["downtime_seconds"])),
            *(milliseconds(result["stall_seconds"]), ratio(result["pace"]), mebibytes(wire)),
            *(seconds(result["cpu_seconds"]), mebibytes(result["extra_memory_bytes"]), checked),
        )
    )
    section.data.append(
        {"path": path, "load": load, "system": system, **result, "samples": [msgspec.to_builtins(s) for s in samples]}
    )
