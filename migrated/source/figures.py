"""A source engine's counters, as the record shows them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from migrated.agent.record import State

if TYPE_CHECKING:
    from migrated.agent.rates import Rates
    from migrated.agent.record import Record
    from migrated.memory.engine import SourceStats

BLOCK_BYTES = 4096


def update(record: Record, stats: SourceStats, rates: Rates, *, frozen: bool) -> None:
    """``frozen``: what remains is counted in stale pages, not in written bytes."""
    rates.sent(stats.wire_bytes, time.monotonic())
    record.transferred_bytes = stats.wire_bytes
    record.throughput_bytes_per_second = rates.throughput
    record.dirty_bytes_per_second = rates.dirty_rate
    if not frozen:
        record.remaining_bytes = stats.dirty_bytes
    elif record.state in (State.POSTCOPY, State.COMPLETED):
        record.remaining_bytes = stats.stale_bytes_left
    else:  # what was under way when the connection was lost may not have arrived: at most all that was stale
        record.remaining_bytes = max(stats.stale_bytes_left, record.stale_bytes)
    record.bytes_by_kind = {
        "payload": stats.payload_bytes,
        "header": stats.header_bytes,
        "zero": stats.zero_blocks * BLOCK_BYTES,
        "unchanged": stats.unchanged_blocks * BLOCK_BYTES,
        "compression_saved": stats.compression_saved_bytes,
        "demand": stats.demand_bytes,
        "drain": stats.drain_bytes,
    }
