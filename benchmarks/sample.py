"""The figures of one migration, and medians over many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec


class Sample(msgspec.Struct, kw_only=True):
    """Figures of one migration.  None: not measured, or the migration ended before (see ``outcome``)."""

    system: str  # "migrated", "qemu-precopy", "qemu-postcopy"
    path: str
    load: str
    memory_bytes: int
    outcome: str = "completed"  # or "no end in N s", or an error's text
    verified: bool = False  # the guest verified all of its memory after the migration
    total_seconds: float | None = None
    setup_seconds: float | None = None  # before that: starting the incoming guest, and the handshake
    downtime_seconds: float | None = None  # from the source's STOP to the target's RESUME
    stall_seconds: float | None = None  # longest gap between two iterations of the guest's loop, by its own counter
    operations_before: float | None = None  # blocks per second
    operations_during: float | None = None  # blocks per second, during pre-copy
    wire_bytes: int | None = None
    cpu_seconds: float | None = None
    extra_memory_bytes: int | None = None
    details: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def pace(self) -> float | None:
        """Ratio of the guest's operations during pre-copy to those before: 1 is undisturbed."""
        if not self.operations_before or self.operations_during is None:
            return None
        return self.operations_during / self.operations_before


FIGURES = (
    "total_seconds",
    "setup_seconds",
    "downtime_seconds",
    "stall_seconds",
    "wire_bytes",
    "cpu_seconds",
    "extra_memory_bytes",
    "pace",
)


def medians(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the medians over the completed migrations, and how many ran, completed and were verified."""
    ended = [sample for sample in samples if sample.outcome == "completed"]
    result: dict[str, Any] = {
        "runs": len(samples),
        "ended": len(ended),
        "verified": sum(sample.verified for sample in ended),
        "outcomes": sorted({sample.outcome for sample in samples if sample.outcome != "completed"}),
    }
    for name in FIGURES:
        result[name] = median(getattr(sample, name) for sample in ended)
    return result


def percentile(values: Iterable[float | None], share: float) -> float | None:
    """Return the nearest-rank percentile of the known values: the smallest that at least ``share`` of them do not exceed."""
    known = sorted(value for value in values if value is not None)
    return known[max(1, math.ceil(share * len(known))) - 1] if known else None


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the known values."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
