"""Decide when pre-copy should end.  This is policy only: no I/O, no clock.

After each round the caller reports how much the round examined and sent, how long it took, and how much is marked now.
The kernel reports whole pages, so much of what is marked may not have changed at all.  The caller therefore compares a
sample and estimates how much the next round would send.  The time that takes is estimated from earlier rounds, which
already include link speed, bandwidth limit and hashing.
"""

from __future__ import annotations

import dataclasses
import enum


class Verdict(enum.Enum):
    """What to do after a round."""

    ROUND = "round"  # another round
    FINISH = "finish"  # pause, and send the rest while paused: it fits the downtime limit
    POSTCOPY = "postcopy"  # pause, and send the rest after the switchover
    GIVE_UP = "give-up"  # mode precopy: the guest does not converge within the limits


@dataclasses.dataclass(frozen=True, slots=True)
class RoundResult:
    """One round, and what it leaves for the next.  All bytes but ``sent_bytes`` are bytes of guest memory."""

    number: int
    seconds: float
    examined_bytes: int  # marked before the round: read and hashed
    sent_bytes: int  # on the wire
    marked_bytes: int  # for the next round
    changed_bytes: int  # of these, changed: estimated from a sample


#: Part of the downtime that sending cannot use: pausing, guest state and commit take this long.  Measured with QEMU: 7 to
#: 12 ms, 16 to 18 as the 99th percentile (docs/benchmarks.md).  While they begin, the guest still writes a few ms.
SWITCHOVER_SECONDS = 0.02
#: In hybrid mode the guest would rather run on, and get the rest afterwards: only this part of the limit is for sending.
HYBRID_SHARE = 0.2
#: Time to read and hash, until a round has measured it: a conservative 4 GB/s.
EXAMINE_SECONDS_PER_BYTE = 0.25e-9
#: A round that sends less than this part of what it examines measures examining rather than sending.
SENDING_SHARE = 0.25


@dataclasses.dataclass(frozen=True, slots=True)
class StallRule:
    """Another round is worthwhile if the rest would take at most ``progress`` times the last round's time.

    After ``stalled_rounds`` consecutive rounds without such progress, pre-copy ends.  With ``examining``, a round that
    mostly examined memory, and sent little, does not count.
    """

    progress: float
    stalled_rounds: int
    examining: bool


#: The rest grows while it is being sent: for a guest that writes evenly, a part r of a round's time becomes r / (1 - r)
#: by the end of the next.  So with 0.45 each round takes about four fifths of the one before, and 0.5 means no progress
#: at all.  In hybrid mode another round costs time and bytes, and stopping costs little.  In mode precopy stopping
#: means failure, so when in doubt, continue: up to the limit of rounds while each costs a fraction of a second and few
#: bytes, as where a guest writes here and there on huge pages.  How long such a round takes depends on what else the
#: processors do, and one that is quicker than the others may be followed by a rest that fits.
STALL_RULES = {"hybrid": StallRule(0.45, 1, examining=False), "precopy": StallRule(0.9, 2, examining=True)}


class Convergence:
    """Feed each round's result to `after`; it returns a `Verdict`."""

    def __init__(self, mode: str, *, downtime_limit_seconds: float, max_rounds: int) -> None:
        self.mode = mode
        self.downtime_limit_seconds = downtime_limit_seconds
        self.max_rounds = max_rounds
        self._stall_rule = STALL_RULES[mode]
        self._stalled = 0
        self._examine = EXAMINE_SECONDS_PER_BYTE
        self._send: float | None = None  # seconds per byte; None until a round had something to send

    def next_seconds(self, result: RoundResult) -> float:
        """Estimate the time of the next round, and so of sending the rest while paused; 0 while nothing is known."""
        return result.marked_bytes * self._examine + result.changed_bytes * (self._send or 0.0)

    @staticmethod
    def _sending(result: RoundResult) -> bool:
        return result.sent_bytes > SENDING_SHARE * result.examined_bytes

    def _learn(self, result: RoundResult) -> None:
        if self._sending(result):
            self._send = result.seconds / result.sent_bytes
        elif result.examined_bytes > 0:
            sending = result.sent_bytes * (self._send or 0.0)
            self._examine = max(result.seconds - sending, 0.0) / result.examined_bytes

    def after(self, result: RoundResult) -> Verdict:
        """Decide what to do after this round.

        After FINISH it may be asked again about the same round, with what is marked later.
        """
        self._learn(result)
        allowed = self.downtime_limit_seconds * HYBRID_SHARE
        if self.mode == "precopy":
            allowed = max(self.downtime_limit_seconds - SWITCHOVER_SECONDS, allowed)
        ahead = self.next_seconds(result)
        if (self._send is not None or result.changed_bytes == 0) and ahead <= allowed:
            return Verdict.FINISH
        progress = (
            result.examined_bytes == 0
            or ahead <= self._stall_rule.progress * result.seconds
            or (self._stall_rule.examining and not self._sending(result))
        )
        self._stalled = 0 if progress else self._stalled + 1
        if result.number >= self.max_rounds or self._stalled >= self._stall_rule.stalled_rounds:
            return Verdict.GIVE_UP if self.mode == "precopy" else Verdict.POSTCOPY
        return Verdict.ROUND
