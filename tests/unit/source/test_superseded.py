"""What an earlier migration left must not run a guest that a later one has taken away: it would run at two places."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrated import config
from migrated.agent.requests import StartRequest
from migrated.errors import ConflictError
from migrated.guests.access.pidfd import process_started
from migrated.recovery.journal import Journal, SourceEntry
from migrated.recovery.state import RecoveryState, supersede
from migrated.recovery.store import HolderStore
from migrated.source.agent import SourceAgent
from tests.unit.recovery.entries import HELLO, SOURCE

START = StartRequest.model_validate({"guest": HELLO.guest, "to": "127.0.0.1:7440"})


def entry(**changes: Any) -> SourceEntry:
    return msgspec.structs.replace(SOURCE, **changes)


def ours(**changes: Any) -> SourceEntry:
    """Of a process that is still there, as a QEMU kept after its guest has moved on is."""
    return entry(pid=os.getpid(), pid_started=process_started(os.getpid()), **changes)


def agent_of(directory: Path) -> tuple[Any, list[Any]]:
    """An agent whose migrations are caught before they do anything."""
    table = {"driver": "qemu", "qmp": "/nowhere.qmp", "on_release": "keep"}
    text = {"agent": {"state_dir": str(directory)}, "tls": {"insecure": True}, "guests": {HELLO.guest: table}}
    agent: Any = SourceAgent(config.decode(text, "source"))
    caught: list[Any] = []
    agent._launch = lambda migration, **_: caught.append(migration)
    agent._started = True  # what an agent before it left is left alone here
    return agent, caught


def test_only_what_never_was_committed_and_is_of_that_guest(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SourceEntry)
    journal.write("stuck", entry())
    journal.write("gone", entry(stage="committed"))
    journal.write("other", entry(hello=msgspec.structs.replace(HELLO, guest="vm2")))
    journal.write("successor", entry())
    supersede(journal, HELLO.guest, "successor")
    assert {name: one.superseded for name, one in journal.load().items()} == {
        "stuck": True,
        "gone": False,
        "other": False,
        "successor": False,
    }


async def test_a_start_that_does_not_get_as_far_as_the_guest_changes_no_promise(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", SourceEntry)
    journal.write("stuck", ours())
    agent, begun = agent_of(tmp_path)
    await agent.start(START)
    assert len(begun) == 1  # and it is refused, by a QEMU that does not answer
    again, revived = agent_of(tmp_path)
    await again._take_back()  # what `run` begins with
    (migration,) = revived
    assert not migration._recovered.superseded, "the guest is still that migration's to run"


async def test_an_entry_left_before_another_migration_never_runs_the_guest_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", SourceEntry)
    journal.write("stuck", ours())
    later = RecoveryState(journal, HolderStore(tmp_path), "later")
    await later.write(ours())
    await later.supersede_others(HELLO.guest)  # what a migration does that has come as far as the guest
    await later.clear()  # it was completed
    again, revived = agent_of(tmp_path)
    await again._take_back()
    (migration,) = revived
    assert migration._recovered.superseded  # what rollback.after_restart is told


@pytest.mark.parametrize("stage", ["committed", "released"])
async def test_a_guest_that_was_given_away_is_not_moved_again(tmp_path: Path, stage: str) -> None:
    Journal(tmp_path / "journal", SourceEntry).write("gone", ours(stage=stage))
    agent, begun = agent_of(tmp_path)
    with pytest.raises(ConflictError, match="COMMIT was sent") as refusal:
        await agent.start(START)
    assert refusal.value.code == "guest-committed"
    assert begun == []


async def test_a_process_that_was_given_away_and_has_ended_is_in_nobodys_way(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", SourceEntry).write("gone", entry(stage="committed"))
    agent, begun = agent_of(tmp_path)
    await agent.start(START)
    assert len(begun) == 1


async def test_what_was_asked_for_survives_the_agent(tmp_path: Path) -> None:
    asked = {"target": "host-d:7441", "max_bandwidth": 7, "drain_bandwidth": 3, "compression": "zstd"}
    entry = ours(stage="committed", **asked)
    agent, _ = agent_of(tmp_path)
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in HELLO.regions]
    try:
        migration = agent._revive(entry, fds, RecoveryState(Journal(tmp_path, SourceEntry), HolderStore(tmp_path), "m"))
    finally:
        for fd in fds:
            os.close(fd)
    assert {name: str(getattr(migration.options, name)) for name in asked} == {k: str(v) for k, v in asked.items()}
