"""Before COMMIT: nothing of the guest is left here, and then the source is told so, which lets it run on there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from migrated.agent.migration import quietly
from migrated.errors import MigratedError, named
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import Aborted

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.guests.driver import TargetGuest
    from migrated.target.connection import SourceConnection
    from migrated.target.memory import GuestMemory
    from migrated.target.stage import JournalledStage


class Rollback:
    """Of one migration."""

    def __init__(
        self,
        migration: Migration,
        connection: SourceConnection,
        guest: TargetGuest,
        memory: GuestMemory,
        stage: JournalledStage,
    ) -> None:
        self._migration = migration
        self._connection = connection
        self._guest = guest
        self._memory = memory
        self._stage = stage

    async def run(self, error: BaseException) -> None:
        """No process, memory or descriptor of this guest stays here; then the source is told so."""
        link, session = self._connection.link, self._connection.session
        if link is not None:
            error = await link.explained(error)
        self._migration.log.warning("giving up", error=str(error))
        if link is not None and link.broken is None and session.abort_allowed:
            with contextlib.suppress(MigratedError):
                await link.send(abort_of(named(error)))
        await self._release_everything()
        if link is not None and link.broken is None and session.may_send(Aborted()):
            with contextlib.suppress(MigratedError):
                await link.send(Aborted())
        self._migration.end_before_commit(error)

    async def _release_everything(self) -> None:
        await self._migration.stop_background()
        gone = await quietly(self._guest.kill(), self._migration.log, "end the guest process")
        await self._connection.close_engine()
        self._memory.close()
        await self._stage.end(gone=gone)
