"""The stage that a source migration has reached, as recorded in the journal.

This agent writes it; if it dies, the next agent reads it and recovers the migration.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

from migrated.errors import MigratedError
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.recovery.journal import JournalError

if TYPE_CHECKING:
    from migrated.guests.driver import SourceGuest
    from migrated.link.dialing import Dialer
    from migrated.memory.regions import SourceMemory
    from migrated.recovery.journal import SourceEntry
    from migrated.recovery.state import RecoveryState
    from migrated.source.options import Options


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """What is left of a migration whose agent died: the entry and, after COMMIT, the frozen memory."""

    entry: SourceEntry
    memory: SourceMemory
    error: MigratedError  # the error to report if the guest keeps running here
    superseded: bool = False  # a later migration has the guest: this one must not touch it

    def session(self) -> Session:
        """Restore the session."""
        return Session.taken_up(Role.SOURCE, self.entry.position, self.entry.hello, self.entry.page_bytes)


class RestartStage:
    """The journal entry of one migration.  ``entry`` is None until Hello: before that there is nothing to record."""

    def __init__(
        self,
        recovery_state: RecoveryState[SourceEntry],
        guest: SourceGuest,
        dialer: Dialer,
        options: Options,
        *,
        log: Any,
        entry: SourceEntry | None = None,
    ) -> None:
        self.entry = entry
        self._found = entry is not None  # written by a previous agent
        self.written = entry is not None  # and not removed since (see `withdraw_commit`)
        self._recovery_state = recovery_state
        self._guest = guest
        self._dialer = dialer
        self._options = options
        self._writing = asyncio.Lock()
        self._log = log

    def require_entry(self) -> SourceEntry:
        """Return the entry that the flow has made."""
        if self.entry is None:
            raise MigratedError("no journal entry yet: this is a bug")
        return self.entry

    async def write(self, stage: str) -> None:
        """Record a stage: ``active`` before the guest is touched, ``committed`` before COMMIT is sent.  HostError."""
        entry = self.require_entry()
        async with self._writing:
            before, entry.stage = entry.stage, stage
            if not self._found:  # else the entry knows more than a driver that has not found the process again
                entry.guest = self._guest.memento()
            self._note_options(entry)
            try:
                await self._recovery_state.write(entry)
            except JournalError as problem:
                if not problem.replaced:
                    entry.stage = before
                raise
            self.written = True

    async def rewrite(self) -> None:
        """Record a new target address or new limits, and nothing else.  Raises HostError."""
        async with self._writing:  # a stage that is being written may still be reverted
            if self.entry is not None and self.written:
                self._note_options(self.entry)
                await self._recovery_state.write(self.entry)

    def _note_options(self, entry: SourceEntry) -> None:
        entry.target = str(self._dialer.address)
        entry.max_bandwidth, entry.drain_bandwidth = self._options.max_bandwidth, self._options.drain_bandwidth

    async def withdraw_commit(self) -> bool:
        """Make sure that the journal does not say COMMIT before the guest resumes here: the next agent would trust it.

        Return False if it does and cannot be changed.
        """
        if self.entry is None or self.entry.stage != "committed":
            return True
        try:
            await self.write("active")
        except MigratedError as problem:
            try:
                async with self._writing:
                    await self._recovery_state.remove_entry()
                    self.written = False
            except OSError:
                self._log.error(
                    "the guest stays paused: the journal says COMMIT, which was not sent, and cannot be changed",
                    error=str(problem),
                )
                return False
        return True
