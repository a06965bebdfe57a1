"""One evacuation at work: it starts migrations, watches them, and starts others, until every guest has ended.

A guest is only ever migrated by `SourceAgent.start`, which refuses one that is being migrated or was handed over.  So the worst
that a mistake here can do is to leave a guest where it is.  What was decided is saved before it is done: the next agent goes on
with the same record.

Before COMMIT a failed migration leaves its guest here, and the guest waits for another attempt.  After COMMIT the guest belongs
to the target: its migration is waited for, however long that takes, and does not hold a slot while it cannot reach the target.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog

from migrated.address import parse_address
from migrated.agent.evacuation import Attempt, Evacuation, EvacuationState, Move, MoveState, Target
from migrated.agent.record import ErrorInfo, Record, State
from migrated.agent.requests import GuestList, SetRequest, StartRequest
from migrated.agent.table import MigrationTable
from migrated.config import AgentConfig
from migrated.errors import AbortedError, ConflictError, MigratedError, NotFoundError
from migrated.link.dialing import DialTerms
from migrated.memory.memfd import BASE_PAGE_BYTES
from migrated.options import DomainOptions
from migrated.protocol.messages import AskedGuest, Capacity
from migrated.source.inquiry import ask
from migrated.source.migration import SourceMigration
from migrated.source.placement import Load, Place, Room, plan
from migrated.waiting import cancel_and_wait

log = structlog.get_logger("migrated.source.evacuation")

#: Targets are asked again after this time while guests wait for them.
ASK_SECONDS: Final = 2.0
#: A target that did not answer is left alone for this time.
SILENCE_SECONDS: Final = 5.0
#: Pause before the second attempt at the same target; it doubles with each attempt.
RETRY_SECONDS: Final = 1.0

#: Not the fault of guest or target: these do not count as attempts.
_UNCOUNTED: Final = frozenset({"too-many", "agent-restarted", "starting"})
#: Nobody but the operator can do anything for the guest.
_FINAL: Final = frozenset({"guest-committed", "guest-not-resumed", "guest-died"})
#: The operator has decided about the guest.
_DECIDED: Final = frozenset({"forced", "discarded"})
#: Migrations that transfer nothing until their target can be reached again.
_STALLED: Final = frozenset({State.POSTCOPY_PAUSED.value, State.RECOVERING.value})


class Mover(Protocol):
    """What an evacuation needs of its agent."""

    config: AgentConfig

    @property
    def dial_terms(self) -> DialTerms:
        """See HostAgent."""

    async def survey(self) -> GuestList:
        """See HostAgent."""

    async def start(self, request: StartRequest) -> Record:
        """See HostAgent."""

    async def set(self, migration_id: str, request: SetRequest) -> Record:
        """See HostAgent."""


async def ask_all(
    targets: Sequence[Target], guests: Sequence[AskedGuest], terms: DialTerms
) -> dict[str, Capacity | MigratedError]:
    """Ask targets at the same time, and note in each what it has answered."""
    answers = await asyncio.gather(
        *(ask(parse_address(target.address), guests, terms) for target in targets), return_exceptions=True
    )
    found: dict[str, Capacity | MigratedError] = {}
    for target, answer in zip(targets, answers, strict=True):
        if isinstance(answer, Capacity):
            target.error, target.heard_at = None, time.time()
            target.memory_bytes, target.pools = answer.memory_bytes, {p.page_bytes: p.pages for p in answer.pools}
            target.migrations, target.max_migrations = answer.migrations, answer.max_migrations
            found[target.address] = answer
        elif isinstance(answer, MigratedError):
            target.error = ErrorInfo.of(answer)
            found[target.address] = answer
        else:
            raise answer
    return found


class EvacuationFlow:
    """Construct it and call `run` once; `abort` and `leave_out` may be called meanwhile."""

    def __init__(
        self,
        record: Evacuation,
        *,
        mover: Mover,
        migrations: MigrationTable[SourceMigration],
        save: Callable[[Evacuation], Awaitable[None]],
        taken_up: bool = False,
    ) -> None:
        """``save`` keeps the record for the next agent.  ``taken_up``: a previous agent began the evacuation."""
        self.record = record
        self._mover = mover
        self._migrations = migrations
        self._save = save
        self._taken_up = taken_up
        self._began = asyncio.get_running_loop().time()
        self._wake = asyncio.Event()
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._ask_at = 0.0
        self._silent_until: dict[str, float] = {}
        self._retry_at: dict[str, float] = {}
        self._without_target: dict[str, float] = {}  # since when a guest has no target that could take it
        self._left_out: set[str] = set()  # migrations that the operator has aborted

    async def run(self) -> None:
        """Work until every guest has ended."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._observe()
                await self._share_bandwidth()
                if not self.record.moves(MoveState.WAITING, MoveState.MIGRATING):
                    break
                if self._may_start and loop.time() >= self._ask_at:
                    await self._start_guests()
                else:
                    await self._pause()
        finally:
            for watcher in list(self._watchers.values()):
                await cancel_and_wait(watcher)
        done = all(move.state is MoveState.COMPLETED for move in self.record.eligible)
        aborting = self.record.state is EvacuationState.ABORTING
        self.record.state = (
            EvacuationState.COMPLETED if done else EvacuationState.ABORTED if aborting else EvacuationState.FAILED
        )
        self.record.ended_at = time.time()
        await self._save(self.record)
        log.info("evacuation over", evacuation=self.record.id, state=self.record.state.value)

    async def _pause(self) -> None:
        """Wait until a migration has changed, or until it is time to ask the targets again."""
        try:
            async with asyncio.timeout_at(self._ask_at if self._may_start else None):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    @property
    def _may_start(self) -> bool:
        return (
            self.record.state is EvacuationState.RUNNING
            and len(self._working()) < self.record.parallel
            and bool(self.record.moves(MoveState.WAITING))
        )

    def _working(self) -> list[Move]:
        """Guests whose migrations hold a slot."""
        return [move for move in self.record.moves(MoveState.MIGRATING) if move.phase not in _STALLED]

    # ------------------------------------------------------------ verbs

    async def abort(self) -> None:
        """Start nothing any more, and abort what can still be aborted.  Raises ConflictError."""
        if self.record.state is not EvacuationState.RUNNING:
            raise ConflictError(
                f"evacuation {self.record.id} is {self.record.state}: there is nothing to abort",
                state=self.record.state.value,
            )
        self.record.state = EvacuationState.ABORTING
        for move in self.record.moves(MoveState.WAITING):
            self._end(move, MoveState.ABORTED, _aborted())
        for move in self.record.moves(MoveState.MIGRATING):
            self._abort_migration(move.migration)
        self._wake.set()
        await self._save(self.record)

    def leave_out(self, migration_id: str) -> None:
        """Do not migrate the guest of a migration that the operator has aborted once more."""
        self._left_out.add(migration_id)

    def _abort_migration(self, migration_id: str) -> None:
        migration = self._migrations.known(migration_id)
        if migration is not None:
            try:
                migration.abort()
            except ConflictError as error:
                log.info("waiting for a migration after COMMIT", migration=migration_id, reason=error.message)

    # ------------------------------------------------------------ what has become of the migrations

    async def _observe(self) -> None:
        changed = False
        for move in self.record.moves(MoveState.WAITING, MoveState.MIGRATING):
            before = (move.state, move.migration, move.phase)
            self._find_migration(move)
            if move.state is MoveState.MIGRATING:
                self._follow(move)
            changed |= before != (move.state, move.migration, move.phase)
        if changed:
            await self._save(self.record)

    def _find_migration(self, move: Move) -> None:
        """Take over a migration that somebody else has started, or that a previous agent had no time to record."""
        if move.migration and move.state is MoveState.MIGRATING:
            return
        active = self._migrations.of_guest(move.guest)
        found = active.record if active is not None else None
        if found is None and move.state is MoveState.MIGRATING:
            found = self._record_of(move.guest)
            if found is not None and found.started_at < (move.started_at or 0.0):
                found = None
        if found is not None:
            move.state, move.migration, move.target = MoveState.MIGRATING, found.id, found.peer or move.target
        elif move.state is MoveState.MIGRATING:  # it was not started
            move.state = MoveState.WAITING

    def _record_of(self, wanted: str) -> Record | None:
        try:
            return self._migrations.record(wanted)
        except (NotFoundError, ConflictError):
            return None

    def _follow(self, move: Move) -> None:
        migration = self._migrations.known(move.migration)
        record = migration.record if migration is not None else self._record_of(move.migration)
        if record is None:  # forgotten; if its guest is gone, the next start says so
            move.state = MoveState.WAITING
            return
        move.phase, move.transferred_bytes = record.state.value, record.transferred_bytes
        move.downtime_seconds = record.downtime_seconds
        move.page_size = record.page_size or move.page_size
        move.target = record.peer or move.target
        if not record.ended:
            move.error = record.error
            if migration is not None:
                self._watch(migration)
            return
        self._ask_at = 0.0
        move.started_at, move.ended_at = record.started_at, record.ended_at
        error = record.error or ErrorInfo(code="internal", message="the migration ended without an error")
        if record.state is State.COMPLETED:
            self._end(move, MoveState.COMPLETED, None)
        elif error.code in _DECIDED or (migration is not None and migration.session.committed):
            self._end(move, MoveState.FAILED, error)
        elif move.migration in self._left_out:
            self._end(move, MoveState.ABORTED, error)
        else:
            self._again(move, error, counts=migration is not None)  # else the previous agent aborted it when it stopped

    def _watch(self, migration: SourceMigration) -> None:
        if migration.id not in self._watchers:
            task = self._watchers[migration.id] = asyncio.ensure_future(self._wake_with(migration))
            task.add_done_callback(lambda _: self._watchers.pop(migration.id, None))

    async def _wake_with(self, migration: SourceMigration) -> None:
        async for _ in migration.events():
            self._wake.set()
        self._wake.set()

    def _end(self, move: Move, state: MoveState, error: ErrorInfo | None) -> None:
        move.state, move.error = state, error
        report = log.info if error is None else log.warning
        why = {} if error is None else {"code": error.code, "error": error.message}
        report("guest ended", evacuation=self.record.id, guest=move.guest, state=state.value, target=move.target, **why)

    def _again(self, move: Move, error: ErrorInfo, *, counts: bool = True) -> None:
        """Record a failed attempt; let the guest wait for another one, if it may have one."""
        loop = asyncio.get_running_loop()
        settling = self._taken_up and loop.time() < self._began + self.record.patience_seconds
        counted = counts and error.code not in _UNCOUNTED and not (error.code == "guest-not-connected" and settling)
        attempt = Attempt(target=move.target, migration=move.migration, at=time.time(), error=error, counted=counted)
        if move.attempts and not counted and move.attempts[-1].error.code == error.code:
            move.attempts.pop()  # a target may be busy for hours
        move.attempts = [*move.attempts, attempt]
        failures = sum(attempt.counted for attempt in move.attempts)
        if self.record.state is not EvacuationState.RUNNING:
            self._end(move, MoveState.ABORTED, _aborted())
        elif error.code in _FINAL or failures >= self.record.max_attempts:
            self._end(move, MoveState.FAILED, error)
        else:
            report = log.warning if counted else log.info
            report("guest waits for another attempt", guest=move.guest, target=move.target, error=error.message)
            move.state, move.error = MoveState.WAITING, error
            self._retry_at[move.guest] = loop.time() + RETRY_SECONDS * 2 ** max(0, failures - 1)

    # ------------------------------------------------------------ starting

    async def _start_guests(self) -> None:
        """Ask the targets, place all guests that wait, and start those whose turn it is."""
        loop = asyncio.get_running_loop()
        self._ask_at = loop.time() + ASK_SECONDS
        waiting = {move.guest: move for move in self.record.moves(MoveState.WAITING)}
        taken = self._taken()  # before asking: what is taken meanwhile is rather counted twice
        rooms = await self._rooms(list(waiting.values()), taken)
        silent = [target.error for target in self.record.targets if target.error is not None]
        loads = [_load(move) for move in waiting.values()]
        places = plan(loads, list(rooms.values()), self.record.order, silent=silent)
        running = collections.Counter(move.target for move in self._working())
        for place in places:
            move = waiting[place.guest]
            if move.state is not MoveState.WAITING or self.record.state is not EvacuationState.RUNNING:
                continue  # aborted meanwhile
            if place.error is not None:
                continue
            self._without_target.pop(move.guest, None)
            move.target = place.target
            tried = any(attempt.target == place.target for attempt in move.attempts)
            if (
                len(self._working()) >= self.record.parallel
                or running[place.target] >= self.record.parallel_per_target
                or rooms[place.target].slots <= 0
                or (tried and loop.time() < self._retry_at.get(move.guest, 0.0))
            ):
                continue
            rooms[place.target].slots -= 1
            running[place.target] += 1
            await self._start(move, place)
        # A migration that fails gives its room back.
        hope = bool(self._working()) or any(place.error is None for place in places)
        for place in places:
            if place.error is not None and waiting[place.guest].state is MoveState.WAITING:
                self._wait_for_target(waiting[place.guest], place.error, rooms, hope=hope)
        await self._save(self.record)

    async def _rooms(self, waiting: Sequence[Move], taken: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, Room]:
        """Return the room of each target that answers, less what has been taken and does not show in its answer yet."""
        loop = asyncio.get_running_loop()
        asked = [t for t in self.record.targets if loop.time() >= self._silent_until.get(t.address, 0.0)]
        answers = await ask_all(
            asked, [AskedGuest(move.guest, move.driver) for move in waiting], self._mover.dial_terms
        )
        rooms = {}
        for address, answer in answers.items():
            if isinstance(answer, MigratedError):
                self._silent_until[address] = loop.time() + SILENCE_SECONDS
                continue
            room = rooms[address] = Room.of(address, answer, [move.guest for move in waiting])
            for page_bytes, size_bytes in taken.get(address, ()):
                room.take(page_bytes, size_bytes)
        return rooms

    def _taken(self) -> dict[str, list[tuple[int, int]]]:
        """Return what our guests take of each target and what it cannot tell yet: page size and bytes.

        Huge pages are reserved before pre-copy.  Other memory is taken as it arrives, or later by the guest itself.
        """
        taken: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
        for move in self.record.moves(MoveState.MIGRATING, MoveState.COMPLETED):
            if move.reserved and move.page_size > BASE_PAGE_BYTES:
                left = move.memory_bytes if move.phase in ("", State.SETUP.value) else 0
            else:
                left = max(0, move.memory_bytes - move.transferred_bytes)
            if left and move.page_size:
                taken[move.target].append((move.page_size, left))
        return taken

    def _wait_for_target(self, move: Move, error: ErrorInfo, rooms: Mapping[str, Room], *, hope: bool) -> None:
        """Let a guest wait that no target can take now, as long as that may change."""
        now = asyncio.get_running_loop().time()
        move.target, move.error = "", error
        since = self._without_target.setdefault(move.guest, now)
        refusals = [room.verdicts[move.guest].refusal for room in rooms.values()]
        may_change = len(rooms) < len(self.record.targets) or any(
            refusal is not None and refusal.code == "guest-migrating" for refusal in refusals
        )
        if not hope and not (may_change and now < since + self.record.patience_seconds):
            self._end(move, MoveState.FAILED, error)

    async def _start(self, move: Move, place: Place) -> None:
        move.state, move.target, move.page_size = MoveState.MIGRATING, place.target, place.page_bytes
        move.reserved, move.migration, move.phase, move.error = place.reserved, "", "", None
        move.transferred_bytes, move.downtime_seconds = 0, None
        move.started_at, move.ended_at = time.time(), None
        await self._save(self.record)  # first: the next agent then looks for the migration
        share = await self._share_bandwidth()
        request = {**self._options_of(move), "guest": move.guest, "to": place.target}
        if share:
            request["max_bandwidth"] = f"{share}B"
        try:
            record = await self._mover.start(StartRequest.model_validate(request))
        except MigratedError as error:
            move.ended_at = time.time()
            self._again(move, ErrorInfo.of(error))
            return
        record.requested_by = self.record.requested_by
        move.migration, move.phase = record.id, record.state.value
        await self._save(self.record)
        if self.record.state is not EvacuationState.RUNNING:
            self._abort_migration(record.id)

    def _options_of(self, move: Move) -> dict[str, Any]:
        foreign = () if move.driver == "libvirt" else DomainOptions.model_fields
        return {name: value for name, value in self.record.options.items() if name not in foreign}

    # ------------------------------------------------------------ bandwidth

    async def _share_bandwidth(self) -> int:
        """Divide the bandwidth among the migrations that transfer, also the one about to start; return a share.  0: no limit."""
        total = self.record.max_bandwidth_bytes_per_second
        working = self._working()
        if not total or not working:
            return 0
        share = max(1, total // len(working))
        known = [migration for move in working if (migration := self._migrations.known(move.migration)) is not None]
        for migration in sorted(known, key=lambda one: 0 < one.options.max_bandwidth < share):  # take before giving
            if migration.options.max_bandwidth != share and not migration.record.ended:
                await self._mover.set(migration.id, SetRequest.model_validate({"max_bandwidth": f"{share}B"}))
        return share


def _load(move: Move) -> Load:
    tried = collections.Counter(attempt.target for attempt in move.attempts if attempt.counted)
    return Load(move.guest, move.memory_bytes, move.priority, tried)


def _aborted() -> ErrorInfo:
    return ErrorInfo.of(AbortedError("the evacuation was aborted", hint="the guest runs on here"))
