"""Dirty tracking of one guest, from its start to the moment nothing of it is left in the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from migrated.agent.migration import quietly
from migrated.waiting import in_thread

if TYPE_CHECKING:
    from migrated.guests.driver import SourceGuest
    from migrated.memory.tracker import Tracker


class Tracking:
    """``tracker`` is set while the guest is tracked."""

    def __init__(self, guest: SourceGuest, log: Any) -> None:
        self.tracker: Tracker | None = None
        self._guest = guest
        self._log = log

    async def stop(self) -> None:
        """Take it off, before the guest runs on here.  Also where it was only being attached."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            await quietly(in_thread(tracker.disarm), self._log, "disarm dirty tracking")
            tracker.close()
        await quietly(self._guest.release_tracking(), self._log, "release dirty tracking")

    def close(self) -> None:
        """Free our side; what is in the guest stays, since the guest does not run here any more."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.close()
