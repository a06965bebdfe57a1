"""The target's flow with a guest, an engine and a source that are fakes: what it does where no rig gets to in time."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrated.agent.record import State
from migrated.config import AgentConfig, HooksSection
from migrated.errors import ConnectionLostError, GuestError, MigratedError, TimeoutExceededError
from migrated.guests.access.pidfd import process_started
from migrated.guests.driver import FaultSource, TargetGuest
from migrated.link.control_link import ControlLink
from migrated.memory.engine import Event, EventKind
from migrated.protocol import framing
from migrated.protocol.messages import GUEST_LOST, PROTOCOL_VERSION, Abort, Commit, LackingEnd, Ready, Resume, Resumed
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import Journal, TargetEntry
from migrated.recovery.state import RecoveryState
from migrated.recovery.store import HolderStore
from migrated.settings import Timeouts
from migrated.target.memory import GuestMemory
from migrated.target.migration import STREAM_WAIT_SECONDS, Recovered, TargetMigration
from tests.unit.link.ends import Stranger, link_on, sockets
from tests.unit.recovery.entries import HELLO

ID = HELLO.session.hex()
PATIENCE_SECONDS = 10.0


class FakeGuest:
    """Runs when it is told so, and ends when the test says so."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.runs = 0
        self.killed = 0
        self.mistakes = 0
        self.stuck = False  # in the kernel: it is not gone within the limit
        self.watched = 0

    async def died(self) -> str:
        self.watched += 1
        await self.end.wait()
        return "was killed by signal 9"

    async def resume(self) -> None:
        self.runs += 1
        if self.runs <= self.mistakes:
            raise OSError("out of descriptors")
        if self.end.is_set():
            raise GuestError("no such process")

    async def kill(self) -> None:
        self.killed += 1
        if self.stuck:
            raise TimeoutExceededError("it has not ended")

    async def close(self) -> None:
        pass


