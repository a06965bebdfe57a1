"""The source's ways back, with a guest and a target that are fakes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrated.address import Address
from migrated.agent.migration import FinalError
from migrated.agent.record import Record, State
from migrated.config import AgentConfig, HooksSection
from migrated.errors import AbortedError, ConnectionLostError, GuestError, MigratedError, TimeoutExceededError
from migrated.guests.access.pidfd import process_started
from migrated.guests.driver import Memento, SourceGuest
from migrated.link.dialing import DialTerms
from migrated.memory.regions import SourceMemory
from migrated.protocol import framing
from migrated.protocol.messages import AnyMessage, Ready, StaleMapEnd, Switchover
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role, event
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import Journal, SourceEntry
from migrated.recovery.state import RecoveryState
from migrated.recovery.store import HolderStore
from migrated.settings import Timeouts, read
from migrated.source.migration import SourceMigration
from migrated.source.options import Options
from migrated.source.stage import Recovered
from migrated.waiting import cancel_and_wait
from tests.unit.recovery.entries import HELLO, SOURCE

ID = HELLO.session.hex()
RESTARTED = MigratedError("the agent was restarted", code="agent-restarted")
PATIENCE_SECONDS = 10.0


class FakeGuest:
    """``refuses`` is what it answers when it is to run."""

    def __init__(self) -> None:
        self.refuses: MigratedError | None = None
        self.ran = 0
        self.adopted: list[int] = []
        self.released = 0

    async def adopt(self, pid: int, _: Memento) -> None:
        self.adopted.append(pid)

    async def release(self) -> None:
        self.released += 1

    async def resume(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.ran += 1

    async def reclaim(self, _: Memento) -> None:
        await self.resume()

    async def release_tracking(self) -> None:
        pass

    def memento(self) -> Memento:
        return {"runs": True}

    async def close(self) -> None:
        pass


class FakeTracker:
    def disarm(self) -> None:
        pass

    def close(self) -> None:
        pass


class Place:
    """A migration that is to be rolled back, and what is around it; its session has nothing to settle."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        pid: int,
        stage: str = "active",
        started: int | None = None,
        recovered: dict[str, Any] | None = None,
    ) -> None:
        self.guest = FakeGuest()
        self.journal = Journal(tmp_path / "journal", SourceEntry)
        entry = copy(SOURCE)
        entry.stage, entry.pid = stage, pid
        entry.pid_started = process_started(os.getpid()) if started is None else started
        self.journal.write(ID, entry)
        memory = SourceMemory(pid=pid, regions=(), mappings=(), memory_fds=(), file_offsets=())
        self.migration = source_migration(
            self.guest,
            RecoveryState(self.journal, HolderStore(tmp_path), ID),
            recovered=None if recovered is None else Recovered(entry, memory, RESTARTED, **recovered),
        )
        if recovered is not None:
            if self.migration.session.committed:
                return
            self.migration.session = Session(Role.SOURCE, state=SessionState.ABORTED)
            return
        self.migration._stage.entry = entry
        self.migration._tracker = cast("Any", FakeTracker())

    async def roll_back(self, error: MigratedError) -> None:
        await self.migration._roll_back(error, self.migration.connection)

    @property
    def error(self) -> Any:
        """In the record."""
        return self.migration.record.error


def source_migration(
    guest: FakeGuest, recovery_state: Any, timeouts: Timeouts | None = None, **given: Any
) -> SourceMigration:
    """To a target that is nowhere."""
    return SourceMigration(
        guest_name=HELLO.guest,
        driver=HELLO.driver,
        guest=cast("SourceGuest", guest),
        options=read(Options, {"target": "host-c:7440", "streams": 1}, "options"),
        config=cast("AgentConfig", SimpleNamespace(timeouts=timeouts or Timeouts(), hooks=HooksSection())),
        terms=DialTerms(timeouts or Timeouts()),
        session_id=HELLO.session,
        recovery_state=recovery_state,
        **given,
    )


