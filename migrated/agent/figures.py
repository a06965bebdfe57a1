"""Convert an engine's counters to the figures that a record shows.

`of_source` and `of_target` update the record in place, each time somebody looks at it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from migrated.agent.record import Faults, FaultSeconds, State

if TYPE_CHECKING:
    from migrated.agent.rates import Rates
    from migrated.agent.record import Record
    from migrated.memory.engine import SourceStats, TargetStats

BLOCK_BYTES = 4096


def _wire(record: Record, stats: SourceStats | TargetStats, rates: Rates) -> None:
    rates.sent(stats.wire_bytes, time.monotonic())
    record.transferred_bytes = stats.wire_bytes
    record.throughput_bytes_per_second = rates.throughput


def of_source(record: Record, stats: SourceStats, rates: Rates, *, frozen: bool) -> None:
    """Update the source's record.  ``frozen``: count the remaining bytes in stale pages, not in written blocks."""
    _wire(record, stats, rates)
    record.dirty_bytes_per_second = rates.dirty_rate
    if not frozen:
        record.remaining_bytes = stats.dirty_bytes
    elif record.state in (State.POSTCOPY, State.COMPLETED):
        record.remaining_bytes = stats.stale_bytes_left
    else:  # pages in flight when the connection was lost may be missing: at most all that were stale
        record.remaining_bytes = max(stats.stale_bytes_left, record.stale_bytes)
    record.bytes_by_kind = {
        "payload": stats.payload_bytes,
        "header": stats.header_bytes,
        "zero": stats.zero_blocks * BLOCK_BYTES,
        "unchanged": stats.unchanged_blocks * BLOCK_BYTES,
        "compression_saved": stats.compression_saved_bytes,
        "zero_copy": stats.lent_bytes,
        "demand": stats.demand_bytes,
        "drain": stats.drain_bytes,
    }


def of_target(record: Record, stats: TargetStats, rates: Rates, *, mapped: bool) -> None:
    """Update the target's record.  ``mapped``: the stale map has arrived, so the remaining bytes are known."""
    _wire(record, stats, rates)
    if mapped:
        record.remaining_bytes = stats.stale_bytes
    record.faults = Faults(current=stats.faults_current, stale=stats.faults_stale, missing=stats.faults_missing)
    by_kind = {
        "current": stats.latency_current,
        "stale": stats.latency_stale,
        "missing": stats.latency_missing,
    }
    total = stats.latency_current + stats.latency_stale + stats.latency_missing
    record.fault_seconds = FaultSeconds(
        p50=total.quantile_seconds(0.5),
        p99=total.quantile_seconds(0.99),
        max=total.max_ns * 1e-9,
        histogram_log2_us=list(total.buckets),
    )
    record.faults_by_kind_us = {kind: list(histogram.buckets) for kind, histogram in by_kind.items()}
    record.fault_sum_seconds = {kind: histogram.total_ns * 1e-9 for kind, histogram in by_kind.items()}
    record.bytes_by_kind = {"payload": stats.payload_bytes, "header": stats.wire_bytes - stats.payload_bytes}
