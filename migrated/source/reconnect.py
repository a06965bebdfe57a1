"""After COMMIT the connection was lost: the guest waits on the target, and we dial until the same session goes on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from migrated.agent.record import State
from migrated.errors import MigratedError, PeerError, TimeoutExceededError
from migrated.protocol.messages import GUEST_LOST, Commit, Lacking, LackingEnd, Resumed
from migrated.protocol.transitions import State as SessionState
from migrated.waiting import within

if TYPE_CHECKING:
    from migrated.address import Address
    from migrated.agent.migration import Migration
    from migrated.config import Timeouts
    from migrated.source.connection import TargetConnection


class Reconnect:
    """Of one migration; `run` each time its connection is lost."""

    def __init__(self, migration: Migration, connection: TargetConnection, timeouts: Timeouts) -> None:
        self._migration = migration
        self._connection = connection
        self._timeouts = timeouts
        self._now = asyncio.Event()

    def now(self, address: Address | None = None) -> None:
        """Do not wait for the next try; from now on dial ``address``, if given."""
        if address is not None:
            self._connection.dialer.address = address
        self._now.set()

    async def run(self) -> Resumed | None:
        """Dial until the session goes on; what the target said, and None where nothing is left to be said.

        Raises MigratedError ``target-lost-guest`` when the target of this session says that the guest is lost, and
        TimeoutExceededError at the operator's limit (there is none by default).  Any other refusal may come from a wrong
        address: it is said, and we go on asking.
        """
        migration, connection = self._migration, self._connection
        pause = self._timeouts.reconnect_interval
        started = time.monotonic()
        while True:
            self._now.clear()  # before the try: who asks while it is under way means the next one
            await connection.disconnect()
            migration.failure.clear()
            if connection.session.state is SessionState.CLOSED:
                return None  # Done was read while the connection was let go of
            try:
                resumed = await self._resume_session()
            except Exception as error:
                if isinstance(error, PeerError) and error.code == GUEST_LOST:
                    raise MigratedError(
                        f"the target refuses to go on: {error.message}",
                        code="target-lost-guest",
                        hint="COMMIT may have been obeyed: make sure the guest runs nowhere else, then "
                        f"`migrated force-run {migration.id}` runs it here, `migrated discard {migration.id}` gives it up",
                    ) from error
                migration.log.info("reconnect failed", error=str(error), next_try_seconds=pause)
                if migration.record.state is State.RECOVERING:
                    migration.set_state(State.POSTCOPY_PAUSED, self._refused(error))
                limit = self._timeouts.reconnect
                if limit and time.monotonic() - started > limit:
                    raise TimeoutExceededError(
                        f"{connection.dialer.address} could not be reached for {limit:g} s; the guest waits there",
                        hint="once it can be reached again, start the source agent anew: it goes on with what is kept; "
                        "timeouts.reconnect = 0 never gives up",
                    ) from error
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._now.wait()
                pause = min(2 * pause, self._timeouts.reconnect_interval_limit)
            else:
                migration.record.error = None
                return resumed

    def _refused(self, error: Exception) -> Exception:
        """What the record says of a failed try."""
        if not isinstance(error, PeerError):
            return error
        where = self._connection.dialer.address
        return MigratedError(
            f"{where} refuses to go on: {error.message}",
            code="target-refuses",
            hint=f"is {where} where the guest is?  `migrated resume {self._migration.id} --to HOST:PORT` asks elsewhere; if it "
            f"is nowhere: `migrated force-run {self._migration.id}` runs it here, `migrated discard {self._migration.id}` gives it up",
        )

    async def _resume_session(self) -> Resumed:
        """Dial once; hear where the target stands and what it lacks, and serve that."""
        connection = self._connection
        link = await connection.dial()
        self._migration.set_state(State.RECOVERING)
        connection.session.reconnected()
        connection.begin(link)
        await link.send(connection.resume(committed=True))
        limit = self._timeouts.switchover
        resumed = await link.expect(Resumed, limit_seconds=limit, what="the target to say where it stands")
        engine = connection.require_engine()
        engine.lacking_begin()
        lacking = resumed.lacking_pages > 0
        while True:
            async with within(limit, "the map of lacking pages"):
                message = await link.receive()
            if isinstance(message, LackingEnd):
                break
            if not isinstance(message, Lacking):
                raise PeerError(f"{type(message).__name__} among the lacking pages", code="protocol-remote")
            engine.lacking(message.region, message.first_page, message.bits)
            lacking = True
        record = self._migration.record
        record.stale_pages, record.stale_bytes = resumed.lacking_pages, engine.stats().stale_bytes_left
        if lacking:  # a target that has everything may have closed its side: it only wants to say Done
            await connection.open_streams()
            engine.serve(drain=True)
        if resumed.state == "loaded":
            await link.send(Commit())
        self._migration.log.info("reconnected", target=resumed.state, lacking_pages=resumed.lacking_pages)
        return resumed
