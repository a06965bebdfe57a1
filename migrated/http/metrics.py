"""``/metrics``: the records, as Prometheus wants them.

Figures of one migration (labels ``migration`` and ``guest``) are there only while it runs, so that labels do not pile up.
Counters and histograms are the agent's, without such labels.  They start at 0 with the agent's process and only ever grow:
`RecordCollector` leaves out the records of earlier agents, and keeps what a forgotten record had counted.
"""

from __future__ import annotations

import collections
import math
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from migrated.agent.record import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from migrated.agent.host_agent import HostAgent
    from migrated.agent.record import Record

#: Fault latencies above 2^24 µs (16.8 s) share the last bucket.
LATENCY_BUCKETS: Final = 24
DOWNTIME_BOUNDS_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
FAULT_KINDS: Final = ("current", "stale", "missing")

#: Gauges of a running migration: record field, metric name, help.
_GAUGES: Final = (
    ("total_bytes", "migrated_migration_total_bytes", "Memory of the guest"),
    ("remaining_bytes", "migrated_migration_remaining_bytes", "Memory not yet up to date on the target"),
    ("round", "migrated_migration_round", "Pre-copy round under way"),
    ("dirty_bytes_per_second", "migrated_migration_dirty_bytes_per_second", "How fast the guest changes its memory"),
    ("throughput_bytes_per_second", "migrated_migration_throughput_bytes_per_second", "How fast memory is moved"),
    (
        "max_bandwidth_bytes_per_second",
        "migrated_migration_bandwidth_limit_bytes_per_second",
        "Limit; 0 if there is none",
    ),
    ("stale_pages", "migrated_migration_stale_pages", "Host pages not up to date since the switch-over"),
)


class _Totals:
    """Everything that only grows, summed over records."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes_by_kind: collections.Counter[str] = collections.Counter()
        self.results: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.latency: dict[str, list[int]] = {kind: [0] * LATENCY_BUCKETS for kind in FAULT_KINDS}
        self.latency_seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.downtimes: collections.Counter[float] = collections.Counter()
        self.downtime_seconds = 0.0

    def add(self, record: Record) -> None:
        self.counts["started"] += 1
        self.counts["transferred_bytes"] += record.transferred_bytes
        self.bytes_by_kind.update(record.bytes_by_kind)
        if record.ended:
            self.results[record.state.value] += 1
        for kind in FAULT_KINDS:
            self.faults[kind] += getattr(record.faults, kind)
        for kind, histogram in record.faults_by_kind_us.items():
            buckets = self.latency.setdefault(kind, [0] * LATENCY_BUCKETS)
            for index, count in enumerate(histogram):
                buckets[min(index, LATENCY_BUCKETS - 1)] += count
        for kind, seconds in record.fault_sum_seconds.items():
            self.latency_seconds[kind] += seconds
        if record.downtime_seconds is not None:
            self.downtimes[_bound(record.downtime_seconds)] += 1
            self.downtime_seconds += record.downtime_seconds


def _bound(seconds: float) -> float:
    return next((bound for bound in DOWNTIME_BOUNDS_SECONDS if seconds <= bound), math.inf)


class RecordCollector(Collector):
    """Asks the agent for its records at every scrape."""

    def __init__(self, agent: HostAgent[Any], about: dict[str, Any]) -> None:
        self._agent = agent
        self._about = about
        # Records of earlier agents, which a restarted agent still lists.  Compared by identity: a migration that this
        # agent takes up again has the same id, a record of its own, and counts.
        self._inherited = {record.id: record for record in agent.records() if record.ended}
        # Last figures of every migration seen; what the agent has forgotten since goes into _forgotten for good.
        self._seen: dict[str, Record] = {}
        self._forgotten: _Totals = _Totals()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not need an agent that already works."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Make all metrics, from records as they are now."""
        records = [record for record in self._agent.records() if self._inherited.get(record.id) is not record]
        yield from self._about_agent()
        yield from _live(records)
        yield from _grown(self._totals(records))

    def _about_agent(self) -> Iterator[Metric]:
        health = self._agent.health()
        labels = {"role": self._agent.role, **{key: str(self._about[key]) for key in ("version", "name")}}
        yield InfoMetricFamily("migrated_agent", "This agent", value=labels)
        yield GaugeMetricFamily(
            "migrated_agent_healthy", "1 while the agent does its work", value=float(health.healthy)
        )
        yield GaugeMetricFamily("migrated_agent_ready", "1 while it can take a migration", value=float(health.ready))
        guests = float(len(self._agent.guests()))
        yield GaugeMetricFamily("migrated_agent_guests", "Guests in the configuration", value=guests)

    def _totals(self, records: list[Record]) -> _Totals:
        now = {record.id: record for record in records}
        for migration, record in self._seen.items():
            if migration not in now:
                self._forgotten.add(record)
        self._seen = now
        totals = _Totals()
        for record in records:
            totals.add(record)
        return _sum(self._forgotten, totals)