async def test_a_guest_that_runs_on_leaves_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=os.getpid())
    await place.roll_back(AbortedError("on request"))
    assert place.guest.ran == 1
    assert place.journal.load() == {}
    assert place.migration.record.state is State.ABORTED


@pytest.mark.parametrize("stage", ["active", "committed"])
async def test_a_guest_that_does_not_run_on_is_left_for_the_next_agent(tmp_path: Path, stage: str) -> None:
    place = Place(tmp_path, pid=os.getpid(), stage=stage)
    place.guest.refuses = GuestError("QEMU does not answer")
    await place.roll_back(AbortedError("on request"))
    assert place.journal.load()[ID].stage == "active"
    assert place.migration.record.state is State.FAILED
    assert place.error.code == "guest-not-resumed"
    assert "on request" in place.error.message
    assert "QEMU does not answer" in place.error.message
    assert "start the source agent again" in place.error.hint


async def test_a_guest_that_has_ended_is_left_to_nobody(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=0)
    place.guest.refuses = GuestError("no such process")
    await place.roll_back(GuestError("it exited", code="guest-died"))
    assert place.journal.load() == {}
    assert place.error.code == "guest-died"


async def test_the_next_agent_tries_again_and_again(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=os.getpid(), recovered={})
    place.guest.refuses = GuestError("QEMU does not answer")
    await place.migration.run()
    assert place.error.code == "guest-not-resumed"
    assert ID in place.journal.load()
    again = Place(tmp_path, pid=os.getpid(), recovered={})
    await again.migration.run()
    assert again.guest.ran == 1
    assert again.error.code == "agent-restarted"
    assert again.journal.load() == {}


async def test_after_a_restart_another_process_is_not_taken_for_the_guest(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=0, recovered={})
    await place.migration.run()
    assert place.guest.ran == 0
    assert place.error.code == "guest-died"
    assert place.journal.load() == {}


async def test_after_a_restart_a_guest_that_a_later_migration_has_is_left_alone(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=os.getpid(), recovered={"superseded": True})
    await place.migration.run()
    assert place.guest.ran == 0
    assert place.journal.load() == {}


class SlowLink:
    """Of a network that takes nothing: whoever waits for it waits for ever, but notes it before."""

    broken = lost = None
    peer = "target"

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self.ended: asyncio.Future[MigratedError] = asyncio.get_running_loop().create_future()

    def post(self, message: AnyMessage) -> None:
        self.steps.append(f"post {event(message)}")

    async def _wait(self, *_: Any, **__: Any) -> Any:
        self.steps.append("wait for the network")
        await asyncio.Event().wait()

    send = receive = reason_for = close = _wait


async def test_a_guest_that_stands_still_does_not_wait_for_the_network(tmp_path: Path) -> None:
    """The session rules out COMMIT, then the journal does, then the guest runs on: only then does anybody wait."""
    place = Place(tmp_path, pid=os.getpid(), stage="committed")
    steps: list[str] = []
    runs = asyncio.Event()

    async def resume() -> None:
        steps.append(f"run on, the journal says {place.journal.load()[ID].stage}")
        runs.set()

    place.guest.resume = resume  # type: ignore[method-assign]
    migration = place.migration
    migration.connection.attach(cast("Any", SlowLink(steps)))
    for message in (HELLO, Switchover(1), StaleMapEnd()):
        migration.session.send(message)
        if message is HELLO:
            list(migration.session.receive(framing.encode(Ready((1 << 21, 4096)))))
    rolling_back = asyncio.ensure_future(place.roll_back(ConnectionLostError("a page connection ended")))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await runs.wait()
        while len(steps) < 3:  # noqa: ASYNC110 - it is that already, or will be after a few turns
            await asyncio.sleep(0)
    await cancel_and_wait(rolling_back)
    assert steps == ["post abort", "run on, the journal says active", "wait for the network"]


