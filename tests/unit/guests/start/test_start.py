"""A guest that is a child of the agent: as whom it runs, and what it finds."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from migrated.errors import ConfigError, GuestError, GuestRefusedError, MigratedError
from migrated.guests.process.config import ProcessTargetConfig
from migrated.guests.start import launcher
from migrated.guests.start.config import nodes
from migrated.guests.start.process import is_process_of, start, user_of
from migrated.settings import read

LIMIT_SECONDS = 60.0
HAS_NUMA = Path("/proc/self/numa_maps").exists()


def table(**keys: Any) -> ProcessTargetConfig:
    return read(ProcessTargetConfig, {"driver": "process", "command": ["true"], **keys}, "guests.vm")


async def output_of(
    directory: Path, command: Sequence[str], *, pass_fds: Sequence[int] = (), **keys: Any
) -> tuple[str, str]:
    """How a command ended that was started as a guest with these keys, and what it wrote."""
    home = directory / "state" / "guests" / "vm"
    home.mkdir(parents=True, exist_ok=True)
    for parent in (directory, *list(directory.parents)[:-2]):  # pytest's are closed to others
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode & 0o7777 | 0o011)
    log = home / "guest.log"
    process = await start("vm", command, table(**keys), pass_fds=pass_fds, output=log, limit_seconds=LIMIT_SECONDS)
    try:
        end = await process.wait(LIMIT_SECONDS)
    finally:
        process.signal(signal.SIGKILL)
        process.close()
    return end, log.read_text()


@pytest.mark.root
async def test_a_guest_with_a_user_has_no_privileges_and_nothing_of_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "1")
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)
    script = "cat /proc/self/status; ls -l /proc/self/fd; env; nice"
    try:
        end, text = await output_of(tmp_path, ["sh", "-c", script], user="nobody", groups=["daemon"], nice=5)
    finally:
        os.close(read_fd)
        os.close(write_fd)
    assert end == "exited with status 0", text
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {"65534"}
    assert set(fields["Gid"].split()) == {"65534"}
    assert set(fields["Groups"].split()) == {"1", "65534"}
    assert fields["NoNewPrivs"] == "1"
    for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"):
        assert int(fields[f"Cap{kind}"], 16) == 0, kind
    assert text.splitlines()[-1] == "5"
    assert "SECRET_OF_THE_AGENT" not in text
    assert "USER=nobody" in text
    assert "pipe:" not in text


@pytest.mark.root
async def test_a_guest_with_a_user_can_open_the_memory_it_is_given(tmp_path: Path) -> None:
    fd = os.memfd_create("migrated-test", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 4096)
        command = ["sh", "-c", f"printf written 1<>/proc/self/fd/{fd}"]
        end, text = await output_of(tmp_path, command, pass_fds=[fd], user="nobody")
        assert (end, text) == ("exited with status 0", "")
        assert os.pread(fd, 7, 0) == b"written"
    finally:
        os.close(fd)


@pytest.mark.root
async def test_a_guest_with_a_user_makes_its_sockets_in_a_directory_of_its_own(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(0o700)
    guests = state / "guests" / "vm"
    end, text = await output_of(tmp_path, ["sh", "-c", f"touch {guests}/made; ls {state}"], user="nobody")
    assert "exited with status" in end
    assert "Permission denied" in text  # it may pass the agent's directory, and not list it
    assert (guests / "made").stat().st_uid == 65534
    assert guests.stat().st_mode & 0o777 == 0o700


@pytest.mark.root
def test_a_process_of_another_user_is_not_the_guests() -> None:
    user = user_of("vm", table(user="nobody"))
    assert not is_process_of(os.getpid(), user)
    assert not is_process_of(2**22 + 1, user)
    assert is_process_of(os.getpid(), None)


@pytest.mark.skipif(not HAS_NUMA, reason="a kernel without NUMA")
async def test_a_numa_policy_is_the_guests(tmp_path: Path) -> None:
    end, text = await output_of(tmp_path, ["cat", "/proc/self/numa_maps"], numa_policy="bind:0")
    assert end == "exited with status 0", text
    assert "bind:0" in text


async def test_a_guest_without_keys_of_its_own_is_started_directly(tmp_path: Path) -> None:
    end, text = await output_of(tmp_path, ["sh", "-c", "echo $0; ulimit -n"])
    assert (end, text.split()) == ("exited with status 0", ["sh", str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])])


@pytest.mark.root
async def test_a_program_that_cannot_be_executed_is_in_the_guests_log(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/nowhere/interpreter\n")
    program.chmod(0o755)
    end, text = await output_of(tmp_path, [str(program)], user="nobody")
    assert end == "exited with status 1"
    assert f"cannot start {program}: " in text


async def test_a_program_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="there is no program /nowhere/qemu"):
        await output_of(tmp_path, ["/nowhere/qemu"])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"user": "no-such-user"}, "no user no-such-user"),
        ({"user": "nobody", "group": "no-such-group"}, "no group no-such-group"),
        ({"user": "nobody", "groups": ["no-such-group"]}, "no group no-such-group"),
        ({"groups": ["daemon"]}, "a group is given, but no user"),
    ],
)
def test_a_user_or_group_that_cannot_be_is_refused_before_anything_is_started(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(GuestRefusedError, match=words) as raised:
        user_of("vm", table(**keys))
    assert raised.value.code == "guest-user"


@pytest.mark.parametrize(
    "policy", ["bind", "bind:", "bind:1-0", "local:0", "preferred:0-1", "bind:0,", "bind:4096", "bind:0-9999999999"]
)
def test_a_numa_policy_that_cannot_be_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="numa_policy"):
        table(numa_policy=policy)


def test_nodes_of_a_policy() -> None:
    assert nodes("interleave:0-2,5") == [0, 1, 2, 5]
    assert nodes("local") == []


@pytest.mark.parametrize("name", ["guests", "a b.slice", "../x.slice", ".slice"])
def test_a_slice_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(MigratedError, match="slice"):
        table(slice=name)


def test_the_launcher_survives_systemd_which_replaces_variables_in_a_command_line() -> None:
    assert "$" not in Path(launcher.__file__).read_text()
