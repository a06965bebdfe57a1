"""The target's connection to the source agent, which dials: the control link it came with, or comes back with."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from migrated.agent.connection import Connection
from migrated.errors import ConnectionLostError, MigratedError, RemoteProtocolError
from migrated.memory.engine import URGENT, TargetEngine
from migrated.waiting import within

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.link.control_link import ControlLink
    from migrated.protocol.session import Session

#: How long a page connection may wait for the engine it belongs to.
STREAM_WAIT_SECONDS = 10.0


class SourceConnection(Connection[TargetEngine]):
    """See `Connection`.

    ``first``: the control link that brought the Hello, being read already; call `watch` when the flow begins.  None in a
    restarted agent, which waits for the source to dial.
    """

    def __init__(self, migration: Migration, session: Session, first: ControlLink | None, *, bulk_streams: int) -> None:
        super().__init__(migration, session)
        self.link = first
        if first is not None:
            self.pipe.attach(first)
        self.streams_wanted = asyncio.Event()  # set when the engine is ready for page connections
        self._bulk_streams = bulk_streams

    async def add_stream(self, stream: int, fd: int) -> None:
        """A page connection that showed our token; the descriptor is ours now."""
        try:
            async with within(STREAM_WAIT_SECONDS, "memory for a page connection"):
                await self.streams_wanted.wait()
            if stream != URGENT and stream >= self._bulk_streams:
                raise RemoteProtocolError(f"page connection {stream} of {self._bulk_streams}")
            engine = self.require_engine()
            if not engine.alive:
                raise ConnectionLostError("a page connection came when the migration was over")
        except MigratedError:
            os.close(fd)
            raise
        engine.add_stream(stream, fd)
