"""Traces: nothing without `[tracing]`, nothing while a guest is paused, and the same spans for the next agent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from migrated import config
from migrated.agent import tracing
from migrated.agent.migration import Migration
from migrated.agent.record import Record, State
from migrated.agent.spans import RecordedTracing, _Ids
from migrated.config import HooksSection
from migrated.errors import ConnectionLostError

ID = "5b8efff798038103d269b633813fc60c"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A migration whose spans are kept here."""

    def __init__(self, *, role: str = "source", parent: str = "", started_at: float | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        ids = _Ids()
        provider = TracerProvider(id_generator=ids, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        record = Record(id=ID, guest="vm1", role=role, mode="hybrid", peer="192.0.2.7:7440")
        self.migration = Migration(record, HooksSection())
        self.migration.traced_by(RecordedTracing(provider, ids), parent=parent, started_at=started_at)

    @property
    def trace(self) -> tracing.Trace:
        return self.migration.trace

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def through(self, *states: State) -> None:
        for state in states:
            self.migration.set_state(state)


def test_an_agent_without_the_extra_says_what_is_missing_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "migrated.agent.spans", None)
    table = {"tls": {"insecure": True}, "tracing": {"enabled": True}}
    with capture_logs() as logs:
        nothing = tracing.start(config.decode(table, "source"))
    (line,) = logs
    assert line["event"] == "no tracing: OpenTelemetry is not installed"
    assert "migrated[otel]" in line["hint"]
    record = Record(id=ID, guest="vm1", role="source", mode="hybrid")
    migration = Migration(record, HooksSection())
    migration.traced_by(nothing, parent=CALLER, started_at=None)
    migration.set_state(State.PRECOPY)
    assert migration.trace.traceparent == ""


def test_an_agent_that_is_not_asked_to_trace_does_not_load_the_library() -> None:
    program = (
        "import sys; import migrated.source.agent, migrated.target.agent; from migrated import config;"
        "from migrated.agent import tracing; tracing.start(config.decode({'tls': {'insecure': True}}, 'source'));"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_no_span_is_made_while_the_guest_is_paused() -> None:
    traced = Traced()
    traced.through(State.PRECOPY)
    assert set(traced.spans()) == {"setup"}
    traced.trace.round(time.monotonic(), number=1)
    traced.through(State.SWITCHOVER)
    assert set(traced.spans()) == {"setup"}
    traced.through(State.POSTCOPY)
    assert set(traced.spans()) == {"setup", "round", "precopy", "switchover"}
    traced.through(State.COMPLETED)
    assert set(traced.spans()) == {"setup", "round", "precopy", "switchover", "postcopy", "migration"}


def test_a_guest_that_was_paused_before_the_switchover_has_all_of_its_downtime_inside() -> None:
    traced = Traced()
    laps = traced.migration._laps
    traced.through(State.PRECOPY)
    paused = time.monotonic()
    traced.through(State.SWITCHOVER)
    laps.start(paused)
    for step in ("stop", "run"):
        laps.lap(step)
    traced.through(State.POSTCOPY)
    spans = traced.spans()
    switchover, stop, run = (spans[name] for name in ("switchover", "stop", "run"))
    for span in (switchover, stop, run):
        assert span.start_time is not None
        assert span.end_time is not None
    assert switchover.start_time <= stop.start_time <= stop.end_time == run.start_time  # type: ignore[operator]
    assert run.start_time <= run.end_time <= switchover.end_time  # type: ignore[operator]


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_no_span_ends_before_it_begins_whatever_the_clock_does(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    traced = Traced(started_at=time.time() - min(ahead, 0.0))
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + int(ahead * 1e9))
    traced.through(State.PRECOPY, State.SWITCHOVER, State.POSTCOPY, State.COMPLETED)
    for span in traced.exporter.get_finished_spans():
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time


def test_the_next_agent_completes_the_span_of_the_one_that_died() -> None:
    died = Traced(parent=CALLER)
    following = Traced(parent=died.trace.parent, started_at=1_000_000.0)
    assert following.trace.traceparent == died.trace.traceparent
    following.migration.set_state(State.FAILED, ConnectionLostError("gone"))
    outer = following.spans()["migration"]
    assert outer.start_time == 1_000_000 * 10**9
    assert outer.attributes is not None
    assert outer.attributes["error.type"] == "connection-lost"
    assert not outer.status.is_ok
    assert outer.parent is not None
    assert f"{outer.parent.span_id:016x}" in CALLER


def test_the_two_sides_are_different_spans_of_one_trace() -> None:
    source = Traced()
    target = Traced(role="target", parent=source.trace.traceparent)
    assert source.trace.traceparent.split("-")[1] == target.trace.traceparent.split("-")[1] == ID
    assert source.trace.traceparent != target.trace.traceparent


def test_a_caller_that_is_not_sampled_is_obeyed_on_both_sides() -> None:
    source = Traced(parent=CALLER.removesuffix("01") + "00")
    target = Traced(role="target", parent=source.trace.traceparent)
    for side in (source, target):
        assert side.trace.traceparent.endswith("-00")
        side.through(State.PRECOPY, State.SWITCHOVER, State.POSTCOPY, State.COMPLETED)
        assert side.spans() == {}


@pytest.mark.parametrize("header", ["", "nonsense", CALLER.replace("-01", ""), "00-" + "0" * 32 + CALLER[35:]])
def test_a_header_that_is_none_begins_a_trace_of_our_own(header: str) -> None:
    traced = Traced(parent=header)
    assert traced.trace.parent == ""
    assert traced.trace.traceparent.startswith(f"00-{ID}-")


def test_a_library_that_does_not_start_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "nowhere.pem"))
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    table = {"tls": {"insecure": True}, "tracing": {"enabled": True}}
    with capture_logs() as logs:
        nothing = tracing.start(config.decode(table, "source"))
    assert type(nothing) is tracing.Tracing
    assert [line["event"] for line in logs] == ["no tracing: OpenTelemetry does not start"]
