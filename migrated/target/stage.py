"""How far a migration is: written down for the agent that would be started after our death, and read by that one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import structlog

from migrated.agent.migration import quietly

if TYPE_CHECKING:
    from migrated.agent.record import Record
    from migrated.guests.driver import FaultSource
    from migrated.recovery.journal import TargetEntry
    from migrated.recovery.state import Survival
    from migrated.target.memory import GuestMemory


log = structlog.get_logger("migrated.target")


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died."""

    entry: TargetEntry
    memory: GuestMemory
    faults: FaultSource


class JournalledStage:
    """The journal entry of one migration; its flow fills in what it comes to know."""

    def __init__(self, survival: Survival[TargetEntry], entry: TargetEntry, record: Record) -> None:
        self.entry = entry
        self._survival = survival
        self._record = record

    async def write(self, stage: str) -> None:
        """See `TargetEntry` for the stages.  HostError."""
        self.entry.stage = stage
        self.entry.peer = self._record.peer
        await self._survival.write(self.entry)

    async def end(self, *, gone: bool) -> None:
        """Nothing need survive any more.  Of a process that is not ``gone`` the next agent must know: it is to be ended."""
        if gone:
            await self._survival.over()
        elif await quietly(self.write("setup"), log, "write the journal"):  # else what is kept still fits the entry
            await self._survival.let_go()
