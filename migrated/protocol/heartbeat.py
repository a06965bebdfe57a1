"""Decide when to send a heartbeat, and when the peer counts as silent.  Time is an argument: there is no clock here."""

from __future__ import annotations


class Heartbeat:
    """Heartbeat times of one connection, in seconds of any monotonic clock; the caller passes its reading as ``now``.

    When `due`, send a Ping.  Report whatever arrives (not only a Pong) with `heard`.  When `expired`, the peer is
    silent: drop the connection.
    """

    def __init__(self, interval_seconds: float, limit_seconds: float, now: float) -> None:
        """Send a Ping every ``interval_seconds``; the peer is silent after ``limit_seconds`` without a byte.

        Raises ValueError unless 0 < interval < limit.
        """
        if not 0 < interval_seconds < limit_seconds:
            msg = f"heartbeat: interval {interval_seconds} s must be more than 0 and less than the limit {limit_seconds} s"
            raise ValueError(msg)
        self._interval = interval_seconds
        self._limit = limit_seconds
        self._asked = now
        self._heard = now

    def due(self, now: float) -> bool:
        """Whether to send a Ping now.  If True, the caller must send it: the next one is due an interval later."""
        if now - self._asked < self._interval:
            return False
        self._asked = now
        return True

    def heard(self, now: float) -> None:
        """Report that bytes from the peer have arrived."""
        self._heard = max(self._heard, now)

    def expired(self, now: float) -> bool:
        """Whether the peer has been silent for longer than the limit."""
        return now - self._heard > self._limit

    def next_at(self) -> float:
        """Return when to check again: the earlier of the next Ping and the limit."""
        return min(self._asked + self._interval, self._heard + self._limit)
