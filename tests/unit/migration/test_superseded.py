"""What an earlier migration left must not run a guest that a later one has taken away: it would run at two places."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrated import config
from migrated.agent import StartRequest
from migrated.guests.pidfd import process_started
from migrated.journal import Journal, SourceEntry
from migrated.source.agent import SourceAgent
from migrated.source.stage import supersede
from tests.unit.survival.entries import HELLO, SOURCE


def entry(**changes: Any) -> SourceEntry:
    return msgspec.structs.replace(SOURCE, **changes)


def agent_of(directory: Path) -> tuple[Any, list[Any]]:
    """An agent whose migrations are caught before they do anything."""
    table = {"driver": "qemu", "qmp": "/nowhere.qmp", "on_release": "keep"}
    text = {"agent": {"state_dir": str(directory)}, "tls": {"insecure": True}, "guests": {HELLO.guest: table}}
    agent: Any = SourceAgent(config.decode(text, "source"))
    caught: list[Any] = []
    agent._launch = caught.append
    return agent, caught


def test_only_what_never_was_committed_and_is_of_that_guest(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SourceEntry)
    journal.write("stuck", entry())
    journal.write("gone", entry(stage="committed"))
    journal.write("other", entry(hello=msgspec.structs.replace(HELLO, guest="vm2")))
    supersede(journal, HELLO.guest)
    assert {name: one.superseded for name, one in journal.load().items()} == {
        "stuck": True,
        "gone": False,
        "other": False,
    }


@pytest.mark.asyncio
async def test_an_entry_left_before_another_migration_never_runs_the_guest_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", SourceEntry)
    # The process is still there, as a QEMU kept after its guest has moved on is.
    journal.write("stuck", entry(pid=os.getpid(), pid_started=process_started(os.getpid())))
    agent, begun = agent_of(tmp_path)
    await agent.start(StartRequest(guest=HELLO.guest, to="127.0.0.1:7440"))
    assert len(begun) == 1
    # That migration was completed and left nothing; then the agent is started anew.
    again, revived = agent_of(tmp_path)
    await again._take_back()  # what `run` begins with
    (migration,) = revived
    assert migration._legacy.superseded  # what rollback.after_restart is told
