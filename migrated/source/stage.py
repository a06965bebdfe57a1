"""How far a migration is: written down for the agent that would be started after our death, and read by that one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from migrated.errors import MigratedError
from migrated.protocol.messages import Ready
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role, State
from migrated.recovery.journal import JournalError

if TYPE_CHECKING:
    from migrated.guests.driver import SourceGuest
    from migrated.link.dialing import Dialer
    from migrated.memory.regions import SourceMemory
    from migrated.recovery.journal import SourceEntry
    from migrated.recovery.state import Survival


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died: the entry and, after COMMIT, the frozen memory."""

    entry: SourceEntry
    memory: SourceMemory
    error: MigratedError  # what to say of it, if the guest runs on here
    superseded: bool = False  # a later migration of the same guest is left, too: this one's must not touch the guest

    @property
    def committed(self) -> bool:
        """Whether COMMIT was sent, or may have been."""
        return self.entry.stage != "active"

    def session(self) -> Session:
        """The session as it stood."""
        state = State.PAUSED if self.committed else State.UNSETTLED
        ready = Ready(self.entry.page_bytes) if self.entry.page_bytes else None
        return Session(Role.SOURCE, state=state, hello=self.entry.hello, ready=ready)


class JournalledStage:
    """The journal entry of one migration; ``entry`` is None until the target was greeted, and there is nothing to say."""

    def __init__(
        self,
        survival: Survival[SourceEntry],
        guest: SourceGuest,
        dialer: Dialer,
        *,
        log: Any,
        entry: SourceEntry | None = None,
    ) -> None:
        self.entry = entry
        self.struck = False  # removed, since it could not be changed, and not written again since
        self._survival = survival
        self._guest = guest
        self._dialer = dialer
        self._log = log

    async def write(self, stage: str) -> None:
        """Before the guest is touched (``active``), and before COMMIT is sent (``committed``).  HostError."""
        if self.entry is None:
            raise MigratedError("nothing to note yet: this is a bug")
        before, self.entry.stage = self.entry.stage, stage
        self.entry.target = str(self._dialer.address)
        self.entry.guest = self._guest.memento()
        try:
            await self._survival.write(self.entry)
        except JournalError as problem:
            if not problem.replaced:
                self.entry.stage = before
            raise
        self.struck = False

    async def withdraw_commit(self) -> bool:
        """Make sure that no journal says COMMIT before the guest runs on: the next agent would believe it.

        False: it says so and cannot be changed.
        """
        if self.entry is None or self.entry.stage != "committed":
            return True
        try:
            await self.write("active")
        except MigratedError as problem:
            try:
                await self._survival.strike()
                self.struck = True
            except OSError:
                self._log.error(
                    "the guest stays paused: the journal says COMMIT, which was not sent, and cannot be changed",
                    error=str(problem),
                )
                return False
        return True
