"""A guest process that its driver has let go of runs on, and is no zombie once it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from migrated.guests.pidfd import PidHandle
from migrated.waiting import within


def started(folder: Path) -> PidHandle:
    return PidHandle.spawn(["sleep", "600"], pass_fds=[], log=folder / "log")


def state(pid: int) -> str:
    """One letter; empty when nothing is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


async def collected(pid: int) -> None:
    async with within(10, "the exit status to be collected"):
        while state(pid):  # noqa: ASYNC110 - it is our own loop that collects it
            await asyncio.sleep(0.01)


async def test_a_child_let_go_of_runs_on_and_leaves_no_zombie_when_it_ends(
    tmp_path: Path, no_descriptor_left: None
) -> None:
    process = started(tmp_path)
    process.close()
    assert state(process.pid) not in {"", "Z"}
    os.kill(process.pid, signal.SIGKILL)
    await collected(process.pid)


async def test_a_child_that_ended_unseen_leaves_no_zombie(tmp_path: Path, no_descriptor_left: None) -> None:
    process = started(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.close()
    await collected(process.pid)


def test_a_child_whose_loop_has_ended_is_collected_when_the_next_is_started(tmp_path: Path) -> None:
    first = started(tmp_path)

    async def let_go() -> None:
        first.close()

    asyncio.run(let_go())
    os.kill(first.pid, signal.SIGKILL)
    while state(first.pid) != "Z":
        pass
    second = started(tmp_path)
    assert state(first.pid) == ""
    os.kill(second.pid, signal.SIGKILL)
    while second.poll() is None:
        pass
    second.close()
