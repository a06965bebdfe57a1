"""One connection of a migration to the other agent, from its first byte until it is closed.

A migration outlives its connections: after COMMIT, a new connection replaces one that failed.  A failed connection is
closed and never reused.  Every failure is reported to the connection that it belongs to.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from migrated.errors import ConnectionLostError, MigratedError
from migrated.waiting import Scope, in_thread

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.link.control_link import ControlLink


class Connection:
    """The control link, and the page connections that the migration's engine has at the time.

        async with connection:
            async with connection.alive:
                ...                      # cancelled when the connection fails
            ...                          # the link may still carry final messages

    Leaving the outer block closes everything.  The session is then in the state that follows a lost connection.
    """

    def __init__(self, migration: Migration, link: ControlLink | None = None) -> None:
        self.alive = Scope()
        self._migration = migration
        self._link = link
        if link is not None:
            self.attach(link)

    def attach(self, link: ControlLink) -> None:
        """Use this link for the rest of the connection."""
        self._link = link
        link.ended.add_done_callback(self._ended)

    def _ended(self, ended: asyncio.Future[MigratedError]) -> None:
        if not ended.cancelled():
            self.alive.fail(ended.result())

    @property
    def link(self) -> ControlLink:
        """The control link.  Raises ConnectionLostError if it has not been dialled."""
        if self._link is None:
            raise ConnectionLostError("there is no connection")
        return self._link

    @property
    def speaking(self) -> bool:
        """Whether the link can still send, although the session may have ended."""
        return self._link is not None and self._link.broken is None

    async def reason_for(self, error: BaseException) -> BaseException:
        """Return the peer's reason for the failure if the peer has sent one, else ``error``."""
        return error if self._link is None else await self._link.reason_for(error)

    async def drop_streams(self) -> None:
        """Close the page connections; the engine can take new ones.  Delivers the events pending for the old ones."""
        engine = self._migration.engine
        if engine is not None and engine.alive:
            await in_thread(engine.drop_streams)
            if engine.alive:
                engine.flush()

    async def close(self) -> None:
        """Close the page connections and the link.  Idempotent."""
        try:
            await self.drop_streams()
        finally:
            if self._link is not None:
                await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
