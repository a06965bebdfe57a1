"""The comparison: the same guest, path and load moved by `migrated` and by QEMU itself, in turn."""

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
        "Guest: the boot-sector load under KVM, one virtual processor, all of its memory written before the move and checked "
        "after it. QEMU's own pre-copy of the Linux guest under TCG loses writes (that guest panics), so none of these columns "
        "is taken from it."
    ),
    (
        "Loads rewrite whole 4 KiB blocks: sparse 20 000 random blocks a second, hot 50 000 (nine of ten in 1/64 of memory), "
        "dense 50 000 one after the other; idle none."
    ),
    (
        "Total: from the moment both sides stand (the incoming QEMU started and waiting) to the end on both. Downtime: from "
        "QEMU's STOP on the source to RESUME on the target. Longest stall: the longest gap between two turns of the guest's "
        "loop, by its time stamp counter, or the downtime where that is longer (the counter stands still while QEMU moves it)."
    ),
    (
        "Pace: the guest's operations a second during pre-copy against before; only where pre-copy lasted for two of its "
        "half-second reports. CPU: agents and QEMU's threads of both sides, without the virtual processors. Extra memory: the "
        "largest growth of the same processes, huge pages and file pages left out."
    ),
    (
        "QEMU: 7.2, downtime limit as ours, bandwidth unlimited; post-copy with postcopy-preempt, started after the first pass. "
        "It sends over one connection (post-copy cannot use multifd in 7.2), migrated over its default of two and one for demands."
    ),
)


async def run(settings: Settings) -> Section:
    """Every path, load and system, ``settings.runs`` times in turn."""
    section = Section(
        "comparison",
        "Beside QEMU's own migration",
        (
            *("path", "load", "system", "total", "downtime", "longest stall", "pace", "wire", "CPU"),
            *("extra memory", "memory verified"),
        ),
        notes=[
            (
                f"{settings.memory_bytes // MIB} MiB of memory on 2 MiB pages on both sides; medians of "
                f"{settings.runs} runs, the systems in turn."
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
    """One move."""
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
