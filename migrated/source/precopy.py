"""Pre-copy sends memory in rounds while the guest runs, until the policy ends it.

Each round sends the marked blocks; the scan after it marks what was written meanwhile.  Direct I/O (pinned buffers) can
write without the tracker noticing.  If the guest uses it, tracking is armed and one final scan is made with the guest
quiesced, and everything reported in between is compared again.  Without direct I/O every scan counts as quiesced.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from migrated.errors import MigratedError, PeerError
from migrated.protocol.messages import BarrierAck, Populated, Round
from migrated.source.convergence import Convergence, RoundResult, Verdict
from migrated.waiting import in_thread

if TYPE_CHECKING:
    from migrated.agent.rates import Rates
    from migrated.agent.record import Record
    from migrated.agent.tracing import Trace
    from migrated.guests.driver import SourceGuest
    from migrated.link.control_link import ControlLink
    from migrated.memory.engine import SourceEngine
    from migrated.memory.tracker import Tracker
    from migrated.source.options import Options

#: Marked blocks to compare before deciding on the next round: gives the changed part within 3 % of the whole.
SAMPLE_BLOCKS = 1024
#: A scan of so many pages, and marks and hashes of so much memory, take less than a millisecond.
SMALL_PAGES, SMALL_BYTES = 1 << 17, 8 << 30

T = TypeVar("T")


@dataclasses.dataclass(kw_only=True)
class PreCopy:
    """The pre-copy of one migration.

    ``rounds_done`` yields the number of each finished round; setting ``switch_now`` ends pre-copy.
    """

    engine: SourceEngine
    tracker: Tracker
    guest: SourceGuest
    link: ControlLink
    options: Options
    record: Record
    rates: Rates
    rounds_done: asyncio.Queue[int]
    switch_now: asyncio.Event
    barrier_seconds: float
    trace: Trace
    log: Any
    _barriers: int = 0

    async def arm(self) -> None:
        """Start dirty tracking."""
        quiesced = self.guest.needs_quiesced_scans
        async with self._quiesced() if quiesced else contextlib.nullcontext():
            await in_thread(self.tracker.arm)
        self.log.info("tracking writes", quiesced=quiesced)

    async def run(self) -> bool:
        """Run the rounds; return True to send the rest while the guest is paused, False to do so after the switchover.

        Raises MigratedError ``not-converging`` in mode precopy.
        """
        await in_thread(self.engine.mark_populated, self.tracker)
        for region, first_page, bits in self.engine.marked_maps():
            await self.link.send(Populated(region, first_page, bits))
        policy = Convergence(
            self.options.mode,
            downtime_limit_seconds=self.options.downtime_limit_seconds,
            max_rounds=self.options.max_rounds,
        )
        settled = not self.guest.needs_quiesced_scans
        verdict = Verdict.ROUND
        number = 0
        while verdict is Verdict.ROUND:
            number += 1
            result = await self.round(number)
            verdict = self._judge(policy, result)
            if verdict is Verdict.ROUND:
                continue
            if not settled:
                settled = True
                async with self._quiesced():
                    await self.scan(quiesced=True)
                self.log.info("quiesced scan", rounds=number)
                verdict = Verdict.ROUND
                continue
            await self.barrier()
            if verdict is Verdict.FINISH:  # the guest has gone on writing: what is marked by now must fit, too
                verdict = self._judge(policy, await self._later(result))
        self.log.info("pre-copy finished", rounds=number, verdict=verdict.value)
        return verdict is Verdict.FINISH

    def _judge(self, policy: Convergence, result: RoundResult) -> Verdict:
        policy.downtime_limit_seconds = self.options.downtime_limit_seconds  # `set` may have changed both
        policy.max_rounds = self.options.max_rounds
        verdict = policy.after(result)
        if self.switch_now.is_set() and verdict in (Verdict.ROUND, Verdict.GIVE_UP):
            return Verdict.FINISH if self.options.mode == "precopy" else Verdict.POSTCOPY
        if verdict is Verdict.GIVE_UP:
            raise MigratedError(
                f"{self.record.guest} writes faster than it can be sent: after {result.number} rounds "
                f"{result.changed_bytes >> 20} MiB are left, "
                f"about {policy.next_seconds(result) * 1000:.0f} ms of downtime",
                code="not-converging",
                hint="use mode hybrid, or raise --downtime-limit, --max-rounds or --max-bandwidth; "
                "or end pre-copy yourself with `migrated switchover`",
            )
        return verdict

    async def round(self, number: int) -> RoundResult:
        """Send what is marked, scan for what was written meanwhile, and compare a sample of that."""
        before = self.engine.stats()
        marked = before.dirty_bytes
        self.record.round = number
        await self.link.send(Round(number, marked))
        started = time.monotonic()
        await self.send_marked(number)
        seconds = time.monotonic() - started
        sent = self.engine.stats().wire_bytes - before.wire_bytes
        written, left, changed = await self._look()
        self.log.info(
            "round",
            number=number,
            dirty_bytes=marked,
            sent=sent,
            seconds=round(seconds, 4),
            written=written,
            changed=changed,
        )
        self.trace.round(started, number=number, examined_bytes=marked, sent_bytes=sent, changed_bytes=changed)
        return RoundResult(
            number, seconds, examined_bytes=marked, sent_bytes=sent, marked_bytes=left, changed_bytes=changed
        )

    async def _look(self) -> tuple[int, int, int]:
        """Scan, and compare a sample; return the bytes that were written, that are marked, and that have changed.

        One thread does both: until the next round begins, the guest goes on writing.
        """

        def scan_and_sample() -> tuple[int, float]:
            written = self.engine.scan(self.tracker, quiesced=not self.guest.needs_quiesced_scans)
            return written, self.engine.sample(SAMPLE_BLOCKS)

        written, share = await in_thread(scan_and_sample)
        self.rates.dirty(written, time.monotonic())
        left = self.engine.stats().dirty_bytes
        return written, left, int(left * share)

    async def _later(self, result: RoundResult) -> RoundResult:
        """Return the result of the last round with what is marked by now."""
        _, left, changed = await self._look()
        return dataclasses.replace(result, marked_bytes=left, changed_bytes=changed)

    async def send_marked(self, number: int) -> None:
        """Run one round of the engine."""
        self.engine.start_round(number)
        while await self.rounds_done.get() != number:
            pass

    async def scan(self, *, quiesced: bool) -> int:
        """Mark what was written; return how many bytes of pages the kernel reported."""
        return await in_thread(functools.partial(self.engine.scan, self.tracker, quiesced=quiesced))

    async def scan_last(self, *, everything: bool, freeze: bool) -> int:
        """Mark what was written until the guest was paused; with ``freeze`` also freeze, and return the stale pages.

        ``everything``: mark all that is populated, since nothing was sent.
        """

        def scan() -> int:
            if everything:
                self.engine.mark_populated(self.tracker)
            self.engine.scan_last(self.tracker)
            return self.engine.freeze() if freeze else 0

        return await self._while_paused(scan)

    async def require_unwritten(self) -> None:
        """Raise GuestError if the paused guest's memory was written after `scan_last`."""
        await self._while_paused(lambda: self.engine.require_unwritten(self.tracker))

    async def _while_paused(self, work: Callable[[], T]) -> T:
        """Run ``work``, in a thread unless it takes no longer than the hand-over to one and back."""
        small = self.tracker.page_count <= SMALL_PAGES and self.record.total_bytes <= SMALL_BYTES
        return work() if small else await in_thread(work)

    async def barrier(self) -> None:
        """Wait until everything sent so far is in the target's memory."""
        self._barriers += 1
        self.engine.barrier(self._barriers)
        ack = await self.link.expect(
            BarrierAck, limit_seconds=self.barrier_seconds, what="the barrier to be acknowledged"
        )
        if ack.barrier != self._barriers:
            raise PeerError(f"barrier {self._barriers} was answered with {ack.barrier}", code="protocol-remote")

    @contextlib.asynccontextmanager
    async def _quiesced(self) -> AsyncIterator[None]:
        await self.guest.quiesce()
        try:
            yield
        finally:
            await self.guest.unquiesce()
