"""The public record of an evacuation: its guests, where each goes and why not.  It is also what the journal keeps.

`migrated.source.evacuation` moves it on.
"""

from __future__ import annotations

import enum
import time
from typing import Any

import msgspec

from migrated.agent.record import ErrorInfo
from migrated.options import Order


class EvacuationState(enum.StrEnum):
    """The state of an evacuation."""

    PLANNED = "planned"  # a dry run: nothing is done
    RUNNING = "running"
    ABORTING = "aborting"  # nothing is started any more; migrations after COMMIT are waited for
    COMPLETED = "completed"  # every eligible guest has been migrated
    FAILED = "failed"  # some have not
    ABORTED = "aborted"


ENDED = frozenset({EvacuationState.PLANNED, EvacuationState.COMPLETED, EvacuationState.FAILED, EvacuationState.ABORTED})


class MoveState(enum.StrEnum):
    """The state of one guest's move."""

    WAITING = "waiting"
    MIGRATING = "migrating"
    COMPLETED = "completed"
    FAILED = "failed"  # it stays here, or its migration failed after COMMIT: the error says which
    ABORTED = "aborted"  # somebody wants it to stay here
    INELIGIBLE = "ineligible"  # it cannot be migrated as it is


class Attempt(msgspec.Struct, kw_only=True):
    """A migration that did not succeed; the guest stayed here.  ``migration`` is empty if it was not even started."""

    target: str
    migration: str
    at: float  # its end, in Unix time
    error: ErrorInfo
    counted: bool = True  # against the limit of attempts


class Move(msgspec.Struct, kw_only=True):
    """One guest.  ``error``: why it has not been migrated, or why it waits."""

    guest: str
    driver: str = ""
    memory_bytes: int = 0
    priority: int = 0
    labels: list[str] = []
    state: MoveState = MoveState.WAITING
    target: str = ""  # where it goes, HOST:PORT; while it waits, where it would go now
    page_size: int = 0  # bytes, of its memory there
    reserved: bool = True  # all of its memory there is taken at the start
    migration: str = ""  # id of its current or last migration
    phase: str = ""  # state of that migration
    transferred_bytes: int = 0
    downtime_seconds: float | None = None
    started_at: float | None = None  # that migration, Unix time
    ended_at: float | None = None
    attempts: list[Attempt] = []
    error: ErrorInfo | None = None


class Target(msgspec.Struct, kw_only=True):
    """A target as it last answered.  ``error``: why it did not."""

    address: str
    memory_bytes: int = 0
    pools: dict[int, int] = {}  # pages that are available, by their size in bytes
    migrations: int = 0
    max_migrations: int = 0
    heard_at: float | None = None  # Unix time of the last answer
    error: ErrorInfo | None = None


class Evacuation(msgspec.Struct, kw_only=True):
    """One evacuation.  Times are Unix time in seconds.  ``guests``: in the order in which they are to go."""

    id: str
    state: EvacuationState = EvacuationState.RUNNING
    order: Order
    parallel: int
    parallel_per_target: int
    max_attempts: int
    patience_seconds: int
    max_bandwidth_bytes_per_second: int = 0  # all migrations together; 0: no common limit
    options: dict[str, Any] = {}  # of the migrations, as in StartRequest
    targets: list[Target]
    guests: list[Move]
    problems: list[ErrorInfo] = []  # why guests may be missing
    requested_by: str = ""  # who gave the command to start it
    started_at: float = msgspec.field(default_factory=time.time)
    ended_at: float | None = None

    @property
    def ended(self) -> bool:
        """Whether the evacuation is in a final state."""
        return self.state in ENDED

    @property
    def eligible(self) -> list[Move]:
        """The guests that could be migrated when the evacuation began."""
        return [move for move in self.guests if move.state is not MoveState.INELIGIBLE]

    def moves(self, *states: MoveState) -> list[Move]:
        """Return the guests in one of these states."""
        return [move for move in self.guests if move.state in states]


class EvacuationList(msgspec.Struct):
    """Answer of ``GET /v1/evacuations``, oldest first."""

    evacuations: list[Evacuation]
