"""How far a migration is: written down for the agent that would be started after our death, and read by that one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migrated.guests.driver import FaultSource
    from migrated.recovery.journal import TargetEntry
    from migrated.target.memory import GuestMemory


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died."""

    entry: TargetEntry
    memory: GuestMemory
    faults: FaultSource
