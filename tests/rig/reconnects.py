"""How often a migration may have been taken up again: a lost connection is replaced once, not over and over."""

from __future__ import annotations

from typing import Any


def check_reconnects(times: int, *, seconds: float, heartbeat_limit: float, least: int = 0) -> None:
    """AssertionError when there were more than the losses that a test caused explain.

    One for the loss, and one where it met the reconnect itself.  A host that is too busy may lose a connection that nobody
    took away, but never more than one in ``heartbeat_limit``.
    """
    most = 2 + int(seconds / heartbeat_limit)
    assert least <= times <= most, f"taken up again {times} times in {seconds:.1f} s; {least} to {most} are right"


def check_record(record: dict[str, Any], *, heartbeat_limit: float, least: int = 0) -> None:
    """Likewise, from the timeline of a migration that has ended."""
    times = sum(change["state"] == "recovering" for change in record["timeline"])
    seconds = record["ended_at"] - record["started_at"]
    check_reconnects(times, seconds=seconds, heartbeat_limit=heartbeat_limit, least=least)
