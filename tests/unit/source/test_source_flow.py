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
import structlog

from migrated.address import Address
from migrated.agent.migration import Migration
from migrated.agent.record import Record, State
from migrated.config import Timeouts
from migrated.errors import AbortedError, ConnectionLostError, GuestError, MigratedError, TimeoutExceededError
from migrated.guests.access.pidfd import process_started
from migrated.guests.driver import Memento, SourceGuest
from migrated.link.dialing import Dialer
from migrated.protocol.messages import Ready
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.protocol.transitions import State as SessionState
from migrated.recovery.journal import Journal, SourceEntry
from migrated.recovery.state import Survival
from migrated.recovery.store import HolderKeeper
from migrated.source.connection import TargetConnection
from migrated.source.migration import SourceMigration
from migrated.source.reconnect import Reconnect
from migrated.source.rollback import Rollback
from migrated.source.stage import JournalledStage
from migrated.source.tracking import Tracking
from tests.unit.recovery.entries import HELLO, SOURCE

ID = HELLO.session.hex()
RESTARTED = MigratedError("the agent was restarted", code="agent-restarted")
PATIENCE_SECONDS = 10.0


class FakeGuest:
    """``refuses`` is what it answers when it is to run."""

    def __init__(self) -> None:
        self.refuses: MigratedError | None = None
        self.ran = 0

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


class FakeTracker:
    def disarm(self) -> None:
        pass

    def close(self) -> None:
        pass


class Place:
    """A rollback and what is around it; the session has nothing to settle."""

    def __init__(self, tmp_path: Path, *, pid: int, stage: str = "active") -> None:
        self.guest = FakeGuest()
        self.journal = Journal(tmp_path / "journal", SourceEntry)
        survival = Survival(self.journal, HolderKeeper(tmp_path), ID)
        entry = copy(SOURCE)
        entry.stage, entry.pid, entry.pid_started = stage, pid, process_started(os.getpid())
        self.journal.write(ID, entry)
        guest = cast("SourceGuest", self.guest)
        dialer = Dialer(Address("host-c", 7440), session_id=HELLO.session, token=HELLO.token, timeouts=Timeouts())
        self.migration = Migration(Record(id=ID, guest="vm1", role="source", mode="hybrid"))
        session = Session(Role.SOURCE)
        session.connection_lost()
        connection = TargetConnection(self.migration, session, dialer, bulk_streams=1)
        tracking = Tracking(guest, structlog.get_logger())
        tracking.tracker = cast("Any", FakeTracker())
        self.rollback = Rollback(
            self.migration,
            connection,
            guest,
            tracking=tracking,
            stage=JournalledStage(survival, guest, dialer, log=structlog.get_logger(), entry=entry),
            survival=survival,
            timeouts=Timeouts(),
        )

    @property
    def error(self) -> Any:
        """In the record."""
        return self.migration.record.error


async def test_a_guest_that_runs_on_leaves_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=os.getpid())
    await place.rollback.run(AbortedError("on request"))
    assert place.guest.ran == 1
    assert place.journal.load() == {}
    assert place.migration.record.state is State.ABORTED


@pytest.mark.parametrize("stage", ["active", "committed"])
async def test_a_guest_that_does_not_run_on_is_left_for_the_next_agent(tmp_path: Path, stage: str) -> None:
    place = Place(tmp_path, pid=os.getpid(), stage=stage)
    place.guest.refuses = GuestError("QEMU does not answer")
    await place.rollback.run(AbortedError("on request"))
    assert place.journal.load()[ID].stage == "active"
    assert place.migration.record.state is State.FAILED
    assert place.error.code == "guest-not-resumed"
    assert "on request" in place.error.message
    assert "QEMU does not answer" in place.error.message
    assert "start the source agent again" in place.error.hint


async def test_a_guest_that_has_ended_is_left_to_nobody(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=0)
    place.guest.refuses = GuestError("no such process")
    await place.rollback.run(GuestError("it exited", code="guest-died"))
    assert place.journal.load() == {}
    assert place.error.code == "guest-died"


