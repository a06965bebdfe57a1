"""Trace migrations with OpenTelemetry: each is one trace over both agents.

    migration                     the source's; a child of the caller's span if the request had a traceparent
    ├── setup, precopy, …         each state of the time line that is not final
    │   └── round; stop, save, …  below precopy the rounds, below switchover the steps of the downtime
    └── incoming migration        the target's, with its own states and steps

Hello takes the source's context to the target, so that both journals have it.  Without a caller's trace the trace id is
the migration's id.  The ids of the two outer spans follow from the migration's id as well.  So an agent that takes up a
migration completes the span of the agent that died, which had not been sent.

Spans are made from the time line once a state has ended, but none while a guest may be paused: those from before the
switchover wait until it is over.  The library's own thread sends them, out of a bounded queue, with limits of time.  It
drops what the collector does not take.  Where to, how many and how often is up to the library's OTEL_* variables.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Final, Self

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from migrated import __version__
from migrated.address import parse_address
from migrated.agent.record import State
from migrated.agent.tracing import Trace, Tracing
from migrated.errors import AbortedError, ConfigError, as_migrated_error
from migrated.log import Sparing

if TYPE_CHECKING:
    from migrated.agent.record import Laps, Record
    from migrated.config import AgentConfig

#: How long an agent that ends waits for its last spans to be sent.
CLOSE_SECONDS: Final = 3.0
#: Rounds of which a trace has a span each.
MAX_ROUNDS: Final = 1000
_NAMES: Final = {"source": "migration", "target": "incoming migration"}

log = structlog.get_logger("migrated.tracing")


class RecordedTracing(Tracing):
    """Owns the library's queue and thread."""

    def __init__(self, provider: TracerProvider, ids: _Ids) -> None:
        self._provider = provider
        self._ids = ids
        self._tracer = provider.get_tracer("migrated", __version__)

    @classmethod
    def start(cls, config: AgentConfig) -> Self:
        """Start the library.  Raises whatever it raises about its variables."""
        _adopt_messages()
        ours = {"service.name": "migrated", "service.version": __version__, "host.name": config.agent.name}
        resource = Resource.create({**ours, "migrated.role": config.role}).merge(OTELResourceDetector().detect())
        ids = _Ids()
        provider = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
        log.info("tracing", service=resource.attributes["service.name"])
        return cls(provider, ids)

    def begin(self, record: Record, laps: Laps, *, parent: str, started_at: float) -> Trace:
        return RecordedTrace(self._tracer, self._ids, record, laps, parent=parent, started_at=started_at)

    def close(self) -> None:
        # In a thread that nobody waits for: the library's own limit is longer than ours.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class RecordedTrace(Trace):
    """Times are Unix time in nanoseconds, but advance as the monotonic clock does: no span ends before it begins."""

    def __init__(
        self, tracer: trace.Tracer, ids: _Ids, record: Record, laps: Laps, *, parent: str, started_at: float
    ) -> None:
        self._ahead = time.time_ns() - time.monotonic_ns()
        self._tracer = tracer
        self._record = record
        self._laps = laps
        self._phase, self._phase_began = record.state, self._now()
        #: States whose spans are still to be made, with their begin, their end, and the error that ended them.
        self._ended: list[tuple[State, int, int, BaseException | None]] = []
        self._rounds: list[tuple[int, int, dict[str, int]]] = []
        context = TraceContextTextMapPropagator().extract({"traceparent": parent})
        self.parent = parent if trace.get_current_span(context).get_span_context().is_valid else ""
        ids.choose(record)
        self._outer: trace.Span | None = tracer.start_span(
            _NAMES[record.role],
            context=context,
            kind=trace.SpanKind.CLIENT if record.role == "source" else trace.SpanKind.SERVER,
            start_time=min(int(started_at * 1e9), self._phase_began),
            attributes=self._about(),
        )
        ids.forget()
        self._context = trace.set_span_in_context(self._outer)
        own = self._outer.get_span_context()
        if own.is_valid:
            self.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags & 1:02x}"

    def _now(self) -> int:
        return time.monotonic_ns() + self._ahead

    def _at(self, monotonic_seconds: float) -> int:
        return int(monotonic_seconds * 1e9) + self._ahead

    def _about(self) -> dict[str, str | int]:
        record = self._record
        found: dict[str, str | int] = {
            "migrated.migration.id": record.id,
            "migrated.guest": record.guest,
            "migrated.driver": record.driver,
            "migrated.mode": record.mode,
        }
        try:
            peer = parse_address(record.peer)
        except ConfigError:  # a target after a restart, before the source has called
            return found
        side = "server" if record.role == "source" else "client"
        return {**found, f"{side}.address": peer.host, f"{side}.port": peer.port}

    def enter(self, state: State, error: BaseException | None) -> None:
        if self._outer is None:
            return
        now = self._now()
        self._ended.append((self._phase, self._phase_began, now, error))
        self._phase, self._phase_began = state, now
        if state is State.SWITCHOVER:
            return  # every microsecond counts until the guest runs again
        for phase in self._ended:
            self._make_phase(*phase)
        self._ended.clear()
        if self._record.ended:
            self._end(self._outer, now, error)
            self._outer = None

    def round(self, began: float, **figures: int) -> None:
        if len(self._rounds) < MAX_ROUNDS:
            self._rounds.append((self._at(began), self._now(), figures))

    def _make_phase(self, phase: State, began: int, ended: int, error: BaseException | None) -> None:
        steps = self._steps() if phase is State.SWITCHOVER else []
        # The guest may have been paused before the state changed, and a clock that is read twice differs.
        began = min([began, *(step_began for _, step_began, _ in steps)])
        ended = max([ended, *(step_ended for _, _, step_ended in steps)])
        span = self._tracer.start_span(phase.value, context=self._context, start_time=began)
        inside = trace.set_span_in_context(span)
        for step, step_began, step_ended in steps:
            self._tracer.start_span(step, context=inside, start_time=step_began).end(step_ended)
        if phase is State.PRECOPY:
            for round_began, round_ended, figures in self._rounds:
                attributes = {f"migrated.round.{key}": value for key, value in figures.items()}
                one = self._tracer.start_span("round", context=inside, start_time=round_began, attributes=attributes)
                one.end(round_ended)
            self._rounds.clear()
        if error is not None:
            _mark_failed(span, error)
        span.end(ended)

    def _steps(self) -> list[tuple[str, int, int]]:
        """Return the steps of the downtime so far, each with its begin and its end."""
        found: list[tuple[str, int, int]] = []
        at = self._laps.began
        if at is not None:
            for step, seconds in self._laps.seconds.items():
                found.append((step, self._at(at), self._at(at + seconds)))
                at += seconds
        return found

    def _end(self, span: trace.Span, at: int, error: BaseException | None) -> None:
        record = self._record
        span.set_attributes(
            {
                **self._about(),
                "migrated.result": record.state.value,
                "migrated.memory_bytes": record.total_bytes,
                "migrated.transferred_bytes": record.transferred_bytes,
                "migrated.rounds": record.round,
                "migrated.stale_pages": record.stale_pages,
            }
        )
        if record.downtime_seconds is not None:
            span.set_attribute("migrated.downtime_seconds", record.downtime_seconds)
        if error is not None:
            _mark_failed(span, error)
        span.end(at)


