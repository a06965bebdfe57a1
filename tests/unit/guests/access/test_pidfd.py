"""A guest process outlives its driver and leaves no zombie, and is never confused with a later one of the same pid."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from migrated.errors import GuestError
from migrated.guests.access.pidfd import PidHandle, process_lives, process_started
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


def test_a_guest_inherits_nothing_that_is_between_the_agent_and_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could send READY and WATCHDOG in the agent's name, or close what the agent keeps."""
    ours = (
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "FDSTORE",
        "JOURNAL_STREAM",
        "INVOCATION_ID",
    )
    for name in (*ours, "LANG"):
        monkeypatch.setenv(name, "1")
    process = PidHandle.spawn(["env"], pass_fds=[], log=tmp_path / "log")
    while process.poll() is None:
        pass
    process.close()
    seen = {line.partition("=")[0] for line in (tmp_path / "log").read_text().splitlines()}
    assert {"LANG", "PATH"} <= seen
    assert seen.isdisjoint(ours)


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


# ---------------------------------------------------------------- still the same process?


def test_a_process_is_known_by_its_start(python: str) -> None:
    with subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = process_started(process.pid)
        assert started > 0
        assert process_lives(process.pid, started)
        assert not process_lives(process.pid, started + 1)  # another one with its number
        process.communicate(b"\n")
    assert not process_lives(process.pid, started)


def test_a_zombie_is_not_alive(python: str) -> None:
    with subprocess.Popen([python, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_started(process.pid) == 0


def test_a_process_may_have_any_name(python: str) -> None:
    """The name in /proc/PID/stat is bytes, parentheses and all."""
    code = "import sys; open('/proc/self/comm', 'wb').write(b'a) b \\xff'); print(flush=True); input()"
    with subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process_started(process.pid) > 0
        process.communicate(b"\n")


def test_no_process_is_not_alive() -> None:
    assert not process_lives(0, 0)
    assert process_started(1 << 22) == 0


def test_a_later_process_with_the_same_pid_is_not_attached(python: str, no_descriptor_left: None) -> None:
    with subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = process_started(process.pid)
        PidHandle.attach(process.pid, started=started).close()
        for other in (started + 1, 0):
            with pytest.raises(GuestError) as caught:
                PidHandle.attach(process.pid, started=other)
            assert caught.value.code == "guest-gone"
        process.communicate(b"\n")