async def test_new_limits_and_a_new_address_are_journalled_at_once(tmp_path: Path) -> None:
    """A source agent that is restarted goes on with them."""
    place = Place(tmp_path, pid=os.getpid(), stage="committed")
    migration = place.migration
    migration._stage.written = True
    migration.record.state = State.POSTCOPY_PAUSED
    migration.options.max_bandwidth = 7
    migration.limits_changed()
    migration.resume(Address("host-d", 7441))
    await asyncio.gather(*migration._background)
    entry = place.journal.load()[ID]
    assert (entry.stage, entry.target, entry.max_bandwidth) == ("committed", "host-d:7441", 7)


# ---------------------------------------------------------------- dialling again


class Unreachable:
    """A dialer whose target is never there; ``tries`` counts, ``trying`` runs in each try."""

    address = Address("host-c", 7440)

    def __init__(self) -> None:
        self.tries = 0
        self.trying: Callable[[], None] = lambda: None

    async def control(self) -> Any:
        self.tries += 1
        self.trying()
        raise ConnectionLostError("nobody there")


@pytest.fixture
def unreachable() -> Unreachable:
    return Unreachable()


def paused(unreachable: Unreachable, timeouts: Timeouts) -> SourceMigration:
    """COMMIT was sent, then the connection was lost."""
    migration = source_migration(FakeGuest(), None, timeouts)
    migration.session = Session(Role.SOURCE, state=SessionState.PAUSED, hello=HELLO, ready=Ready((1 << 21, 4096)))
    migration.record.state = State.POSTCOPY_PAUSED
    migration._dialer = cast("Any", unreachable)
    return migration


async def test_a_resume_during_a_try_that_fails_is_not_forgotten(unreachable: Unreachable) -> None:
    migration = paused(unreachable, Timeouts(reconnect_interval=3600.0, reconnect_interval_limit=3600.0))
    second = asyncio.Event()

    def trying() -> None:
        if unreachable.tries == 1:
            migration.resume()
        else:
            second.set()

    unreachable.trying = trying
    running = asyncio.ensure_future(migration._until_done())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await second.wait()
    finally:
        running.cancel()


async def test_at_the_operators_limit_the_hint_names_what_goes_on(unreachable: Unreachable) -> None:
    """`resume` does not, since the migration has ended; its journal is kept."""
    migration = paused(unreachable, Timeouts(reconnect=0.01, reconnect_interval=0.02))
    with pytest.raises(FinalError) as raised:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await migration._until_done()
    assert isinstance(raised.value.error, TimeoutExceededError)
    assert "start the source agent anew" in raised.value.error.hint
    assert "resume" not in raised.value.error.hint


# ---------------------------------------------------------------- after a restart


@pytest.mark.parametrize("same", [True, False])
async def test_only_the_same_process_is_taken_for_the_paused_guest(tmp_path: Path, same: bool) -> None:
    place = Place(
        tmp_path, pid=os.getpid(), stage="released", started=process_started(os.getpid()) + (not same), recovered={}
    )
    await place.migration.run()
    assert place.guest.adopted == ([os.getpid()] if same else [])
    assert place.guest.released == 1
    assert place.migration.record.state is State.COMPLETED
    assert place.journal.load() == {}


async def test_a_completed_migration_is_on_record_before_the_next_agent_forgets_it(tmp_path: Path) -> None:
    """Else an evacuation that finds neither looks for a guest that has left long ago."""
    place = Place(tmp_path, pid=os.getpid(), stage="released", recovered={})
    stored = asyncio.get_running_loop().create_future()
    ended: list[Record] = []

    def store(record: Record) -> asyncio.Future[None]:
        ended.append(record)
        return stored

    place.migration.on_end = store
    running = asyncio.ensure_future(place.migration.run())
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not ended:  # noqa: ASYNC110 - the record tells nobody
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert ID in place.journal.load()
    stored.set_result(None)
    await running
    assert place.journal.load() == {}