def _mark_failed(span: trace.Span, error: BaseException) -> None:
    """Mark a span with the error that ended it.  An abort on request is no failure."""
    ours = as_migrated_error(error)
    span.set_attribute("error.type", ours.code)
    if ours.code != AbortedError.default_code:
        span.set_status(trace.Status(trace.StatusCode.ERROR, ours.message))


class _Ids(RandomIdGenerator):
    """Random ids, except those of a migration's outer span, which the next agent must be able to find again."""

    def __init__(self) -> None:
        self._trace_id = self._span_id = 0  # of the next span; 0: any

    def choose(self, record: Record) -> None:
        """Choose the ids of this migration's outer span for the spans until `forget`."""
        digest = hashlib.sha256(f"{record.role} {record.id}".encode()).digest()
        self._trace_id, self._span_id = int(record.id, 16), int.from_bytes(digest[:8], "big")

    def forget(self) -> None:
        """Choose random ids again."""
        self._trace_id = self._span_id = 0

    def generate_trace_id(self) -> int:
        return self._trace_id or super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self._span_id or super().generate_span_id()


class _Messages(logging.Handler):
    """Passes the library's messages on as warnings: few, since a dead collector causes one after another."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._log = Sparing(log, lines=5, seconds=60.0)

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning("OpenTelemetry", message=record.getMessage())


def _adopt_messages() -> None:
    library = logging.getLogger("opentelemetry")
    library.handlers, library.propagate = [_Messages()], False
