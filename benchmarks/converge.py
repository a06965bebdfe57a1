"""Whether mode precopy ends within the downtime limit for a guest that writes here and there on huge pages.

The kernel reports 2 MiB pages as written, of which a block or two have changed.  So nearly all memory is marked after a tenth
of a second, and has to be examined again.  QEMU tracks blocks.
"""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks import builtin, external
from benchmarks.network import Link, link
from benchmarks.pool import warm_pages
from benchmarks.report import Section, mebibytes, milliseconds, seconds
from benchmarks.sample import Sample, medians
from benchmarks.settings import MIB, Settings

MEMORY_BYTES = 512 * MIB
LOAD: dict[str, Any] = {"pattern": "sparse", "rate": 4_000, "sweep_seconds": 0}
LIMITS_MS = (50, 300)
SYSTEMS = ("migrated", "qemu-precopy")
PATH = "loopback"


async def run(settings: Settings) -> Section:
    """Migrate under each downtime limit ``settings.runs`` times, the systems in turn."""
    section = Section(
        "converge",
        "Mode precopy under sparse writes",
        (
            *("downtime limit", "system", "completed", "within the limit", "rounds", "total"),
            *("downtime", "longest", "longest `send`", "wire", "memory verified"),
        ),
        notes=[
            (
                f"QEMU {settings.host['qemu']}. A guest that writes {LOAD['rate']} random blocks a second over "
                f"{MEMORY_BYTES // MIB} MiB on 2 MiB pages, {PATH}; "
                f"medians of {settings.runs} runs, the systems in turn, and the longest downtime. Longest `send`: the step of the "
                "downtime in which the paused guest's marked pages are examined, and what has changed in them is sent."
            )
        ],
    )
    with warm_pages(2 * MEMORY_BYTES, 2 * MIB):
        for limit_ms in LIMITS_MS:
            samples: dict[str, list[Sample]] = {system: [] for system in SYSTEMS}
            for number in range(settings.runs):
                for system in SYSTEMS:
                    with link(PATH) as made:
                        sample = await _one(settings, made, system, limit_ms)
                    settings.say(PATH, f"{limit_ms} ms", system, number, sample)
                    samples[system].append(sample)
            for system in SYSTEMS:
                _add(section, limit_ms, system, samples[system])
            settings.save(section)
    return section


async def _one(settings: Settings, made: Link, system: str, limit_ms: int) -> Sample:
    if system != "migrated":
        return await builtin.move(
            made,
            "sparse",
            system=system,
            memory_bytes=MEMORY_BYTES,
            limit_seconds=settings.limit_seconds,
            downtime_limit_ms=limit_ms,
            guest_load=LOAD,
        )
    return await external.move(
        made,
        "sparse",
        memory_bytes=MEMORY_BYTES,
        limit_seconds=settings.limit_seconds,
        guest_load=LOAD,
        mode="precopy",
        downtime_limit_ms=limit_ms,
    )


def _add(section: Section, limit_ms: int, system: str, samples: list[Sample]) -> None:
    result = medians(samples)
    ended = [sample for sample in samples if sample.outcome == "completed"]
    downtimes = [sample.downtime_seconds or 0.0 for sample in ended]
    rounds = {sample.details["round"] for sample in ended if "round" in sample.details}
    sending = [sample.details["steps"].get("send", 0.0) for sample in ended if "steps" in sample.details]
    section.rows.append(
        (
            *(f"{limit_ms} ms", system, f"{len(ended)} of {len(samples)}"),
            f"{sum(one * 1000 <= limit_ms for one in downtimes)} of {len(samples)}",
            *(f"{min(rounds)} to {max(rounds)}" if rounds else "-", seconds(result["total_seconds"])),
            *(milliseconds(result["downtime_seconds"]), milliseconds(max(downtimes, default=None))),
            *(milliseconds(max(sending, default=None)), mebibytes(result["wire_bytes"])),
            f"{result['verified']} of {len(ended)}",
        )
    )
    section.data.append(
        {
            "limit_ms": limit_ms,
            "system": system,
            **result,
            "within": sum(one * 1000 <= limit_ms for one in downtimes),
            "samples": [msgspec.to_builtins(sample) for sample in samples],
        }
    )
