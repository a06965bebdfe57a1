"""What the hosts and the guests themselves can lack or do: pools, disks, descriptors, memory, guests that misbehave."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Rigs
from tests.faults.rig import Rig, rig
from tests.rig import supervisor

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


async def fails_here(made: Rig, **options: Any) -> dict[str, Any]:
    """A migration that must fail and leave the guest where it is; its error."""
    guest = await made.sound()
    record = await made.migrate(**options)
    assert record["state"] == "failed", f"{record}\n{made.logs()}"
    assert await made.sound() == guest
    error: dict[str, Any] = record["error"]
    assert error["message"]
    return error


async def moves(made: Rig) -> None:
    """A migration that must do."""
    guest = await made.sound()
    record = await made.migrate(mode="hybrid", downtime_limit_ms=300.0)
    assert record["state"] == "completed", f"{record}\n{made.logs()}"
    assert await made.sound() != guest


@contextlib.asynccontextmanager
async def dropped_on_failure(rigs: Rigs, made: Rig) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await rigs.drop(made)
        raise


@pytest.mark.parametrize("word", ["exit", "hang", "fail-restore", "die-restore", "stuck-restore"])
async def test_an_incoming_guest_that_fails_leaves_the_guest_at_its_source(rigs: Rigs, word: str) -> None:
    made = await rigs.get(timeouts=None)
    async with dropped_on_failure(rigs, made):
        made.misbehave(word)
        try:
            await fails_here(made, mode="hybrid", downtime_limit_ms=300.0)
        finally:
            made.misbehave("")
        await moves(made)


@pytest.mark.parametrize("word", ["stuck", "fail-save"])
@pytest.mark.parametrize("mode", ["hybrid", "postcopy"])
async def test_a_guest_that_does_not_pause_or_save_is_not_moved_and_runs_on(rigs: Rigs, word: str, mode: str) -> None:
    made = await rigs.get(timeouts=None)
    async with dropped_on_failure(rigs, made):
        guest = await made.sound()
        await made.ask(guest, f"behave {word}")
        record = await made.migrate(mode=mode, downtime_limit_ms=300.0)
        assert record["state"] == "failed", record
        await made.ask(guest, "behave well")
        if word == "stuck":
            # It did not answer the request to run on either: that is said, and kept for the agent's next start.
            assert record["error"]["code"] == "guest-not-resumed", record
            await made.source.kill()
            await made.restart(made.source)
        assert await made.sound() == guest
        await moves(made)


@pytest.mark.parametrize("word", ["die-pause", "die-save"])
async def test_a_guest_that_dies_when_it_is_to_leave_is_told_of_and_leaves_nothing(rigs: Rigs, word: str) -> None:
    made = await rigs.get(timeouts=None)
    async with dropped_on_failure(rigs, made):
        guest = await made.sound()
        await made.ask(guest, f"behave {word}")
        record = await made.migrate(mode="hybrid", downtime_limit_ms=300.0)
        assert record["state"] == "failed", record
        assert record["error"]["code"] in ("guest-died", "guest-connection-lost"), record["error"]
        await made.clean(guests=0)
        await made.start_guest()
        await moves(made)


def address_space(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two pages."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", where], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("no tmpfs may be mounted here")
    with supervisor.undoing("umount", "-l", str(where)):
        try:
            yield where
        finally:
            subprocess.run(["umount", "-l", where], check=False)


def fill(disk: Path) -> Path:
    """Leave no room."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass
    return ballast


@pytest.mark.parametrize("role", ["source", "target"])
async def test_a_journal_that_cannot_be_written_ends_the_migration_before_the_guest_is_touched(
    guest_program: Path, tiny_disk: Path, role: str
) -> None:
    options: dict[str, Any] = {f"{role}_journal_dir": tiny_disk}
    async with rig(guest_program, **options) as made:
        ballast = fill(tiny_disk)
        error = await fails_here(made, mode="hybrid", downtime_limit_ms=300.0)
        assert error["code"] == "journal", error
        ballast.unlink()
        await moves(made)


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("spare", [2, 6, 12])
async def test_an_agent_out_of_descriptors_lives_on(rigs: Rigs, role: str, spare: int) -> None:
    made = await rigs.get(timeouts=None)
    async with dropped_on_failure(rigs, made):
        guest = await made.sound()
        agent = made.source if role == "source" else made.target
        before = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)
        used = sum(made.baseline[role].values())
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (used + spare, before[1]))
        try:
            body = {"guest": "vm", "to": made.proxy.address, "mode": "hybrid"}
            made.migration = ""
            with contextlib.suppress(Exception):  # perhaps not even the control socket can be answered
                made.migration = str((await made.source.request("POST", "/v1/migrations", body))["id"])
            if made.migration:
                with contextlib.suppress(Exception):
                    await made.source.wait(made.migration, limit_seconds=5)
        finally:
            resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, before)
        record = await made.over()
        now = await made.sound()
        assert (now != guest) == (record.get("state") == "completed"), record
        await moves(made)


@pytest.mark.parametrize("role", ["source", "target"])
async def test_an_agent_out_of_memory_for_its_tables_lives_on(rigs: Rigs, role: str) -> None:
    made = await rigs.get(timeouts=None)
    async with dropped_on_failure(rigs, made):
        agent = made.source if role == "source" else made.target
        before = resource.prlimit(agent.pid, resource.RLIMIT_AS)
        size = address_space(agent.pid)
        # Room for what Python needs, none for the guest's 16 MiB mapped once more.
        resource.prlimit(agent.pid, resource.RLIMIT_AS, (size + (8 << 20), before[1]))
        try:
            await fails_here(made, mode="hybrid", downtime_limit_ms=300.0)
        finally:
            resource.prlimit(agent.pid, resource.RLIMIT_AS, before)
        await moves(made)
