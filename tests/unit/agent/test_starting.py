"""The control socket answers before what an agent left has been taken back: until then no order may touch a guest."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrated import config
from migrated.agent import archive
from migrated.agent.archive import Archive
from migrated.agent.record import Record, State
from migrated.agent.requests import StartRequest
from migrated.errors import ConflictError
from migrated.guests.access.pidfd import process_started
from migrated.recovery.journal import Journal, SourceEntry, TargetEntry
from migrated.recovery.state import LeftoverMigrations
from migrated.source.agent import SourceAgent
from migrated.target.agent import TargetAgent
from tests.unit.recovery.entries import HELLO, SOURCE, TARGET

ID = HELLO.session.hex()
PATIENCE_SECONDS = 20.0


@pytest.fixture
def pid() -> Iterator[int]:
    """Of the guest that was left."""
    with subprocess.Popen(["sleep", "1000"]) as started:
        yield started.pid
        started.kill()


def agent_of(directory: Path, role: config.Role, pid: int) -> SourceAgent | TargetAgent:
    """Its predecessor has left a migration whose process lives, and a record of it."""
    table: dict[str, Any] = {"agent": {"state_dir": str(directory)}, "tls": {"insecure": True}}
    alive = {"pid": pid, "pid_started": process_started(pid)}
    if role == "source":
        table["guests"] = {HELLO.guest: {"driver": "process", "socket": str(directory / "guest.sock")}}
        Journal(directory / "journal", SourceEntry).write(
            ID, msgspec.structs.replace(SOURCE, stage="committed", **alive)
        )
    else:
        table["listen"] = {"address": "127.0.0.1:0"}
        Journal(directory / "journal", TargetEntry).write(ID, msgspec.structs.replace(TARGET, **alive))
    former = Record(id=ID, guest=HELLO.guest, role=role, mode="hybrid", state=State.FAILED, ended_at=1.0)
    Archive(directory / archive.NAME, keep=10).add(former)
    settings = config.decode(table, role)
    return SourceAgent(settings) if role == "source" else TargetAgent(settings)


@pytest.mark.parametrize("began", [False, True], ids=["before-run", "while-taking-back"])
@pytest.mark.parametrize(
    ("role", "verb"),
    [("source", "start"), *((role, verb) for role in ("source", "target") for verb in ("force_run", "discard"))],
)
async def test_an_order_that_comes_too_soon_is_refused_and_changes_nothing(
    tmp_path: Path, pid: int, role: config.Role, verb: str, began: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(tmp_path, role, pid)
    before = {path.name: path.read_bytes() for path in (tmp_path / "journal").iterdir()}
    taking, stop = asyncio.Event(), asyncio.Event()

    async def held(_: LeftoverMigrations[Any]) -> list[Any]:
        taking.set()
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(LeftoverMigrations, "take", held)
    running = asyncio.ensure_future(agent.run(stop) if began else asyncio.sleep(0))
    try:
        if began:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await taking.wait()
        order = (
            agent.start(StartRequest.model_validate({"guest": HELLO.guest, "to": "b:1"}))
            if verb == "start"
            else getattr(agent, verb)(ID, confirm=HELLO.guest)
        )
        with pytest.raises(ConflictError) as caught:
            await order
        assert caught.value.code == "starting"
        assert caught.value.hint
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "journal").iterdir()} == before
    assert not [record for record in agent.records() if not record.ended]
