"""One connection of a migration to the other agent, from its first byte to its end.

A migration outlives its connections: after COMMIT one is followed by another.  A failed connection is closed and never used
again; whatever reports a failure reports it to the connection that it belongs to.
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
    """Its control link, and the page connections that the migration's engine has meanwhile.

        async with connection:
            async with connection.alive:
                ...                      # ends when the connection fails
            ...                          # the link may still carry last words

    Leaving the outer block closes all of it, and its session is where a lost connection leaves it.
    """

    def __init__(self, migration: Migration, link: ControlLink | None = None) -> None:
        self.alive = Scope()
        self._migration = migration
        self._link = link
        if link is not None:
            self.attach(link)

    def attach(self, link: ControlLink) -> None:
        """Go on over this link."""
        self._link = link
        link.ended.add_done_callback(self._ended)

    def _ended(self, ended: asyncio.Future[MigratedError]) -> None:
        if not ended.cancelled():
            self.alive.fail(ended.result())

    @property
    def link(self) -> ControlLink:
        """The control link.  ConnectionLostError where it has not been dialled."""
        if self._link is None:
            raise ConnectionLostError("there is no connection")
        return self._link

    @property
    def speaking(self) -> bool:
        """Whether something can still be said, although the session may be over."""
        return self._link is not None and self._link.broken is None

    async def reason_for(self, error: BaseException) -> BaseException:
        """Why it ended with ``error``: the peer's own words, where it has said some."""
        return error if self._link is None else await self._link.reason_for(error)

    async def drop_streams(self) -> None:
        """End the page connections; the engine can take others.  What it had to report of them is delivered."""
        engine = self._migration.engine
        if engine is not None and engine.alive:
            await in_thread(engine.drop_streams)
            if engine.alive:
                engine.flush()

    async def close(self) -> None:
        """End all of it.  Idempotent."""
        try:
            await self.drop_streams()
        finally:
            if self._link is not None:
                await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
