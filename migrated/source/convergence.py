"""When pre-copy has done what it can: policy only, no I/O, no clock.

After each round the caller says what the round looked at, sent and took, and what is marked by now.  The kernel reports
pages, so much of what is marked may not have changed at all: the caller has had a sample of it compared, and so knows about
how much the next round would send.  What that would take is judged by the rounds so far: they already contain link speed,
bandwidth limit and hashing.
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
    """One round, and what it leaves to the next.  Bytes of guest memory, but for those sent."""

    number: int
    seconds: float
    examined_bytes: int  # what was marked: read and hashed
    sent_bytes: int  # on the wire
    marked_bytes: int  # for the next round
    changed_bytes: int  # of these: have changed, going by a sample


#: What a switch-over costs besides (pausing, guest state, commit): of the downtime limit so much is not ours to spend.
SWITCHOVER_SECONDS = 0.03
#: Reading and hashing, until a round has shown it: a careful 4 GB/s.
EXAMINE_SECONDS_PER_BYTE = 0.25e-9
#: A round that sends less than this part of what it looks at says more about looking than about sending.
SENDING_SHARE = 0.25


@dataclasses.dataclass(frozen=True, slots=True)
class StallRule:
    """Another round is worth it if what is left would take at most ``progress`` of the round before.

    So many rounds in a row that are not end pre-copy.
    """

    progress: float
    stalled_rounds: int


#: What is left grows while it is being sent: a part r of a round's time becomes r / (1 - r) by the end of the next, for a
#: guest that writes evenly.  So 0.45 stands for rounds of four fifths, and 0.5 for no progress at all.  In hybrid mode going on
#: costs time and bytes, and stopping costs little; in mode precopy stopping is failure, and doubt speaks for going on.
STALL_RULES = {"hybrid": StallRule(0.45, 1), "precopy": StallRule(0.9, 2)}


class Convergence:
    """Feed it each round's result; it answers with a `Verdict`."""

    def __init__(self, mode: str, *, downtime_limit_seconds: float, max_rounds: int) -> None:
        self.mode = mode
        self.downtime_limit_seconds = downtime_limit_seconds
        self.max_rounds = max_rounds
        self._stall_rule = STALL_RULES[mode]
        self._stalled = 0
        self._examine = EXAMINE_SECONDS_PER_BYTE
        self._send: float | None = None  # seconds a byte; until a round had something to send

    def next_seconds(self, result: RoundResult) -> float:
        """About how long the next round would take, and so sending the rest while paused; 0 while nothing is known."""
        return result.marked_bytes * self._examine + result.changed_bytes * (self._send or 0.0)

    def _learn(self, result: RoundResult) -> None:
        if result.sent_bytes > SENDING_SHARE * result.examined_bytes:
            self._send = result.seconds / result.sent_bytes
        elif result.examined_bytes > 0:
            sending = result.sent_bytes * (self._send or 0.0)
            self._examine = max(result.seconds - sending, 0.0) / result.examined_bytes

    def after(self, result: RoundResult) -> Verdict:
        """What to do after this round."""
        self._learn(result)
        allowed = max(self.downtime_limit_seconds - SWITCHOVER_SECONDS, self.downtime_limit_seconds / 5)
        ahead = self.next_seconds(result)
        if (self._send is not None or result.changed_bytes == 0) and ahead <= allowed:
            return Verdict.FINISH
        progress = result.examined_bytes == 0 or ahead <= self._stall_rule.progress * result.seconds
        self._stalled = 0 if progress else self._stalled + 1
        if result.number >= self.max_rounds or self._stalled >= self._stall_rule.stalled_rounds:
            return Verdict.GIVE_UP if self.mode == "precopy" else Verdict.POSTCOPY
        return Verdict.ROUND
