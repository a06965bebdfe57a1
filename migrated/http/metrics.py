"""Export the records to Prometheus at ``/metrics``.

Figures of one migration (labels ``migration`` and ``guest``) exist only while it runs, so that labels do not pile up.
Counters and histograms belong to the agent and have no such labels.  They start at 0 with the agent's process and only
ever grow: `RecordCollector` leaves out the records of earlier agents, and keeps what a forgotten record had counted.
"""

from __future__ import annotations

import collections
import itertools
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

from migrated.agent.record import ENDED, SOURCE_STEPS, TARGET_STEPS, State
from migrated.codes import CODES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from migrated.agent.host_agent import HostAgent
    from migrated.agent.record import Record

#: The record's buckets are powers of two; fault latencies above 2^23 µs (8.4 s) share the last one.
LATENCY_BOUNDS_SECONDS: Final = (*(2**power / 1e6 for power in range(1, 24)), math.inf)
DOWNTIME_BOUNDS_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, math.inf)
STALL_BOUNDS_SECONDS: Final = (0.0001, 0.00025, 0.0005, *DOWNTIME_BOUNDS_SECONDS)
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
    ("stale_pages", "migrated_migration_stale_pages", "Host pages not up to date since the switchover"),
)


#: Counters: metric name, help, label, and the values of the label that exist from the start.
_COUNTERS: Final = (
    ("migrated_migrations_started", "Migrations begun", "", ("",)),
    ("migrated_migrations_ended", "Migrations that have ended, by result", "result", tuple(sorted(ENDED))),
    ("migrated_migrations_failed", "Migrations that have failed or were aborted, by error code", "code", ()),
    ("migrated_requests_refused", "Commands and incoming migrations that were refused, by error code", "code", ()),
    ("migrated_transferred_bytes", "Bytes transferred on page connections", "", ("",)),
    ("migrated_memory_bytes", "Bytes of guest memory processed, by kind", "kind", ()),
    ("migrated_faults", "Faults of guests answered, by kind of page", "kind", FAULT_KINDS),
)
_LATENCY: Final = "migrated_fault_latency_seconds"
_DOWNTIME: Final = "migrated_downtime_seconds"
_DOWNTIME_STEP: Final = "migrated_downtime_step_seconds"
_STALL: Final = "migrated_longest_stall_seconds"
_STEPS: Final = {"source": SOURCE_STEPS, "target": TARGET_STEPS}

#: Everything that only grows, by metric, label and histogram bucket (its upper bound; "sum": the sum of all
#: observations).
_Totals = collections.Counter[tuple[str, str, float | str]]


def _label(code: str) -> str:
    """Return an error code as a label.  A code of our own stays; a peer may send any, and there must not be too many."""
    return code if code in CODES else "other"


def _figures(record: Record) -> _Totals:
    """Return what a record adds to the totals."""
    found: _Totals = collections.Counter()
    found["migrated_migrations_started", "", ""] = 1
    found["migrated_transferred_bytes", "", ""] = record.transferred_bytes
    if record.ended:
        found["migrated_migrations_ended", record.state.value, ""] = 1
        if record.error is not None:
            found["migrated_migrations_failed", _label(record.error.code), ""] = 1
    for kind, count in record.bytes_by_kind.items():
        found["migrated_memory_bytes", kind, ""] = count
    for kind in FAULT_KINDS:
        found["migrated_faults", kind, ""] = getattr(record.faults, kind)
    for kind, histogram in record.faults_by_kind_us.items():
        for index, count in enumerate(histogram):
            found[_LATENCY, kind, LATENCY_BOUNDS_SECONDS[min(index, len(LATENCY_BOUNDS_SECONDS) - 1)]] += count
    for kind, seconds in record.fault_sum_seconds.items():
        found[_LATENCY, kind, "sum"] = seconds  # type: ignore[assignment] # a Counter adds floats as well
    if record.ended and record.fault_seconds.max > 0:
        found[_STALL, "", next(one for one in STALL_BOUNDS_SECONDS if record.fault_seconds.max <= one)] = 1
        found[_STALL, "", "sum"] = record.fault_seconds.max  # type: ignore[assignment] # a Counter adds floats as well
    if record.downtime_seconds is not None:
        found[_DOWNTIME, "", next(one for one in DOWNTIME_BOUNDS_SECONDS if record.downtime_seconds <= one)] = 1
        found[_DOWNTIME, "", "sum"] = record.downtime_seconds  # type: ignore[assignment] # likewise
        for step, seconds in record.downtime_breakdown.items():
            found[_DOWNTIME_STEP, step, next(one for one in STALL_BOUNDS_SECONDS if seconds <= one)] = 1
            found[_DOWNTIME_STEP, step, "sum"] = seconds  # type: ignore[assignment] # likewise
    return found


