"""The source's connection to the target agent: it dials, before COMMIT once, after it as often as it takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from migrated.agent.connection import Connection
from migrated.errors import MigratedError
from migrated.memory.engine import URGENT, SourceEngine
from migrated.protocol.messages import PROTOCOL_VERSION, Resume

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.link.control_link import ControlLink
    from migrated.link.dialing import Dialer
    from migrated.protocol.session import Session


class TargetConnection(Connection[SourceEngine]):
    """See `Connection`.  ``dialer`` knows where to; the address may change between two connections."""

    def __init__(self, migration: Migration, session: Session, dialer: Dialer, *, bulk_streams: int) -> None:
        super().__init__(migration, session)
        self.dialer = dialer
        self._bulk_streams = bulk_streams

    async def dial(self) -> ControlLink:
        """A new control link, not started yet.  ConnectionLostError, TimeoutExceededError."""
        self.link = await self.dialer.control(self.session)
        return self.link

    def resume(self, *, committed: bool) -> Resume:
        """What a reconnect opens with; ``committed``: whether COMMIT was sent, or may have been."""
        hello = self.session.hello
        if hello is None:
            raise MigratedError("no session to resume yet: this is a bug")
        return Resume(PROTOCOL_VERSION, hello.session, hello.token, committed=committed)

    async def open_streams(self) -> None:
        """Page connections for the engine: all or none."""
        engine = self.require_engine()
        bulk, urgent = await self.dialer.pages(self._bulk_streams)
        waiting = [(URGENT, urgent), *reversed(list(enumerate(bulk)))]
        try:
            while waiting:
                engine.add_stream(*waiting.pop())  # takes the descriptor, whatever comes of it
        finally:
            for _, fd in waiting:
                os.close(fd)