def _sum(one: _Totals, other: _Totals) -> _Totals:
    result = _Totals()
    for part in (one, other):
        result.counts.update(part.counts)
        result.bytes_by_kind.update(part.bytes_by_kind)
        result.results.update(part.results)
        result.faults.update(part.faults)
        for kind, seconds in part.latency_seconds.items():
            result.latency_seconds[kind] += seconds
        result.downtimes.update(part.downtimes)
        result.downtime_seconds += part.downtime_seconds
        for kind, buckets in part.latency.items():
            mine = result.latency.setdefault(kind, [0] * LATENCY_BUCKETS)
            result.latency[kind] = [a + b for a, b in zip(mine, buckets, strict=True)]
    return result


def _live(records: list[Record]) -> Iterator[Metric]:
    by_state = collections.Counter(record.state for record in records if not record.ended)
    states = GaugeMetricFamily("migrated_migrations", "Migrations under way, by state", labels=["state"])
    for state in State:
        if state not in (State.COMPLETED, State.ABORTED, State.FAILED):
            states.add_metric([state.value], by_state[state])
    yield states
    labels = ["migration", "guest"]
    for field, name, text in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for record in records:
            if not record.ended:
                gauge.add_metric([record.id, record.guest], float(getattr(record, field)))
        yield gauge


def _grown(totals: _Totals) -> Iterator[Metric]:
    started = totals.counts["started"]
    yield CounterMetricFamily("migrated_migrations_started", "Migrations begun", value=started)
    ended = CounterMetricFamily("migrated_migrations_ended", "Migrations over, by result", labels=["result"])
    for state in (State.COMPLETED, State.ABORTED, State.FAILED):
        ended.add_metric([state.value], totals.results[state.value])
    yield ended
    transferred = totals.counts["transferred_bytes"]
    yield CounterMetricFamily("migrated_transferred_bytes", "Bytes on page connections", value=transferred)
    kinds = CounterMetricFamily("migrated_memory_bytes", "Bytes of guest memory dealt with, by how", labels=["kind"])
    for kind, count in sorted(totals.bytes_by_kind.items()):
        kinds.add_metric([kind], count)
    yield kinds
    faults = CounterMetricFamily("migrated_faults", "Faults of guests answered, by kind of page", labels=["kind"])
    for kind in FAULT_KINDS:
        faults.add_metric([kind], totals.faults[kind])
    yield faults
    yield _latency(totals)
    yield _downtime(totals)


def _latency(totals: _Totals) -> Metric:
    text = "Time to answer a guest's fault, by kind of page"
    family = HistogramMetricFamily("migrated_fault_latency_seconds", text, labels=["kind"])
    for kind, buckets in sorted(totals.latency.items()):
        cumulated = 0
        bounds: list[tuple[str, float]] = []
        for index, count in enumerate(buckets):
            cumulated += count
            bound = "+Inf" if index == LATENCY_BUCKETS - 1 else repr(2 ** (index + 1) / 1e6)
            bounds.append((bound, float(cumulated)))
        family.add_metric([kind], bounds, totals.latency_seconds[kind])
    return family


def _downtime(totals: _Totals) -> Metric:
    family = HistogramMetricFamily("migrated_downtime_seconds", "Guest paused at the source until it ran at the target")
    cumulated = 0
    bounds: list[tuple[str, float]] = []
    for bound in (*DOWNTIME_BOUNDS_SECONDS, math.inf):
        cumulated += totals.downtimes[bound]
        bounds.append(("+Inf" if bound == math.inf else repr(bound), float(cumulated)))
    family.add_metric([], bounds, totals.downtime_seconds)
    return family


def make_registry(agent: HostAgent[Any], about: dict[str, Any]) -> CollectorRegistry:
    """Make a registry of our own: the library's global one would be shared by two agents in one process (tests)."""
    registry = CollectorRegistry()
    registry.register(RecordCollector(agent, about))
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """Write the text format."""
    return generate_latest(registry)
