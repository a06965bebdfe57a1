"""Before COMMIT: the guest runs on here as if nothing had been, and the target is made to let go of it.

The order is what keeps the guest in one place: the session rules out COMMIT, then the journal does, then the guest runs
on, and last the target is heard.  A target that had loaded the guest and cannot be asked waits for our word, for as long
as it takes: so we keep trying to give it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from migrated.agent.migration import quietly
from migrated.errors import GuestError, MigratedError, named
from migrated.guests.access.pidfd import process_lives
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import Aborted
from migrated.waiting import within

if TYPE_CHECKING:
    from migrated.agent.migration import Migration
    from migrated.config import Timeouts
    from migrated.guests.driver import Memento, SourceGuest
    from migrated.link.control_link import ControlLink
    from migrated.recovery.journal import SourceEntry
    from migrated.recovery.state import Survival
    from migrated.source.connection import TargetConnection
    from migrated.source.stage import JournalledStage
    from migrated.source.tracking import Tracking


#: A process that is dying closes its connections first, and is there until its memory is freed.
DYING_SECONDS = 1.0


async def _ends(entry: SourceEntry) -> bool:
    """Whether the guest's process has ended, or does so within `DYING_SECONDS`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DYING_SECONDS):
            while process_lives(entry.pid, entry.pid_started):  # noqa: ASYNC110 - it need not be a child of ours
                await asyncio.sleep(0.02)
    return not process_lives(entry.pid, entry.pid_started)


class Rollback:
    """Of one migration; `run`, or in a restarted agent `after_restart`, at most once."""

    def __init__(
        self,
        migration: Migration,
        connection: TargetConnection,
        guest: SourceGuest,
        *,
        tracking: Tracking,
        stage: JournalledStage,
        survival: Survival[SourceEntry],
        timeouts: Timeouts,
    ) -> None:
        self._migration = migration
        self._log = migration.log
        self._connection = connection
        self._session = connection.session
        self._guest = guest
        self._tracking = tracking
        self._stage = stage
        self._survival = survival
        self._timeouts = timeouts
        self._stuck = False  # the guest is here and does not run on: the next agent must find it

    async def run(self, error: BaseException) -> None:
        """The guest runs on here, untracked; the target is told; nothing of ours stays."""
        link = self._connection.link
        self._log.warning("giving up", error=str(error))
        # First of all the session must rule out COMMIT: then the guest may run here.
        if link is None or link.broken is not None:
            self._session.connection_lost()
        elif self._session.abort_allowed:
            with contextlib.suppress(MigratedError):
                link.post(abort_of(named(error)))  # a guest that stands still does not wait for a slow network
        await self._withdraw_commit()
        problem = await self._run_on(self._guest.resume()) if self._tracking.tracker is not None else None
        if self._stuck:
            await self._write_again()
        if link is not None:
            error = await link.explained(error)
        error = self._outcome(error, problem)
        await self._connection.drop_streams()
        await self._tracking.stop()
        told = link is not None and link.broken is None and await self._confirmed(link)
        await self._connection.disconnect()
        if told or not self._session.must_reconnect:
            await self._survival_over()
        self._migration.end_before_commit(error)
        if not told and self._session.must_reconnect:
            await self._settle(error)

    async def _write_again(self) -> None:
        """A next agent must find the guest that does not run, and the target that was not told."""
        if self._stage.struck:
            await quietly(self._stage.write("active"), self._log, "write the journal")

    async def _withdraw_commit(self) -> None:
        """Until no journal says COMMIT the guest must stay paused: an agent that believed it would have it run there too."""
        pause = self._timeouts.reconnect_interval
        while not await self._stage.withdraw_commit():
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._timeouts.reconnect_interval_limit)

    async def after_restart(self, memento: Memento, error: BaseException, *, superseded: bool = False) -> None:
        """The agent before us died before COMMIT: likewise."""
        entry = self._stage.entry
        if entry is not None and not process_lives(entry.pid, entry.pid_started):
            error = GuestError("the source agent was restarted before COMMIT; the guest has ended", code="guest-died")
        elif superseded:  # only the target of this one is still to be told
            error = MigratedError(
                "the source agent was restarted before COMMIT; a later migration has the guest", code="agent-restarted"
            )
        else:
            error = self._outcome(error, await self._run_on(self._guest.reclaim(memento)))
        self._migration.end_before_commit(error)
        await self._settle(error)

    async def _run_on(self, work: Coroutine[Any, Any, None]) -> Exception | None:
        """Have the guest run here; why it does not, although it is there."""
        try:
            await work
        except Exception as problem:  # noqa: BLE001 - the rest is undone all the same
            self._log.error("the guest does not run on here", error=str(problem))
            entry = self._stage.entry
            if entry is None or await _ends(entry):
                return None  # its end is no news, or is told by who watches it
            self._stuck = True
            return problem
        return None

    @staticmethod
    def _outcome(error: BaseException, problem: Exception | None) -> BaseException:
        """The error to end with: ``error``, or that the guest does not run."""
        if problem is None:
            return error
        why = named(problem)
        return GuestError(
            f"{named(error).message}; and the guest does not run on here: {why.message}",
            code="guest-not-resumed",
            hint=why.hint
            if why.code == "guest-not-resumed" and why.hint
            else "it is here and may be paused: start the source agent again, which tries again, or let it run by hand",
        )

    async def _survival_over(self) -> None:
        if self._stuck:
            await self._survival.let_go()
        else:
            await self._survival.over()

    async def _confirmed(self, link: ControlLink) -> bool:
        """Whether the target says that nothing of the guest is left there."""
        try:
            async with within(self._timeouts.abort, "the target to clean up"):
                while not isinstance(await link.receive(after_abort=True), Aborted):
                    pass
        except Exception as problem:  # noqa: BLE001 - then it is settled later
            self._log.warning("the target did not confirm the abort", error=str(problem))
            return False
        return True

    async def _settle(self, error: BaseException) -> None:
        """The target may hold a loaded guest that waits for our word: keep trying to say that it is over."""
        pause = self._timeouts.reconnect_interval
        while self._session.must_reconnect:
            await self._write_again()
            try:
                link = await self._connection.dial()
                self._session.reconnected()
                link.start()
                await link.send(self._connection.resume(committed=False))
                await link.send(abort_of(named(error)))
                if await self._confirmed(link):
                    self._log.info("settled: nothing is left on the target")
            except Exception as problem:  # noqa: BLE001 - tried again
                self._log.info("cannot settle yet", error=str(problem), next_try_seconds=pause)
            await self._connection.disconnect()
            if self._session.must_reconnect:
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._timeouts.reconnect_interval_limit)
        await self._survival_over()
