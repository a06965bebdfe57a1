"""The public record of a migration, behind ``status --json``, ``GET /status``, metrics and events.

It also holds the table of migration states.
"""

from __future__ import annotations

import enum
import time
from typing import Final

import msgspec

from migrated.errors import error_fields


def id_of(session: bytes) -> str:
    """Return the migration's id: the whole session id in hex, since a shorter one might not be unique."""
    return session.hex()


def _now() -> float:
    return time.time()


class State(enum.StrEnum):
    """The state of a migration."""

    SETUP = "setup"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    POSTCOPY_PAUSED = "postcopy-paused"
    RECOVERING = "recovering"
    COMPLETED = "completed"
    ABORTED = "aborted"
    FAILED = "failed"


#: The states that may follow each state.
NEXT: dict[State, frozenset[State]] = {
    State.SETUP: frozenset({State.PRECOPY, State.ABORTED, State.FAILED}),
    State.PRECOPY: frozenset({State.SWITCHOVER, State.ABORTED, State.FAILED}),
    State.SWITCHOVER: frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED, State.COMPLETED, State.ABORTED, State.FAILED}),
    State.POSTCOPY: frozenset({State.POSTCOPY_PAUSED, State.RECOVERING, State.COMPLETED, State.FAILED}),
    State.POSTCOPY_PAUSED: frozenset({State.RECOVERING, State.ABORTED, State.COMPLETED, State.FAILED}),
    State.RECOVERING: frozenset(
        {State.POSTCOPY, State.POSTCOPY_PAUSED, State.SWITCHOVER, State.COMPLETED, State.ABORTED, State.FAILED}
    ),
    State.COMPLETED: frozenset(),
    State.ABORTED: frozenset(),
    State.FAILED: frozenset(),
}

ENDED = frozenset({State.COMPLETED, State.ABORTED, State.FAILED})


class Faults(msgspec.Struct):
    """Number of faults served, by kind."""

    current: int = 0
    stale: int = 0
    missing: int = 0


class FaultSeconds(msgspec.Struct):
    """Latency of all faults; ``histogram_log2_us[i]`` counts those that took [2^i, 2^(i+1)) microseconds."""

    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0
    histogram_log2_us: list[int] = msgspec.field(default_factory=list)


class ErrorInfo(msgspec.Struct):
    """Why a migration failed, or why it is paused."""

    code: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """Convert any exception; one that is not ours gets the code ``internal``."""
        return cls(**{key: str(value) for key, value in error_fields(error).items() if key != "state"})


class StateChange(msgspec.Struct):
    """One step of the time line; ``at`` is Unix time in seconds."""

    state: State
    at: float


#: The steps of the downtime as each side sees them, in chronological order.  docs/http.md says where each one ends.
SOURCE_STEPS: Final = ("stop", "save", "scan", "send", "map", "transfer", "load", "commit", "run")
TARGET_STEPS: Final = ("load", "hook", "journal", "commit", "run")


class Laps:
    """Split a span of time into consecutive steps, whose seconds add up to the whole span.

    Times are of ``time.monotonic()``.  Before `start`, `lap` does nothing.  ``began``: when the first step began.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.began: float | None = None
        self._last: float | None = None

    def start(self, at: float) -> None:
        """Begin the first step."""
        self.seconds.clear()
        self.began = self._last = at

    def lap(self, step: str, at: float | None = None) -> None:
        """End the current step now, or at ``at``, and begin the next one."""
        if self._last is not None:
            at = time.monotonic() if at is None else at
            self.seconds[step] = self.seconds.get(step, 0.0) + at - self._last
            self._last = at

    @property
    def total(self) -> float | None:
        """Seconds of all steps so far; None before `start`."""
        return None if self._last is None else sum(self.seconds.values())


class Record(msgspec.Struct, kw_only=True):
    """One migration on one agent.  Field names carry the units; times are Unix time in seconds."""

    id: str  # the session's 16 bytes in hex; the same on both agents
    guest: str
    role: str  # "source" | "target"
    mode: str
    peer: str = ""  # HOST:PORT of the other agent
    driver: str = ""
    requested_by: str = ""  # who gave the command to start it, on the source
    state: State = State.SETUP
    page_size: int = 0  # bytes, of the target's largest host page
    total_bytes: int = 0
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    round: int = 0
    dirty_bytes_per_second: float = 0.0
    throughput_bytes_per_second: float = 0.0
    max_bandwidth_bytes_per_second: int = 0
    stale_pages: int = 0
    stale_bytes: int = 0  # of these pages: regions may have host pages of different sizes
    downtime_seconds: float | None = None
    downtime_breakdown: dict[str, float] = msgspec.field(default_factory=dict)  # seconds by step; see docs/http.md
    faults: Faults = msgspec.field(default_factory=Faults)
    fault_seconds: FaultSeconds = msgspec.field(default_factory=FaultSeconds)
    faults_by_kind_us: dict[str, list[int]] = msgspec.field(default_factory=dict)  # histograms for /metrics
    fault_sum_seconds: dict[str, float] = msgspec.field(default_factory=dict)  # sums of those, for /metrics
    bytes_by_kind: dict[str, int] = msgspec.field(default_factory=dict)  # payload, header, zero, unchanged, …
    started_at: float = msgspec.field(default_factory=_now)
    ended_at: float | None = None
    error: ErrorInfo | None = None
    timeline: list[StateChange] = msgspec.field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the migration is in a final state."""
        return self.state in ENDED