class FakeEngine:
    """Lacks pages for ever; ``refuses`` is what arming it meets."""

    missing = False
    refuses: MigratedError | None = None
    alive = True

    def __init__(self) -> None:
        self.armed = self.maps = False

    def arm(self, *_: Any, **__: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.armed = True

    def background(self) -> None:
        self.maps = True

    def drop_streams(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def stats(self) -> Any:
        return SimpleNamespace(stale_pages=0, stale_bytes=0)

    def lacking_maps(self) -> tuple[()]:
        return ()

    async def close(self) -> None:
        pass


class LateLink:
    """Of a source that dials when all is over."""

    peer = "source"
    closed = False

    async def close(self) -> None:
        self.closed = True

    def start(self, _: Session) -> None:
        raise AssertionError("nothing is to be said")


class Flow(TargetMigration):
    """Taken back after a restart; its engine is a fake."""

    fake: FakeEngine

    def _make_engine(self, *, recover: bool) -> Any:
        del recover
        if self.fake.missing:
            raise MigratedError("no engine", code="native")
        self.engine = cast("Any", self.fake)
        return self.engine

    def refresh(self) -> None:
        pass


@pytest.fixture
def guest() -> FakeGuest:
    return FakeGuest()


@pytest.fixture
def journal(tmp_path: Path) -> Journal[TargetEntry]:
    return Journal(tmp_path / "journal", TargetEntry)


def flow(stage: str, guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path) -> Flow:
    """A migration whose agent died at that stage; nobody dials."""
    entry = TargetEntry(hello=HELLO, stage=stage, peer="source", page_bytes=(1 << 21, 4096), started_at=1.0)
    journal.write(ID, entry)
    state = SessionState.WAITING if stage == "loaded" else SessionState.PAUSED
    config = cast("AgentConfig", type("Config", (), {"timeouts": Timeouts(), "hooks": HooksSection()}))
    made = Flow(
        HELLO,
        guest=cast("TargetGuest", guest),
        page_bytes=None,
        session=Session(Role.TARGET, state=state, hello=HELLO, ready=Ready(entry.page_bytes)),
        link=None,
        config=config,
        recovery_state=RecoveryState(journal, HolderStore(tmp_path), ID),
        recovered=Recovered(entry, Memory(), FaultSource(1, -1, ())),
    )
    made.fake = FakeEngine()
    return made


class Memory(GuestMemory):
    """Only its page sizes."""

    page_bytes = (1 << 21, 4096)


async def over(migration: Flow) -> None:
    """Run it to its end."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        await migration.run()


async def until(migration: Flow, state: State) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while migration.record.state is not state:  # noqa: ASYNC110 - it is that already, or will be after a few turns
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------- the guest's end while nobody dials


@pytest.mark.parametrize("stage", ["loaded", "committed", "running"])
async def test_a_guest_that_ends_while_the_link_is_down_is_missed_at_once(
    stage: str, guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow(stage, guest, journal, tmp_path)
    running = asyncio.ensure_future(migration.run())
    try:
        await until(migration, State.POSTCOPY_PAUSED)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # It is so already, or will be after a few turns.  Pages are mapped ahead only for a guest that runs.
            while guest.watched == 0 or migration.fake.maps is (stage == "loaded"):  # noqa: ASYNC110 - see above
                await asyncio.sleep(0.01)
        guest.end.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.shield(running)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert migration.record.state is State.FAILED
    assert migration.record.error is not None
    assert migration.record.error.code == "guest-died"
    assert journal.load() == {}


async def test_the_fault_servers_word_that_the_guest_is_gone_outlives_a_lost_link(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow("running", guest, journal, tmp_path)
    migration.on_engine_event(Event(EventKind.FAILED, 0, 0, GuestError("it is gone", code="guest-gone")))
    await over(migration)
    assert migration.record.error is not None
    assert migration.record.error.code == "guest-gone"


# ---------------------------------------------------------------- a process that does not end


@pytest.mark.parametrize("stage", ["loaded", "committed", "running"])
async def test_a_process_that_does_not_end_stays_in_the_journal_for_the_next_agent(
    stage: str, guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    """SIGKILL has been sent, and it waits in the kernel: its memory is not free, and nobody else knows of it."""
    migration = flow(stage, guest, journal, tmp_path)
    entry = migration._entry
    entry.pid, entry.pid_started = os.getpid(), process_started(os.getpid())
    guest.stuck = True
    running = asyncio.ensure_future(migration.run())
    await until(migration, State.POSTCOPY_PAUSED)
    with contextlib.suppress(TimeoutExceededError):
        await migration.discard()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await running
    assert migration.record.state is State.FAILED
    left = journal.load()[ID]
    assert (left.stage, left.pid) == ("setup", os.getpid()), "to be ended, never to be run"


# ---------------------------------------------------------------- no fault server, no guest


@pytest.mark.parametrize("stage", ["committed", "running"])
async def test_a_guest_that_cannot_be_served_after_a_restart_is_not_run(
    stage: str, guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow(stage, guest, journal, tmp_path)
    migration.fake.refuses = MigratedError("no userfaultfd", code="native")
    await over(migration)
    assert guest.runs == 0
    assert guest.killed == 0
    assert migration.record.state is State.FAILED
    assert migration.record.error is not None
    assert "no userfaultfd" in migration.record.error.message
    assert "start the target agent again" in migration.record.error.hint
    assert journal.load()[ID].stage == stage, "the next agent finds it"
    late = LateLink()
    await migration.dialled(cast("ControlLink", late))
    assert late.closed, "the source goes on asking"


async def dial(migration: Flow) -> tuple[asyncio.Task[None], Stranger]:
    """A source's connection, which the agent hands over."""
    ours, theirs = sockets()
    link = await link_on(ours)
    return asyncio.ensure_future(migration.dialled(link)), Stranger(theirs)


RESUME = Resume(PROTOCOL_VERSION, HELLO.session, HELLO.token, committed=True)


@pytest.mark.parametrize("missing", [True, False])
async def test_a_guest_that_cannot_be_served_waits_for_the_sources_word(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path, missing: bool
) -> None:
    migration = flow("loaded", guest, journal, tmp_path)
    migration.fake.refuses = MigratedError("no userfaultfd", code="native")
    migration.fake.missing = missing
    running = asyncio.ensure_future(migration.run())
    dialled, source = await dial(migration)
    await source.say(RESUME)
    assert await source.hear(Resumed) == Resumed("loaded", 0)
    await source.hear(LackingEnd)
    await until(migration, State.RECOVERING)
    await source.say(Commit())
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(running, dialled)
    source.sock.close()
    assert guest.runs == 0
    assert migration.record.state is State.FAILED
    assert journal.load()[ID].stage == "loaded"


async def test_a_guest_gone_before_it_was_taken_back_is_over(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow("committed", guest, journal, tmp_path)
    migration.fake.refuses = GuestError("it is gone", code="guest-gone")
    await over(migration)
    assert migration.record.error is not None
    assert migration.record.error.code == "guest-gone"
    assert journal.load() == {}


# ---------------------------------------------------------------- when all is over


async def test_sources_that_ask_late_at_once_do_not_meet(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    """One that has said half a word keeps no other from its answer, and gets its own."""
    migration = flow("committed", guest, journal, tmp_path)
    migration.fake.refuses = GuestError("it is gone", code="guest-gone")
    await over(migration)
    slow, first = await dial(migration)
    frame = framing.encode(RESUME)
    await first.say(frame[:-7])
    quick, second = await dial(migration)
    await second.say(RESUME)
    answers = [await second.hear(Abort)]
    await first.say(frame[-7:])
    answers.append(await first.hear(Abort))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(slow, quick)
    for source in (first, second):
        source.sock.close()
    assert [answer.code for answer in answers if isinstance(answer, Abort)] == [GUEST_LOST] * 2


async def test_one_that_dials_while_another_waits_takes_its_place(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow("loaded", guest, journal, tmp_path)
    running = asyncio.ensure_future(migration.run())
    await until(migration, State.POSTCOPY_PAUSED)
    former, first = await dial(migration)
    await former
    await first.say(RESUME)
    assert await first.hear(Resumed) == Resumed("loaded", 0)
    latter, second = await dial(migration)
    await latter
    await second.say(RESUME)
    assert await second.hear(Resumed) == Resumed("loaded", 0)
    with pytest.raises(EOFError):
        await first.hear(Commit)
    guest.end.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await running
    for source in (first, second):
        source.sock.close()


async def test_a_page_connection_does_not_wait_for_a_migration_that_is_over(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow("committed", guest, journal, tmp_path)
    migration.fake.refuses = GuestError("it is gone", code="guest-gone")
    ours, theirs = sockets()
    adding = asyncio.ensure_future(migration.add_stream(0, ours.detach()))
    await asyncio.sleep(0)
    await over(migration)
    with pytest.raises(ConnectionLostError, match="without a control connection"):
        async with asyncio.timeout(STREAM_WAIT_SECONDS / 2):
            await adding
    theirs.setblocking(True)
    assert theirs.recv(1) == b""
    theirs.close()


@pytest.mark.parametrize(("stream", "problem"), [(2, "2 of 2"), (0, "without a control connection")])
async def test_a_page_connection_that_was_not_agreed_on_is_closed(
    stream: int, problem: str, guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    """Also one that comes between two control connections: it would keep the place of the next one's."""
    migration = flow("committed", guest, journal, tmp_path)
    running = asyncio.ensure_future(migration.run())
    ours, theirs = sockets()
    with pytest.raises(MigratedError, match=problem):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await migration.add_stream(stream, ours.detach())
    theirs.setblocking(True)
    assert theirs.recv(1) == b""
    theirs.close()
    guest.end.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await running


async def test_a_page_connection_without_memory_to_fill_is_closed(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrated.target.migration.STREAM_WAIT_SECONDS", 0.01)
    migration = flow("committed", guest, journal, tmp_path)
    ours, theirs = sockets()
    with pytest.raises(MigratedError, match="memory for a page connection"):
        await migration.add_stream(0, ours.detach())
    theirs.setblocking(True)
    assert theirs.recv(1) == b""
    theirs.close()


# ---------------------------------------------------------------- after COMMIT nobody else runs it


async def test_a_guest_whose_start_fails_by_a_mistake_of_ours_is_tried_again(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow("committed", guest, journal, tmp_path)
    guest.mistakes = 1
    running = asyncio.ensure_future(migration.run())
    async with asyncio.timeout(PATIENCE_SECONDS):
        while guest.runs < 2:  # noqa: ASYNC110 - it is tried again after a moment
            await asyncio.sleep(0.01)
    guest.end.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await running


async def test_a_page_connection_that_waits_for_memory_is_closed_when_the_migration_ends(
    guest: FakeGuest, journal: Journal[TargetEntry], tmp_path: Path
) -> None:
    migration = flow("loaded", guest, journal, tmp_path)
    read, write = os.pipe()
    waiting = asyncio.ensure_future(migration.add_stream(0, write))
    await asyncio.sleep(0)
    assert not waiting.done()
    await migration._let_go()
    async with asyncio.timeout(5):  # much less than it would wait for memory
        with pytest.raises(ConnectionLostError):
            await waiting
    assert os.read(read, 1) == b""  # nobody has the other end
    os.close(read)
