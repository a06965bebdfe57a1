"""How far a migration is: written down for the agent that would be started after our death, and read by that one."""

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
    error: MigratedError  # what to say of it, if the guest runs on here
    superseded: bool = False  # a later migration of the same guest is left, too: this one's must not touch the guest

    def session(self) -> Session:
        """The session as it stood."""
        return Session.taken_up(Role.SOURCE, self.entry.position, self.entry.hello, self.entry.page_bytes)


class RestartStage:
    """The journal entry of one migration; ``entry`` is None until the target was greeted, and there is nothing to say."""

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
        self._found = entry is not None  # written by an agent before us
        self.written = entry is not None  # and not removed since, because it could not be changed
        self._recovery_state = recovery_state
        self._guest = guest
        self._dialer = dialer
        self._options = options
        self._writing = asyncio.Lock()
        self._log = log

    def require_entry(self) -> SourceEntry:
        """The entry, where the flow has made one."""
        if self.entry is None:
            raise MigratedError("nothing to note yet: this is a bug")
        return self.entry

    async def write(self, stage: str) -> None:
        """Before the guest is touched (``active``), and before COMMIT is sent (``committed``).  HostError."""
        entry = self.require_entry()
        async with self._writing:
            before, entry.stage = entry.stage, stage
            if not self._found:  # a driver that has not found the guest's process again knows less than what is written
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
        """The target's address or the limits have changed, and nothing else.  HostError."""
        async with self._writing:  # a stage that is being written may be taken back
            if self.entry is not None and self.written:
                self._note_options(self.entry)
                await self._recovery_state.write(self.entry)

    def _note_options(self, entry: SourceEntry) -> None:
        entry.target = str(self._dialer.address)
        entry.max_bandwidth, entry.drain_bandwidth = self._options.max_bandwidth, self._options.drain_bandwidth

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
