"""When pre-copy has done what it can: policy only, no I/O, no clock.

After each round the caller says how much the round sent, how long it took, and how much has been written meanwhile.  The
time the rest would take is estimated from the last round itself (seconds a dirty byte): that already contains link speed,
bandwidth limit, hashing, and how many of a page's blocks really change.
"""

from __future__ import annotations

import dataclasses
import enum


class Verdict(enum.Enum):
    """What to do next."""

    ROUND = "round"  # another round
    FINISH = "finish"  # pause, and send the rest while paused: it fits the downtime limit
    POSTCOPY = "postcopy"  # pause, and let the rest follow after the switch-over
    GIVE_UP = "give-up"  # mode precopy: it will not converge within the limits


@dataclasses.dataclass(frozen=True, slots=True)
class RoundResult:
    """One round: what it had to look at, how long it took, what was written while it ran."""

    number: int
    sent_dirty_bytes: int
    seconds: float
    dirty_bytes: int


#: What a switch-over costs besides (pausing, guest state, commit): of the downtime limit so much is not ours to spend.
SWITCHOVER_SECONDS = 0.03
#: A round that leaves more than this part of what it had to send has made no progress.
PROGRESS = 0.9
#: So many rounds without progress in a row end pre-copy.
STALLED_ROUNDS = 2


class Convergence:
    """Feed it each round's result; it answers with a `Verdict`."""

    def __init__(self, mode: str, *, downtime_limit_seconds: float, max_rounds: int) -> None:
        self.mode = mode
        self.downtime_limit_seconds = downtime_limit_seconds
        self.max_rounds = max_rounds
        self._stalled = 0
        self._seconds_per_byte: float | None = None  # until a round had something to send

    def estimate_seconds(self, dirty_bytes: int) -> float:
        """How long sending this much written memory would take, by the last round; 0 while nothing is known."""
        return dirty_bytes * (self._seconds_per_byte or 0.0)

    def after(self, result: RoundResult) -> Verdict:
        """What to do after this round."""
        if result.sent_dirty_bytes > 0:
            self._seconds_per_byte = result.seconds / result.sent_dirty_bytes
        allowed = max(self.downtime_limit_seconds - SWITCHOVER_SECONDS, self.downtime_limit_seconds / 5)
        known = self._seconds_per_byte is not None or result.dirty_bytes == 0
        if known and self.estimate_seconds(result.dirty_bytes) <= allowed:
            return Verdict.FINISH
        if result.number > 1 and result.dirty_bytes > PROGRESS * result.sent_dirty_bytes:
            self._stalled += 1
        else:
            self._stalled = 0
        if result.number >= self.max_rounds or self._stalled >= STALLED_ROUNDS:
            return Verdict.GIVE_UP if self.mode == "precopy" else Verdict.POSTCOPY
        return Verdict.ROUND
