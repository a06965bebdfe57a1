"""The figures of one migration over time, for plots: a bounded number of samples, evenly thinned.

`Series.add` takes a sample from the record; the columns have equal length.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from migrated.agent.record import Record

#: When a series has this many samples, every second one is dropped, and the spacing doubles.
MAX_SAMPLES: Final = 600
#: The spacing of the first samples, as the agent takes them.
FIRST_SPACING_SECONDS: Final = 0.5


class Series(msgspec.Struct):
    """Samples in columns.  ``at`` is Unix time; ``faults`` is the number of faults so far."""

    spacing_seconds: float = FIRST_SPACING_SECONDS
    at: list[float] = msgspec.field(default_factory=list)
    transferred_bytes: list[int] = msgspec.field(default_factory=list)
    remaining_bytes: list[int] = msgspec.field(default_factory=list)
    throughput_bytes_per_second: list[float] = msgspec.field(default_factory=list)
    dirty_bytes_per_second: list[float] = msgspec.field(default_factory=list)
    faults: list[int] = msgspec.field(default_factory=list)

    def add(self, record: Record, *, always: bool = False) -> None:
        """Take a sample if it is time for one, or ``always``: a change of state."""
        now = time.time()
        if self.at and not always and now - self.at[-1] < 0.9 * self.spacing_seconds:
            return
        if len(self.at) >= MAX_SAMPLES:
            self._thin()
        self.at.append(now)
        self.transferred_bytes.append(record.transferred_bytes)
        self.remaining_bytes.append(record.remaining_bytes)
        self.throughput_bytes_per_second.append(record.throughput_bytes_per_second)
        self.dirty_bytes_per_second.append(record.dirty_bytes_per_second)
        self.faults.append(record.faults.current + record.faults.stale + record.faults.missing)

    def _thin(self) -> None:
        for column in (
            self.at,
            self.transferred_bytes,
            self.remaining_bytes,
            self.throughput_bytes_per_second,
            self.dirty_bytes_per_second,
            self.faults,
        ):
            del column[1::2]
        self.spacing_seconds *= 2
