"""The connection was lost and the guest must not be: it waits here, paused or for its pages, until the source dials again.

The source alone dials; it opens with Resume, and is told where we stand and which pages are lacking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from migrated.agent.record import State
from migrated.errors import MigratedError
from migrated.protocol.messages import GUEST_LOST, Abort, Aborted, Done, Lacking, LackingEnd, Released, Resume, Resumed
from migrated.waiting import end, within

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.config import Timeouts
    from migrated.link.control_link import ControlLink
    from migrated.target.connection import SourceConnection


class Reconnect:
    """Of one migration, for all its life: a source may dial before we know that the old connection is lost."""

    def __init__(self, migration: Migration, connection: SourceConnection, timeouts: Timeouts) -> None:
        self._migration = migration
        self._connection = connection
        self._session = connection.session
        self._timeouts = timeouts
        self._dialled: asyncio.Queue[ControlLink] = asyncio.Queue()
        self._late = asyncio.Lock()
        self.all_in = False  # the guest needs its source no more
        self.lost: str = ""  # what became of the guest, where it has ended
        self.silent = False  # once it is over, say nothing: the source shall go on asking until the next agent is there

    def dialled(self, link: ControlLink) -> None:
        """The agent has a new control link for this session, not started, its first message a Resume."""
        self._dialled.put_nowait(link)
        self._migration.failure.set(MigratedError(f"{link.peer} dials again", code="reconnected"))

    # ------------------------------------------------------------ while the migration is under way

    async def once(self) -> None:
        """Wait for the source to dial; tell it where we stand and what is lacking.  Raises what the new link ends with."""
        await self._connection.disconnect()
        link = await self._dialled.get()
        while not self._dialled.empty():
            await link.close()
            link = self._dialled.get_nowait()
        self._migration.failure.clear()
        self._migration.set_state(State.RECOVERING)
        self._migration.record.peer = link.peer
        self._session.reconnected()
        self._connection.begin(link)
        limit = self._timeouts.handshake
        resume = await link.expect(Resume, limit_seconds=limit, what="the source to resume the session")
        if not resume.committed:
            return  # Abort follows
        await self._tell_standing(link)

    async def until_back(self) -> None:
        """`once`, as often as it takes."""
        while True:
            try:
                await self.once()
            except Exception as error:  # noqa: BLE001 - the next connection may do better
                self._migration.log.warning("reconnect failed", error=str(error))
                if self._migration.record.state is State.RECOVERING:
                    self._migration.set_state(State.POSTCOPY_PAUSED, error)
            else:
                return

    async def until_back_or(self, all_in: Coroutine[Any, Any, None]) -> bool:
        """Wait for the source; False when nobody is needed any more: the last page was in, or the rest was abandoned."""
        back = asyncio.ensure_future(self.until_back())
        enough = asyncio.ensure_future(all_in)
        try:
            await asyncio.wait({back, enough}, return_when=asyncio.FIRST_COMPLETED)
            if back.done():
                back.result()
            return back.done()
        finally:
            await asyncio.gather(end(back), end(enough))

    async def _tell_standing(self, link: ControlLink) -> None:
        """Answer Resume."""
        state = self._session.standing
        engine = self._connection.engine
        if engine is not None and not engine.alive:
            engine = None
        lacking = engine.stats().stale_pages if engine is not None else 0
        self._migration.log.info("the source is back", state=state, lacking_pages=lacking)
        await link.send(Resumed(state, lacking))
        if engine is not None:
            for region, first_page, bits in engine.lacking_maps():
                await link.send(Lacking(region, first_page, bits))
        await link.send(LackingEnd())

    # ------------------------------------------------------------ when it is over

    async def answer_late(self, link: ControlLink) -> bool:
        """A source that missed the end asks again: tell it how this ended.  Whether it has heard that all is in."""
        async with self._late:  # one session, one connection
            return await self._answer_late(link)

    async def _answer_late(self, link: ControlLink) -> bool:
        if self.silent and not self._connection.session.settled:
            await link.close()
            return False
        self._session.connection_lost()
        self._session.reconnected()
        link.start()
        try:
            limit = self._timeouts.handshake
            resume = await link.expect(Resume, limit_seconds=limit, what="the source to resume the session")
            # The last page may have come without a source to say Done to: then that is said now.
            if resume.committed and self.all_in and self._session.standing:
                await self._tell_standing(link)
                if self._session.may_send(Done()):
                    await link.send(Done())
                await link.expect(Released, limit_seconds=limit, what="the farewell")
                return True
            if self._session.may_send(Aborted()):
                await link.send(Aborted())
            elif not resume.committed:
                async with within(limit, "the source's Abort"):
                    await link.receive(after_abort=True)
                await link.send(Aborted())
            elif self.lost:
                await link.send(Abort(GUEST_LOST, self.lost))
            else:
                await link.send(Abort("unknown-session", "nothing of this guest is left here"))
        finally:
            await link.close()
            self._session.connection_lost()
        return False

    def waiting(self) -> ControlLink | None:
        """A source that dialled while we came to the end, when nobody waited for it any more."""
        return None if self._dialled.empty() else self._dialled.get_nowait()
