"""A target engine's counters, as the record shows them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from migrated.agent.record import Faults, FaultSeconds

if TYPE_CHECKING:
    from migrated.agent.rates import Rates
    from migrated.agent.record import Record
    from migrated.memory.engine import TargetStats


def update(record: Record, stats: TargetStats, rates: Rates, *, mapped: bool) -> None:
    """``mapped``: the stale map is here, so that what remains is known."""
    rates.sent(stats.wire_bytes, time.monotonic())
    record.transferred_bytes = stats.wire_bytes
    record.throughput_bytes_per_second = rates.throughput
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
