"""A process left by a target agent that died: it stays known until it is gone, however long the kernel holds it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from migrated import config
from migrated.agent.record import State
from migrated.errors import GuestRefusedError, HostError, TimeoutExceededError
from migrated.guests.access.pidfd import PidHandle, process_started
from migrated.recovery.journal import Journal, TargetEntry
from migrated.target.agent import TargetAgent
from tests.unit.recovery.entries import HELLO, TARGET

ID = HELLO.session.hex()
PATIENCE_SECONDS = 20.0


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as started:
        yield started
        started.kill()


async def one_agent(directory: Path, port: int = 0) -> TargetAgent:
    """It starts, takes back what there is, and is stopped."""
    listen = {"address": f"127.0.0.1:{port}"}
    table = {"agent": {"state_dir": str(directory)}, "tls": {"insecure": True}, "listen": listen}
    agent = TargetAgent(config.decode(table, "target"))
    stop = asyncio.Event()
    running = asyncio.ensure_future(agent.run(stop))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not agent.health().ready:
            assert not running.done(), running.result()
            await asyncio.sleep(0.01)
        stop.set()
        await running
    return agent


async def test_it_stays_in_the_journal_until_an_agent_has_seen_it_end(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", TargetEntry)
    entry = msgspec.structs.replace(TARGET, stage="setup", pid=process.pid, pid_started=process_started(process.pid))
    journal.write(ID, entry)

    async def stuck(_: PidHandle, limit_seconds: float) -> None:
        raise TimeoutExceededError(f"process {process.pid} has not ended within {limit_seconds:g} s")

    with monkeypatch.context() as patched:
        patched.setattr(PidHandle, "kill", stuck)
        agent = await one_agent(tmp_path)
    assert journal.load() == {ID: entry}
    record = agent.record(ID)
    assert record.state is State.FAILED
    assert record.error is not None
    assert "has not ended" in record.error.message
    await one_agent(tmp_path)
    assert process.wait(PATIENCE_SECONDS) != 0
    assert journal.load() == {}


async def test_a_guest_that_cannot_be_continued_waits_and_the_agent_starts(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", TargetEntry)
    entry = msgspec.structs.replace(
        TARGET, stage="committed", pid=process.pid, pid_started=process_started(process.pid)
    )
    journal.write(ID, entry)

    async def refuse(*_: object) -> None:
        raise GuestRefusedError("guest vm1 is not configured", hint="put its table back")

    monkeypatch.setattr(TargetAgent, "_revive", refuse)
    with capture_logs() as logs:
        await one_agent(tmp_path)
    (told,) = [line for line in logs if line["event"] == "cannot continue a migration of the previous agent"]
    assert told["error"] == "guest vm1 is not configured"
    assert "the guest waits" in told["hint"]
    assert process.poll() is None
    assert journal.load() == {ID: entry}


async def test_no_guest_is_touched_by_an_agent_that_cannot_listen(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    journal = Journal(tmp_path / "journal", TargetEntry)
    entry = msgspec.structs.replace(TARGET, stage="setup", pid=process.pid, pid_started=process_started(process.pid))
    journal.write(ID, entry)
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(HostError) as caught:
            await one_agent(tmp_path, port=other.getsockname()[1])
        assert caught.value.code == "cannot-listen"
    assert process.poll() is None
    assert journal.load() == {ID: entry}
