"""Throughput and dirty rate over a sliding window.

The caller feeds it counters that it reads at irregular times, and reads the two rates.
"""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 2.0


class Rates:
    """Derive the throughput from a growing counter and the dirty rate from scans.  Times are of any monotonic clock."""

    def __init__(self) -> None:
        self._sent: deque[tuple[float, int]] = deque()
        self._last_scan: float | None = None
        self.throughput = 0.0  # bytes a second
        self.dirty_rate = 0.0  # bytes a second

    def sent(self, total_bytes: int, now: float) -> None:
        """Report that the counter was at ``total_bytes`` at ``now``."""
        self._sent.append((now, total_bytes))
        while len(self._sent) > 2 and now - self._sent[0][0] > WINDOW_SECONDS:
            self._sent.popleft()
        then, before = self._sent[0]
        if now - then > 0.05:
            self.throughput = (total_bytes - before) / (now - then)

    def dirty(self, written_bytes: int, now: float) -> None:
        """Report how many bytes a scan found written since the last one."""
        if self._last_scan is not None and now > self._last_scan:
            self.dirty_rate = written_bytes / (now - self._last_scan)
        self._last_scan = now