async def test_the_next_agent_tries_again_and_again(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=os.getpid())
    place.guest.refuses = GuestError("QEMU does not answer")
    await place.rollback.after_restart({}, RESTARTED)
    assert place.error.code == "guest-not-resumed"
    assert ID in place.journal.load()
    again = Place(tmp_path, pid=os.getpid())
    await again.rollback.after_restart({}, RESTARTED)
    assert again.guest.ran == 1
    assert again.error.code == "agent-restarted"
    assert again.journal.load() == {}


async def test_after_a_restart_another_process_is_not_taken_for_the_guest(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=0)
    await place.rollback.after_restart({}, RESTARTED)
    assert place.guest.ran == 0
    assert place.error.code == "guest-died"
    assert place.journal.load() == {}


async def test_after_a_restart_a_guest_that_a_later_migration_has_is_left_alone(tmp_path: Path) -> None:
    place = Place(tmp_path, pid=os.getpid())
    await place.rollback.after_restart({}, RESTARTED, superseded=True)
    assert place.guest.ran == 0
    assert place.journal.load() == {}


# ---------------------------------------------------------------- dialling again


class Unreachable:
    """A connection whose target is never there; ``tries`` counts, ``trying`` runs in each try."""

    def __init__(self) -> None:
        self.tries = 0
        self.trying: Callable[[], None] = lambda: None
        self.session = Session(Role.SOURCE, state=SessionState.PAUSED, hello=HELLO, ready=Ready((1 << 21, 4096)))
        self.dialer = type("Dialer", (), {"address": Address("host-c", 7440)})()

    async def disconnect(self) -> None:
        pass

    async def dial(self) -> Any:
        self.tries += 1
        self.trying()
        raise ConnectionLostError("nobody there")


@pytest.fixture
def unreachable() -> Unreachable:
    return Unreachable()


def reconnect(unreachable: Unreachable, timeouts: Timeouts) -> Reconnect:
    record = Record(id=ID, guest="vm1", role="source", mode="hybrid", state=State.POSTCOPY_PAUSED)
    return Reconnect(Migration(record), cast("TargetConnection", unreachable), timeouts)


async def test_a_resume_during_a_try_that_fails_is_not_forgotten(unreachable: Unreachable) -> None:
    dialling = reconnect(unreachable, Timeouts(reconnect_interval=3600.0, reconnect_interval_limit=3600.0))
    second = asyncio.Event()

    def trying() -> None:
        if unreachable.tries == 1:
            dialling.now()
        else:
            second.set()

    unreachable.trying = trying
    running = asyncio.ensure_future(dialling.run())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await second.wait()
    finally:
        running.cancel()


async def test_at_the_operators_limit_the_hint_names_what_goes_on(unreachable: Unreachable) -> None:
    """`resume` does not, since the migration has ended; its journal is kept."""
    dialling = reconnect(unreachable, Timeouts(reconnect=0.01, reconnect_interval=0.02))
    with pytest.raises(TimeoutExceededError) as raised:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await dialling.run()
    assert "start the source agent anew" in raised.value.hint
    assert "resume" not in raised.value.hint


# ---------------------------------------------------------------- after a restart


@pytest.mark.parametrize("same", [True, False])
async def test_only_the_same_process_is_taken_for_the_paused_guest(same: bool) -> None:
    adopted: list[int] = []

    class Guest:
        async def adopt(self, pid: int, memento: Any) -> None:
            adopted.append(pid)

    entry = copy(SOURCE)
    entry.pid, entry.pid_started = os.getpid(), process_started(os.getpid()) + (not same)
    migration = SimpleNamespace(_guest=Guest(), _to_adopt=entry)
    await SourceMigration._adopt(cast("Any", migration), entry)
    assert adopted == ([os.getpid()] if same else [])
