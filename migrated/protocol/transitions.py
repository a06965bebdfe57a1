"""Which message may follow which: the tables of both sides."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """Which side a session is."""

    SOURCE = "source"
    TARGET = "target"


class State(enum.StrEnum):
    """Where a session stands; the same word on both sides means the same point of the conversation."""

    IDLE = "idle"  # nothing said yet
    HELLO = "hello"  # Hello sent/received
    PRECOPY = "precopy"  # Ready received/sent
    SWITCHOVER = "switchover"  # the guest is paused, the stale map travels
    MAPPED = "mapped"  # the stale map is whole
    LOADED = "loaded"  # Loaded received/sent: the source alone decides now
    COMMITTED = "committed"  # Commit sent/received
    POSTCOPY = "postcopy"  # Running received/sent
    DONE = "done"  # Done received/sent
    CLOSED = "closed"  # Released sent/received, or the connection lost after Done: over
    ABORTING = "aborting"  # Abort sent or received, the target cleans up
    ABORTED = "aborted"  # the target has nothing left of the guest: over
    UNSETTLED = "unsettled"  # source: gave up before COMMIT, the target may not know yet
    SETTLING = "settling"  # Resume(committed=False) sent/received, Abort follows
    WAITING = "waiting"  # target: Loaded was sent, then the connection was lost: only the source knows
    PAUSED = "paused"  # COMMIT sent/received, connection lost
    RESUMING = "resuming"  # source: Resume(committed=True) sent
    REFUSED = "refused"  # source: the target answered Resume with Abort; the guest stays paused here
    REFUSING = "refusing"  # target: Resume(committed=True) for a session of which nothing is left
    RESUMING_LOADED = "resuming-loaded"  # target: Resume received, it stands at loaded / running / done
    RESUMING_RUNNING = "resuming-running"
    RESUMING_DONE = "resuming-done"
    LISTING_LOADED = "listing-loaded"  # Resumed sent/received, the map of lacking pages travels
    LISTING_RUNNING = "listing-running"
    LISTING_DONE = "listing-done"
    RECOMMITTING = "recommitting"  # source: the target still waits for COMMIT: send it again
