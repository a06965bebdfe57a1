"""An agent without guests, behind the real daemon, HTTP and command line.  ``python fake_agent.py CONFIG ROLE`` serves it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from migrated import config, daemon
from migrated.agent.evacuation import Evacuation, EvacuationState, Move, MoveState, Target
from migrated.agent.history import Kept
from migrated.agent.host_agent import HostAgent
from migrated.agent.record import ErrorInfo, Faults, FaultSeconds, Record, State, StateChange
from migrated.agent.requests import EvacuateRequest, GuestList, GuestReport, Health, SetRequest, StartRequest
from migrated.errors import ConflictError, GuestRefusedError, NotFoundError
from migrated.memory.page_map import PageMap

GUEST = "vm1"


def evacuation_of(name: str, request: EvacuateRequest) -> Evacuation:
    """An evacuation with this id that has just begun."""
    refused = ErrorInfo(code="job-running", message="guest other has a job at work: backup", hint="wait for it")
    first, last = str(request.to[0]), str(request.to[-1])
    return Evacuation(
        id=name,
        state=EvacuationState.PLANNED if request.dry_run else EvacuationState.RUNNING,
        order=request.order,
        parallel=request.parallel,
        parallel_per_target=request.parallel_per_target,
        max_attempts=request.attempts,
        patience_seconds=request.patience,
        targets=[
            Target(address=str(to), memory_bytes=4 << 30, pools={1 << 21: 512}, max_migrations=8) for to in request.to
        ],
        guests=[
            Move(guest=GUEST, driver="qemu", memory_bytes=1 << 30, target=last, page_size=1 << 21),
            Move(guest="small", driver="process", memory_bytes=1 << 20, target=first, page_size=4096),
            Move(guest="other", driver="libvirt", state=MoveState.INELIGIBLE, error=refused),
        ],
    )


class FakeAgent(HostAgent[Any]):
    """Keeps records; a verb moves them from state to state.  Nothing happens by itself."""

    def __init__(self, role: str = "source") -> None:  # nothing of the base: it has no guests and no state directory
        self.role = role
        self.refused: collections.Counter[str] = collections.Counter()
        self.all: list[Record] = []
        self.requested: list[StartRequest] = []
        self.kept: dict[str, Kept] = {}
        self.sets: list[SetRequest] = []
        self.sick: list[str] = []
        self.started = asyncio.Event()
        self.failure: BaseException | None = None
        self._changed = asyncio.Condition()
        self.evacuated: list[Evacuation] = []

    def guests(self) -> list[str]:
        return [GUEST, "other"]

    async def survey(self) -> GuestList:
        if self.role == "target":
            raise ConflictError("a target does not know", hint="ask the source")
        refused = ErrorInfo(code="job-running", message="guest other has a job at work: backup", hint="wait for it")
        return GuestList(
            guests=[
                GuestReport(name=GUEST, driver="qemu", state="running", memory_bytes=1 << 30, migratable=True),
                GuestReport(name="other", driver="libvirt", state="paused", memory_bytes=1 << 31, error=refused),
            ],
            problems=[ErrorInfo(code="libvirt-missing", message="no [libvirt] binding\x1b[31m", hint="install it")],
        )

    def records(self, *, ended: bool = True) -> list[Record]:
        return [record for record in self.all if ended or not record.ended]

    def record(self, migration_id: str) -> Record:
        matches = [one for one in self.all if one.id.startswith(migration_id) or one.guest == migration_id]
        if not matches:
            raise NotFoundError(f"no migration {migration_id!r}", hint="`migrated list` shows them")
        return matches[-1]

    async def history(self, migration_id: str) -> Kept:
        record = self.record(migration_id)
        return self.kept.setdefault(record.id, Kept())

    async def page_map(self, migration_id: str) -> PageMap | None:
        return (await self.history(migration_id)).page_map

    async def start(self, request: StartRequest, *, traceparent: str = "") -> Record:
        del traceparent
        if self.role == "target":
            raise ConflictError("a target starts no migrations", hint="ask the source")
        self.requested.append(request)
        if request.guest == "refused":
            raise GuestRefusedError("guest refused: memory is not shared", hint="start QEMU with share=on")
        if request.guest not in self.guests():
            raise NotFoundError(f"no guest {request.guest!r}", hint=f"guests: {', '.join(self.guests())}")
        if any(one.guest == request.guest and not one.ended for one in self.all):
            raise ConflictError(f"{request.guest} is migrating", state="precopy")
        record = Record(
            id=f"{len(self.all):012x}",
            guest=request.guest,
            role=self.role,
            mode=request.mode,
            peer=str(request.to),
            driver="process",
            page_size=1 << 21,
            total_bytes=1 << 30,
            remaining_bytes=1 << 29,
            throughput_bytes_per_second=1e9,
            timeline=[StateChange(State.SETUP, time.time())],
        )
        self.all.append(record)
        await self.move(record, State.PRECOPY)
        return record

    async def move(self, record: Record, state: State) -> Record:
        record.state = state
        record.timeline.append(StateChange(state, time.time()))
        if record.ended:
            record.ended_at = time.time()
        await self.tell()
        return record

    async def tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def abort(self, migration_id: str) -> Record:
        record = self.record(migration_id)
        if record.state not in (State.SETUP, State.PRECOPY):
            hint = "`migrated resume` or `migrated abandon`"
            raise ConflictError("the guest has moved", state=record.state.value, hint=hint)
        return await self.move(record, State.ABORTED)

    async def switchover(self, migration_id: str) -> Record:
        record = self.record(migration_id)
        if record.state is not State.PRECOPY:
            raise ConflictError("not in pre-copy", state=record.state.value)
        await self.move(record, State.SWITCHOVER)
        record.downtime_seconds = 0.0123
        record.stale_pages = 7
        return await self.move(record, State.POSTCOPY)

    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        record = self.record(migration_id)
        if record.state not in (State.POSTCOPY, State.POSTCOPY_PAUSED):
            raise ConflictError("nothing to resume", state=record.state.value)
        record.peer = to or record.peer
        record.faults = Faults(current=5, stale=2, missing=1)
        record.fault_seconds = FaultSeconds(
            p50=1e-4, p99=2e-3, max=3e-3, histogram_log2_us=[0] * 6 + [7, 0, 0, 0, 0, 1]
        )
        record.faults_by_kind_us = {"current": [0] * 6 + [5], "stale": [0] * 11 + [2], "missing": [0] * 31 + [1]}
        record.fault_sum_seconds = {"current": 5e-4, "stale": 4e-3, "missing": 3.0}
        record.bytes_by_kind = {"payload": 1000, "zero": 24}
        record.transferred_bytes = 1000
        record.remaining_bytes = 0
        return await self.move(record, State.COMPLETED)

    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        record = self.record(migration_id)
        if confirm != record.guest:
            raise ConflictError("not confirmed", state=record.state.value)
        return await self.move(record, State.FAILED)

    async def force_run(self, migration_id: str, *, confirm: str) -> Record:
        return await self.abandon(migration_id, confirm=confirm)

    async def discard(self, migration_id: str, *, confirm: str) -> Record:
        return await self.abandon(migration_id, confirm=confirm)

    async def set(self, migration_id: str, request: SetRequest) -> Record:
        record = self.record(migration_id)
        self.sets.append(request)
        record.max_bandwidth_bytes_per_second = request.max_bandwidth
        await self.tell()
        return record

    async def evacuate(self, request: EvacuateRequest) -> Evacuation:
        if self.role == "target":
            return await super().evacuate(request)
        evacuation = evacuation_of(f"{len(self.evacuated):016x}", request)
        if not request.dry_run:
            self.evacuated.append(evacuation)
        return evacuation

    def evacuations(self) -> list[Evacuation]:
        return self.evacuated

    async def abort_evacuation(self, evacuation_id: str) -> Evacuation:
        for evacuation in self.evacuated:
            if evacuation.id == evacuation_id:
                evacuation.state = EvacuationState.ABORTING
                return evacuation
        return await super().abort_evacuation(evacuation_id)

    async def events(self, migration_id: str) -> AsyncIterator[Record]:
        record = self.record(migration_id)
        told = len(record.timeline)
        yield record
        while not record.ended:
            async with self._changed:
                while len(record.timeline) == told:
                    await self._changed.wait()
            told = len(record.timeline)
            yield record

    def health(self) -> Health:
        return Health(healthy=not self.sick, ready=self.started.is_set() and not self.sick, reasons=self.sick)

    async def run(self, stop: asyncio.Event) -> None:
        self.started.set()
        await stop.wait()
        if self.failure is not None:
            raise self.failure
        for record in self.records(ended=False):
            await self.move(record, State.ABORTED)


def main() -> int:
    """The real daemon around it."""
    path = Path(sys.argv[1])
    role: config.Role = "source" if sys.argv[2] == "source" else "target"
    agent = FakeAgent(role)
    daemon.build_agent = lambda _settings: agent  # type: ignore[assignment]
    with contextlib.suppress(KeyboardInterrupt):
        return daemon.run(role, str(path), log_format="json")
    return 1


if __name__ == "__main__":
    sys.exit(main())
