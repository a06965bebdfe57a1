"""An evacuation at work, with targets and migrations that are models: what it starts, when, and what it makes of each end."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from migrated import config
from migrated.address import Address
from migrated.agent.evacuation import Evacuation, EvacuationState, Move, MoveState
from migrated.agent.record import ErrorInfo, Record, State
from migrated.agent.requests import EvacuateRequest, GuestList, GuestReport, SetRequest, StartRequest
from migrated.agent.table import MigrationTable
from migrated.errors import ConflictError, ConnectionLostError, GuestError, MigratedError, NotFoundError
from migrated.link.dialing import DialTerms
from migrated.protocol.messages import AskedGuest, Capacity, Refusal, Verdict
from migrated.source import evacuation, evacuations
from migrated.source.evacuations import Evacuations
from migrated.source.migration import SourceMigration

MIB = 1 << 20
PATIENCE_SECONDS = 30.0
B, C = "b:7440", "c:7440"


@dataclasses.dataclass
class Host:
    """A target that answers with this."""

    memory_mib: int = 1000
    migrations: int = 0
    max_migrations: int = 8
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # guest → code
    error: MigratedError | None = None

    def answer(self, guests: list[AskedGuest]) -> Capacity:
        if self.error is not None:
            raise self.error
        verdicts = [
            Verdict(refusal=Refusal(self.refused[one.guest], "not this one"))
            if one.guest in self.refused
            else Verdict(4096)
            for one in guests
        ]
        return Capacity("t", self.memory_mib * MIB, (), self.migrations, self.max_migrations, tuple(verdicts))


class FakeMigration:
    """``committed`` is what its session says."""

    def __init__(self, record: Record, limit: int) -> None:
        self.record = record
        self.id = record.id
        self.committed = False
        self.former = False  # it ended with the previous agent, which has archived its record
        self.options = self
        self.session = self
        self.max_bandwidth = limit
        self.changed = asyncio.Event()

    async def events(self) -> AsyncIterator[Record]:
        while True:
            yield self.record
            if self.record.ended:
                return
            await self.changed.wait()
            self.changed.clear()

    def go(self, state: State, error: ErrorInfo | None = None) -> None:
        self.committed |= state in (State.POSTCOPY, State.COMPLETED)
        self.record.state, self.record.error = state, error
        if self.record.ended:
            self.record.ended_at = self.record.started_at + 1.0
        self.changed.set()

    def fail(self, code: str) -> None:
        self.go(State.FAILED, ErrorInfo(code=code, message=f"it failed: {code}"))

    def abort(self) -> None:
        if self.committed:
            raise ConflictError("it cannot be aborted any more")
        self.go(State.ABORTED, ErrorInfo(code="aborted", message="aborted on request"))


class FakeAgent:
    """The mover and the table of migrations in one."""

    def __init__(self, directory: Path, sizes_mib: dict[str, int], **tables: Any) -> None:
        table = {"agent": {"state_dir": str(directory)}, "tls": {"insecure": True}, **tables}
        self.config = config.decode(table, "source")
        self.dial_terms = DialTerms(self.config.timeouts)
        self.hosts = {B: Host(), C: Host()}
        self.reports = [
            GuestReport(name=name, driver="process", memory_bytes=size * MIB, migratable=True)
            for name, size in sizes_mib.items()
        ]
        self.all: list[FakeMigration] = []
        self.requests: dict[str, StartRequest] = {}
        self.refusals: list[MigratedError] = []  # what the next starts raise
        self.sets: list[tuple[str, int]] = []
        self.began = asyncio.Event()
        self.evacuations = self.next_agent()

    def next_agent(self) -> Evacuations:
        """Another agent with the same state directory, migrations and targets."""
        self.evacuations = Evacuations(self, cast("MigrationTable[SourceMigration]", self))
        return self.evacuations

    async def survey(self) -> GuestList:
        return GuestList(guests=self.reports)

    async def start(self, request: StartRequest) -> Record:
        if self.refusals:
            raise self.refusals.pop(0)
        assert self.of_guest(request.guest) is None
        self.requests[request.guest] = request
        return self.begin(request.guest, str(request.to), request.max_bandwidth).record

    def begin(self, guest: str, peer: str, limit: int = 0) -> FakeMigration:
        record = Record(id=f"{len(self.all):04x}", guest=guest, role="source", mode="hybrid", peer=peer)
        self.all.append(FakeMigration(record, limit))
        return self.all[-1]

    async def set(self, migration_id: str, request: SetRequest) -> Record:
        migration = self.known(migration_id)
        assert migration is not None
        migration.max_bandwidth = request.max_bandwidth
        self.sets.append((migration_id, request.max_bandwidth))
        return migration.record

    # what is used of the table

    def known(self, migration_id: str) -> FakeMigration | None:
        return next((one for one in self.all if one.id == migration_id and not one.former), None)

    def of_guest(self, guest: str) -> FakeMigration | None:
        return next((one for one in self.all if one.record.guest == guest and not one.record.ended), None)

    def record(self, wanted: str) -> Record:
        found = [one.record for one in self.all if wanted in (one.id, one.record.guest)]
        if not found:
            raise NotFoundError("no such migration")
        return found[-1]

    # for the tests

    @property
    def active(self) -> list[FakeMigration]:
        return [one for one in self.all if not one.record.ended]

    async def evacuate(self, **options: Any) -> Evacuation:
        return await self.evacuations.begin(EvacuateRequest.model_validate({"to": [B, C], **options}))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds, while the evacuation works."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts."""
    for name in ("ASK_SECONDS", "SILENCE_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(evacuation, name, 0.01)


@pytest.fixture
async def agent(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FakeAgent]:
    made = FakeAgent(tmp_path, {"g0": 1, "g1": 2, "g2": 3, "g3": 4}, **getattr(request, "param", {}))

    async def ask(target: Address, guests: list[AskedGuest], _timeouts: Any) -> Capacity:
        return made.hosts[str(target)].answer(guests)

    monkeypatch.setattr(evacuation, "ask", ask)
    yield made
    await made.evacuations.close()


def moves(record: Evacuation) -> dict[str, Move]:
    return {move.guest: move for move in record.guests}


def state_of(record: Evacuation) -> dict[str, MoveState]:
    return {move.guest: move.state for move in record.guests}


async def test_all_guests_leave_two_at_a_time_the_smallest_first(agent: FakeAgent) -> None:
    record = await agent.evacuate(parallel=2, parallel_per_target=1)
    order = []
    for _ in range(2):
        await agent.until(lambda: len(agent.active) == 2)
        assert len({one.record.peer for one in agent.active}) == 2
        order += [one.record.guest for one in agent.active]
        for one in agent.active:
            one.record.downtime_seconds = 0.25
            one.go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert order == ["g0", "g1", "g2", "g3"]
    assert record.state is EvacuationState.COMPLETED
    for move in record.guests:
        assert (move.state, move.error, move.downtime_seconds, move.attempts) == (MoveState.COMPLETED, None, 0.25, [])
        assert (move.started_at, move.ended_at) != (None, None)


async def test_what_was_placed_counts_before_it_shows(agent: FakeAgent) -> None:
    agent.hosts = {B: Host(memory_mib=5), C: Host(memory_mib=5)}
    await agent.evacuate(parallel=4, parallel_per_target=4)
    await agent.until(lambda: len(agent.active) == 4)
    for address in (B, C):
        there = [move.memory_bytes for move in agent.evacuations.records()[0].guests if move.target == address]
        assert sum(there) == 5 * MIB


async def test_the_migrations_share_the_bandwidth(agent: FakeAgent) -> None:
    record = await agent.evacuate(parallel=4, parallel_per_target=4, max_bandwidth="12MB")
    assert record.max_bandwidth_bytes_per_second == 12_000_000
    await agent.until(lambda: len(agent.active) == 4)
    await agent.until(lambda: [one.max_bandwidth for one in agent.active] == [3_000_000] * 4)
    agent.active[0].go(State.COMPLETED)
    await agent.until(lambda: [one.max_bandwidth for one in agent.active] == [4_000_000] * 3)
    agent.active[0].go(State.POSTCOPY_PAUSED)  # it transfers nothing
    await agent.until(lambda: [one.max_bandwidth for one in agent.active[1:]] == [6_000_000] * 2)
    agent.active[0].go(State.POSTCOPY)
    await agent.until(lambda: [one.max_bandwidth for one in agent.active] == [4_000_000] * 3)


async def test_options_reach_the_migrations_and_those_for_libvirt_only_its_guests(agent: FakeAgent) -> None:
    agent.reports[1].driver = "libvirt"
    options = {"mode": "postcopy", "drain_bandwidth": "1MB", "undefine_source": True}
    record = await agent.evacuate(only=["g0", "g1"], **options)
    record.requested_by = "alice"
    await agent.until(lambda: len(agent.all) == 2)
    for request in agent.requests.values():
        assert request.model_fields_set >= {"mode", "drain_bandwidth"}
        assert (request.mode, request.drain_bandwidth) == ("postcopy", 1_000_000)
        assert not {"max_bandwidth", "streams", "persistent"} & request.model_fields_set
    assert {name: "undefine_source" in request.model_fields_set for name, request in agent.requests.items()} == {
        "g0": False,
        "g1": True,
    }
    assert {one.record.requested_by for one in agent.all} == {"alice"}


async def test_a_failed_guest_tries_the_other_target_and_stays_after_the_last_attempt(agent: FakeAgent) -> None:
    record = await agent.evacuate(only=["g0"], attempts=2)
    await agent.until(lambda: len(agent.all) == 1)
    agent.all[0].fail("no-huge-pages")
    await agent.until(lambda: len(agent.all) == 2)
    assert {one.record.peer for one in agent.all} == {B, C}
    agent.all[1].fail("connection-lost")
    await agent.until(lambda: record.ended)
    (move,) = record.guests
    assert (record.state, move.state) == (EvacuationState.FAILED, MoveState.FAILED)
    assert move.error is not None
    assert move.error.code == "connection-lost"
    assert [(attempt.error.code, attempt.migration) for attempt in move.attempts] == [
        ("no-huge-pages", "0000"),
        ("connection-lost", "0001"),
    ]


async def test_after_commit_nothing_is_tried_again(agent: FakeAgent) -> None:
    record = await agent.evacuate(only=["g0"])
    await agent.until(lambda: len(agent.all) == 1)
    agent.all[0].go(State.POSTCOPY)
    agent.all[0].fail("target-lost-guest")
    await agent.until(lambda: record.ended)
    assert len(agent.all) == 1
    assert state_of(record) == {"g0": MoveState.FAILED}


async def test_a_migration_that_waits_for_its_target_holds_no_slot(agent: FakeAgent) -> None:
    record = await agent.evacuate(parallel=1)
    await agent.until(lambda: len(agent.all) == 1)
    stalled = agent.all[0]
    stalled.go(State.POSTCOPY_PAUSED, ErrorInfo(code="connection-lost", message="gone"))
    for number in (2, 3, 4):
        await agent.until(lambda number=number: len(agent.all) == number)  # type: ignore[misc]  # mypy cannot infer it
        agent.all[-1].go(State.COMPLETED)
    await agent.until(lambda: len(record.moves(MoveState.COMPLETED)) == 3)
    assert not record.ended
    waiting = moves(record)[stalled.record.guest]
    assert waiting.error is not None
    assert (waiting.phase, waiting.error.code) == ("postcopy-paused", "connection-lost")
    stalled.go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.COMPLETED


async def test_a_busy_target_queues_its_guests(agent: FakeAgent) -> None:
    agent.hosts = {B: Host(max_migrations=1, migrations=1), C: Host(error=None, refused={"g0": "unknown-guest"})}
    record = await agent.evacuate(only=["g0"])
    await agent.until(lambda: moves(record)["g0"].target == B)
    assert agent.all == []
    agent.hosts[B].migrations = 0
    await agent.until(lambda: len(agent.all) == 1)
    agent.all[0].fail("too-many")  # somebody else was faster: again and again, without an end
    for number in range(2, 8):
        await agent.until(lambda number=number: len(agent.all) == number)  # type: ignore[misc]  # mypy cannot infer it
        agent.all[-1].fail("too-many")
    await agent.until(lambda: len(agent.all) == 8)
    agent.all[-1].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.COMPLETED
    assert [attempt.counted for attempt in record.guests[0].attempts] == [False]


async def test_guests_wait_for_a_silent_target_as_long_as_asked(agent: FakeAgent) -> None:
    agent.hosts[C].refused = dict.fromkeys(("g0", "g1"), "drivers-differ")
    record = await agent.evacuate(only=["g0", "g1"], parallel=1, patience=3600)
    await agent.until(lambda: len(agent.all) == 1)
    agent.hosts[B].error = ConnectionLostError("b:7440 cannot be reached", code="target-unreachable")
    agent.all[0].fail("connection-lost")
    await agent.until(lambda: all(move.error is not None for move in record.guests))
    await agent.until(lambda: "b:7440 cannot be reached" in str(moves(record)["g1"].error))
    assert len(agent.all) == 1
    agent.hosts[B].error = None
    for number in (2, 3):
        await agent.until(lambda number=number: len(agent.all) == number)  # type: ignore[misc]  # mypy cannot infer it
        agent.all[-1].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.COMPLETED


async def test_without_patience_a_silent_target_ends_the_waiting(agent: FakeAgent) -> None:
    agent.hosts[C].refused = {"g0": "drivers-differ"}
    record = await agent.evacuate(only=["g0"], patience=0)
    await agent.until(lambda: len(agent.all) == 1)
    agent.hosts[B].error = ConnectionLostError("b:7440 cannot be reached", code="target-unreachable")
    agent.all[0].fail("connection-lost")
    await agent.until(lambda: record.ended)
    (move,) = record.guests
    assert move.error is not None
    assert (move.state, move.error.code) == (MoveState.FAILED, "no-target")


async def test_who_does_not_fit_waits_while_room_may_be_given_back(agent: FakeAgent) -> None:
    agent.hosts = {B: Host(memory_mib=4), C: Host(memory_mib=0)}
    record = await agent.evacuate(only=["g2", "g3"], attempts=1)  # 3 and 4 MiB: one of them fits
    await agent.until(lambda: len(agent.all) == 1)
    await agent.until(lambda: moves(record)["g2"].error is not None)
    assert agent.all[0].record.guest == "g3"
    agent.all[0].fail("guest-failed")
    await agent.until(lambda: len(agent.all) == 2)
    agent.all[1].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert state_of(record) == {"g2": MoveState.COMPLETED, "g3": MoveState.FAILED}


async def test_an_abort_of_one_migration_leaves_its_guest_here(agent: FakeAgent) -> None:
    record = await agent.evacuate(only=["g0", "g1"], parallel=1)
    await agent.until(lambda: len(agent.all) == 1)
    agent.all[0].abort()
    agent.evacuations.leave_out(agent.all[0].id)
    await agent.until(lambda: len(agent.all) == 2)
    agent.all[1].abort()  # the target's operator has ended it: another attempt
    await agent.until(lambda: len(agent.all) == 3)
    agent.all[2].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert state_of(record) == {"g0": MoveState.ABORTED, "g1": MoveState.COMPLETED}
    assert record.state is EvacuationState.FAILED


async def test_an_aborted_evacuation_waits_for_those_after_commit(agent: FakeAgent) -> None:
    record = await agent.evacuate(parallel=2)
    await agent.until(lambda: len(agent.all) == 2)
    agent.all[1].go(State.POSTCOPY)
    await agent.until(lambda: "postcopy" in {move.phase for move in record.guests})
    assert (await agent.evacuations.abort(record.id)).state is EvacuationState.ABORTING
    assert agent.all[0].record.state is State.ABORTED
    with pytest.raises(ConflictError, match="nothing to abort"):
        await agent.evacuations.abort(record.id)
    with pytest.raises(ConflictError) as caught:
        await agent.evacuate()
    assert caught.value.code == "evacuation-active"
    await agent.until(lambda: moves(record)["g0"].state is MoveState.ABORTED)
    assert not record.ended
    agent.all[1].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.ABORTED
    assert len(agent.all) == 2
    assert state_of(record) == {
        "g0": MoveState.ABORTED,
        "g1": MoveState.COMPLETED,
        "g2": MoveState.ABORTED,
        "g3": MoveState.ABORTED,
    }
    with pytest.raises(ConflictError, match="nothing to abort"):
        await agent.evacuations.abort(record.id)


async def test_what_is_saved_at_the_same_time_stays_whole(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow saves while a verb saves: both write the same file."""
    record = await agent.evacuate()
    await agent.until(lambda: len(agent.all) == 2)
    journal, writing = agent.evacuations._journal, 0
    write = journal.write

    def slow(name: str, entry: Evacuation) -> None:
        nonlocal writing
        writing += 1
        assert writing == 1
        time.sleep(0.02)
        write(name, entry)
        writing -= 1

    monkeypatch.setattr(journal, "write", slow)
    await asyncio.gather(*(agent.evacuations._save(record) for _ in range(4)), agent.evacuations.abort(record.id))
    await agent.until(lambda: record.ended)
    await agent.evacuations.close()
    await agent.next_agent().take_up()
    assert [found.id for found in agent.evacuations.records()] == [record.id]


async def test_a_migration_that_somebody_else_has_started_is_taken_over(agent: FakeAgent) -> None:
    record = await agent.evacuate(only=["g0", "g1"], parallel=1)
    await agent.until(lambda: len(agent.all) == 1)
    other = agent.begin("g1", "elsewhere:7440")
    agent.all[0].go(State.COMPLETED)
    await agent.until(lambda: moves(record)["g1"].state is MoveState.MIGRATING)
    other.go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert len(agent.all) == 2
    assert (record.state, moves(record)["g1"].target) == (EvacuationState.COMPLETED, "elsewhere:7440")


async def test_what_cannot_even_be_started_counts_as_an_attempt(agent: FakeAgent) -> None:
    agent.refusals = [GuestError("not now", code="qmp-failed"), ConflictError("8 are active", code="too-many")]
    record = await agent.evacuate(only=["g0"], attempts=2)
    await agent.until(lambda: len(agent.all) == 1)
    assert [attempt.counted for attempt in record.guests[0].attempts] == [True, False]
    agent.all[0].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.COMPLETED


async def test_a_guest_that_was_handed_over_is_not_tried_again(agent: FakeAgent) -> None:
    agent.refusals = [ConflictError("COMMIT was sent for g0", code="guest-committed")]
    record = await agent.evacuate(only=["g0"])
    await agent.until(lambda: record.ended)
    assert state_of(record) == {"g0": MoveState.FAILED}
    assert agent.all == []


# ---------------------------------------------------------------- the next agent


async def test_the_next_agent_continues_and_starts_nothing_twice(agent: FakeAgent) -> None:
    record = await agent.evacuate(parallel=3, parallel_per_target=3, attempts=1)
    await agent.until(lambda: len(agent.all) == 3)
    agent.all[0].go(State.POSTCOPY)
    await agent.until(lambda: "postcopy" in {move.phase for move in record.guests})
    await agent.evacuations.close()  # as if it were killed: nothing more is saved
    agent.all[0].go(State.COMPLETED)  # recovered after COMMIT
    agent.all[1].fail("agent-restarted")  # before
    await agent.next_agent().take_up()
    (found,) = agent.evacuations.records()
    assert found is not record
    await agent.until(lambda: len(agent.active) == 3)  # the third, the second anew, and the fourth
    assert sorted(one.record.guest for one in agent.active) == ["g1", "g2", "g3"]
    for one in agent.active:
        one.go(State.COMPLETED)
    await agent.until(lambda: found.ended)
    assert found.state is EvacuationState.COMPLETED
    assert sorted(one.record.guest for one in agent.all) == ["g0", "g1", "g1", "g2", "g3"]
    assert [attempt.counted for attempt in moves(found)["g1"].attempts] == [False]


async def test_what_an_agent_aborts_because_it_stops_is_no_attempt(agent: FakeAgent) -> None:
    await agent.evacuate(only=["g0"], attempts=1)
    await agent.until(lambda: len(agent.all) == 1)
    await agent.evacuations.close()
    agent.all[0].abort()
    agent.all[0].former = True
    await agent.next_agent().take_up()
    (found,) = agent.evacuations.records()
    await agent.until(lambda: len(agent.all) == 2)
    agent.all[1].go(State.COMPLETED)
    await agent.until(lambda: found.ended)
    assert found.state is EvacuationState.COMPLETED


async def test_a_start_that_was_not_recorded_is_found(agent: FakeAgent) -> None:
    """The agent dies between the start and its note."""
    record = await agent.evacuate(only=["g0", "g1"], parallel=2)
    await agent.until(lambda: len(agent.all) == 2)
    await agent.evacuations.close()
    for move in record.guests:
        move.migration = ""
    await agent.evacuations._save(record)
    agent.all[1].go(State.COMPLETED)
    await agent.next_agent().take_up()
    (found,) = agent.evacuations.records()
    await agent.until(lambda: found.guests[1].state is MoveState.COMPLETED)
    agent.all[0].go(State.COMPLETED)
    await agent.until(lambda: found.ended)
    assert len(agent.all) == 2


async def test_guests_that_have_not_connected_to_the_next_agent_yet_are_waited_for(agent: FakeAgent) -> None:
    await agent.evacuate(only=["g0"], attempts=1)
    await agent.until(lambda: len(agent.all) == 1)
    await agent.evacuations.close()
    agent.all[0].fail("agent-restarted")
    agent.refusals = [GuestError("g0 is not connected", code="guest-not-connected")] * 3
    await agent.next_agent().take_up()
    (found,) = agent.evacuations.records()
    await agent.until(lambda: len(agent.all) == 2)
    agent.all[1].go(State.COMPLETED)
    await agent.until(lambda: found.ended)
    assert found.state is EvacuationState.COMPLETED


async def test_what_has_ended_is_still_shown_and_the_oldest_forgotten(agent: FakeAgent) -> None:
    names = []
    for _ in range(evacuations._KEEP + 2):
        record = await agent.evacuate(only=["g0"])
        names.append(record.id)
        await agent.until(lambda: len(agent.active) == 1)
        agent.active[0].go(State.COMPLETED)
        await agent.until(lambda record=record: record.ended)  # type: ignore[misc]  # as above
    written = agent.evacuations._journal
    await agent.until(lambda: all(record.ended for record in written.load().values()))
    await agent.next_agent().take_up()
    assert [record.id for record in agent.evacuations.records()] == names[-evacuations._KEEP - 1 :]
    assert {record.state for record in agent.evacuations.records()} == {EvacuationState.COMPLETED}
    with pytest.raises(NotFoundError):
        agent.evacuations.find(names[0])


async def test_a_bug_ends_the_evacuation_and_nothing_else(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    record = await agent.evacuate()
    await agent.until(lambda: len(agent.all) == 2)
    monkeypatch.setattr(evacuation, "plan", broken)
    agent.all[0].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.FAILED
    assert [problem.code for problem in record.problems] == ["internal"]
    assert record.ended_at is not None
    assert not agent.all[1].record.ended


# ---------------------------------------------------------------- before anything is touched


RANKS = {
    "evacuation": {
        "order": "priority",
        "guests": [
            {"match": "g3", "priority": 5, "labels": ["web"]},
            {"match": "g[23]", "priority": 1, "labels": ["spare"]},
        ],
    }
}


@pytest.mark.parametrize("agent", [RANKS], indirect=True)
async def test_a_dry_run_shows_order_and_targets_and_does_nothing(agent: FakeAgent) -> None:
    plan = await agent.evacuate(dry_run=True)
    assert plan.state is EvacuationState.PLANNED
    assert [(move.guest, move.priority, move.labels) for move in plan.guests] == [
        ("g3", 5, ["web", "spare"]),
        ("g2", 1, ["spare"]),
        ("g0", 0, []),
        ("g1", 0, []),
    ]
    assert all(move.target in (B, C) for move in plan.guests)
    assert [target.memory_bytes for target in plan.targets] == [1000 * MIB] * 2
    assert (agent.all, agent.evacuations.records()) == ([], [])
    assert not (agent.config.state_dir / evacuations.DIRECTORY).exists()


@pytest.mark.parametrize("agent", [RANKS], indirect=True)
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"only": ["label=spare"]}, ["g3", "g2"]),
        ({"only": ["g[01]", "label=web"]}, ["g3", "g0", "g1"]),
        ({"exclude": ["label=spare"]}, ["g0", "g1"]),
        ({"only": ["g*"], "exclude": ["g0", "label=web"], "order": "largest"}, ["g2", "g1"]),
    ],
)
async def test_patterns_and_labels_choose_the_guests(agent: FakeAgent, options: Any, names: list[str]) -> None:
    plan = await agent.evacuate(dry_run=True, **options)
    assert [move.guest for move in plan.guests] == names


@pytest.mark.parametrize("key", ["only", "exclude"])
@pytest.mark.parametrize("pattern", ["h*", "label=web"])
async def test_a_pattern_that_names_nobody_is_refused(agent: FakeAgent, key: str, pattern: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        await agent.evacuate(**{key: ["g0", pattern]})
    assert caught.value.code == "no-guest-matches"


async def test_who_cannot_be_migrated_is_listed_with_the_reason(agent: FakeAgent) -> None:
    agent.reports[1].migratable = False
    agent.reports[1].error = ErrorInfo(code="unsupported-device", message="g1 has a host device")
    record = await agent.evacuate(only=["g0", "g1"])
    await agent.until(lambda: len(agent.all) == 1)
    agent.all[0].go(State.COMPLETED)
    await agent.until(lambda: record.ended)
    assert record.state is EvacuationState.COMPLETED
    assert state_of(record) == {"g0": MoveState.COMPLETED, "g1": MoveState.INELIGIBLE}
    with pytest.raises(ConflictError, match="g1 has a host device") as caught:
        await agent.evacuate(only=["g1"])
    assert caught.value.code == "no-eligible-guest"


async def test_without_any_eligible_guest_nothing_begins(agent: FakeAgent) -> None:
    for report in agent.reports:
        report.migratable, report.error = False, ErrorInfo(code="guest-not-connected", message="it does not run")
    with pytest.raises(ConflictError, match="g0: it does not run; g1: it does not run") as caught:
        await agent.evacuate()
    assert caught.value.code == "no-eligible-guest"
    assert agent.evacuations.records() == []


@pytest.mark.parametrize("dry_run", [False, True])
async def test_an_unreachable_target_is_refused_at_once(agent: FakeAgent, dry_run: bool) -> None:
    agent.hosts[C].error = ConnectionLostError("c:7440 cannot be reached", code="target-unreachable")
    with pytest.raises(ConnectionLostError, match="c:7440 cannot be reached"):
        await agent.evacuate(dry_run=dry_run)
    assert (agent.all, agent.evacuations.records()) == ([], [])


async def test_targets_without_room_for_anybody_are_refused_at_once(agent: FakeAgent) -> None:
    agent.hosts = {B: Host(memory_mib=0), C: Host(memory_mib=0)}
    with pytest.raises(ConflictError, match=r"b:7440 has no room for g0.*c:7440 has no room.*3 more guests") as caught:
        await agent.evacuate()
    assert caught.value.code == "no-room"
    assert (agent.all, agent.evacuations.records()) == ([], [])


async def test_a_plan_names_those_who_have_no_target(agent: FakeAgent) -> None:
    agent.hosts = {B: Host(memory_mib=4), C: Host(memory_mib=3)}
    plan = await agent.evacuate(dry_run=True)
    assert {move.guest: move.target for move in plan.guests} == {"g0": "", "g1": "", "g2": C, "g3": B}
    assert {move.error.code for move in plan.guests if move.error is not None} == {"no-room"}
