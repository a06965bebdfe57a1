"""A migration's connection to the other agent: the control link, the guest state inside it, and the page connections.

A migration outlives its connections: after COMMIT one is followed by another, over the same session.  Here is what both
sides do with each of them; who dials and who waits is in ``source/`` and ``target/``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from migrated.errors import ConnectionLostError, MigratedError
from migrated.link.control_link import ControlLink, StatePipe
from migrated.memory.engine import SourceEngine, TargetEngine
from migrated.waiting import in_thread

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.protocol.session import Session

E = TypeVar("E", SourceEngine, TargetEngine)


class Connection(Generic[E]):
    """Of one migration, now.  ``link`` is None until there is one; ``engine``, whose the page connections are, likewise."""

    def __init__(self, migration: Migration, session: Session) -> None:
        self.session = session
        self.pipe = StatePipe()
        self.link: ControlLink | None = None
        self.engine: E | None = None
        self._migration = migration

    def require_link(self) -> ControlLink:
        """The control link, which has been there at least once."""
        if self.link is None:
            raise ConnectionLostError("there is no connection")
        return self.link

    def require_engine(self) -> E:
        """The engine, where the flow has made one."""
        if self.engine is None:
            raise MigratedError("no engine yet: this is a bug")
        return self.engine

    def begin(self, link: ControlLink) -> None:
        """Start this control link and go on over it: guest state travels on it, its end is a failure of the migration."""
        self.link = link
        self.pipe.attach(link)
        link.start()
        self.watch(link)

    def watch(self, link: ControlLink) -> None:
        """Report the end of ``link``, unless another one has taken its place by then."""
        self._migration.background(self._watch(link))

    async def _watch(self, link: ControlLink) -> None:
        error = await link.wait_lost()
        if link is self.link:
            self._migration.failure.set(error)

    async def drop_streams(self) -> None:
        """End the page connections; the engine can take others.  What it had to report of them is delivered."""
        if self.engine is not None and self.engine.alive:
            await in_thread(self.engine.drop_streams)
            if self.engine.alive:
                self.engine.flush()

    async def close_link(self) -> None:
        """End the control link alone.  It is ours no more, so its watcher does not report the end we made."""
        link, self.link = self.link, None
        if link is not None:
            await link.close()

    async def close_engine(self) -> None:
        """End its threads and the page connections with them; for good."""
        if self.engine is not None:
            await self.engine.close()

    async def disconnect(self) -> None:
        """Let go of all of it; the session is where a lost connection leaves it.  Idempotent."""
        await self.drop_streams()
        await self.close_link()
        self.session.connection_lost()