class RecordCollector(Collector):
    """Asks the agent for its records at every scrape."""

    def __init__(self, agent: HostAgent[Any], about: dict[str, Any]) -> None:
        self._agent = agent
        self._about = about
        # Records of earlier agents, which a restarted agent still lists.  We compare the objects: a migration that this
        # agent takes up again has the same id but a record of its own, and counts.
        self._inherited = {record.id: record for record in agent.records() if record.ended}
        # The last figures of every migration seen.  Those of a migration that the agent has since forgotten move to
        # _forgotten.
        self._seen: dict[str, Record] = {}
        self._forgotten: _Totals = collections.Counter()

    def describe(self) -> Iterable[Metric]:
        """Yield nothing: registering must not need an agent that already works."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Make all metrics from the current records."""
        records = [record for record in self._agent.records() if self._inherited.get(record.id) is not record]
        yield from self._about_agent()
        yield from _live(records)
        yield from _grown(self._totals(records), _STEPS[self._agent.role])

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

        if (credentials := self._agent.credentials) is not None:
            credentials.current()  # the files may have changed
            yield GaugeMetricFamily(
                "migrated_tls_certificate_expiry_timestamp_seconds",
                "When the agent's certificate expires",
                value=credentials.expires_at,
            )

    def _totals(self, records: list[Record]) -> _Totals:
        now = {record.id: record for record in records}
        for migration, record in self._seen.items():
            if migration not in now:
                self._forgotten.update(_figures(record))
        self._seen = now
        totals = self._forgotten.copy()
        for record in records:
            totals.update(_figures(record))
        for code, count in self._agent.refused.items():
            totals["migrated_requests_refused", _label(code), ""] += count
        return totals


def _live(records: list[Record]) -> Iterator[Metric]:
    by_state = collections.Counter(record.state for record in records if not record.ended)
    states = GaugeMetricFamily("migrated_migrations", "Migrations under way, by state", labels=["state"])
    for state in State:
        if state not in ENDED:
            states.add_metric([state.value], by_state[state])
    yield states
    labels = ["migration", "guest"]
    for field, name, text in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for record in records:
            if not record.ended:
                gauge.add_metric([record.id, record.guest], float(getattr(record, field)))
        yield gauge


def _grown(totals: _Totals, steps: tuple[str, ...]) -> Iterator[Metric]:
    for name, text, label, always in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=[label] if label else [])
        seen = {value for metric, value, _ in totals if metric == name}
        for value in (*always, *sorted(seen - {*always})):
            counter.add_metric([value] if label else [], totals[name, value, ""])
        yield counter
    latency = HistogramMetricFamily(_LATENCY, "Time to answer a guest's fault, by kind of page", labels=["kind"])
    for kind in sorted({*FAULT_KINDS, *(value for metric, value, _ in totals if metric == _LATENCY)}):
        _add_histogram(latency, kind, LATENCY_BOUNDS_SECONDS, totals)
    yield latency
    downtime = HistogramMetricFamily(_DOWNTIME, "Guest paused at the source until it ran at the target", labels=[])
    _add_histogram(downtime, "", DOWNTIME_BOUNDS_SECONDS, totals)
    yield downtime
    by_step = HistogramMetricFamily(_DOWNTIME_STEP, "Steps of the downtime, whose sum it is", labels=["step"])
    for step in sorted({*steps, *(value for metric, value, _ in totals if metric == _DOWNTIME_STEP)}):
        _add_histogram(by_step, step, STALL_BOUNDS_SECONDS, totals)
    yield by_step
    stall = HistogramMetricFamily(_STALL, "Longest time that a guest waited for a page, of each migration", labels=[])
    _add_histogram(stall, "", STALL_BOUNDS_SECONDS, totals)
    yield stall


def _add_histogram(family: HistogramMetricFamily, label: str, bounds: tuple[float, ...], totals: _Totals) -> None:
    below = itertools.accumulate(totals[family.name, label, bound] for bound in bounds)
    names = ("+Inf" if bound == math.inf else repr(bound) for bound in bounds)
    buckets = list(zip(names, map(float, below), strict=True))
    family.add_metric([label] if label else [], buckets, totals[family.name, label, "sum"])


def make_registry(agent: HostAgent[Any], about: dict[str, Any]) -> CollectorRegistry:
    """Make a registry of our own: two agents in one process (tests) would share the library's global one."""
    registry = CollectorRegistry()
    registry.register(RecordCollector(agent, about))
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry) -> bytes:
    """Return the metrics in the text format."""
    return generate_latest(registry)
