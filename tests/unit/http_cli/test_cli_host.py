from __future__ import annotations

import contextlib
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from migrated import config
from migrated.cli.host import check, inspect
from migrated.memory import defects, probe
from tests.rig.pki import Pki

MEMORY = """
import ctypes, mmap, os, sys
fd = os.memfd_create("guest")
os.ftruncate(fd, 32 << 20)
memory = mmap.mmap(fd, 32 << 20, flags=mmap.MAP_SHARED)
private = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def guest(program: str = MEMORY) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.communicate()


@pytest.fixture(autouse=True)
def findings(monkeypatch: pytest.MonkeyPatch) -> list[defects.Finding]:
    """What the kernel's probes are made to say."""
    found: list[defects.Finding] = []
    monkeypatch.setattr(defects, "findings", lambda *, hanging: [one for one in found if hanging or one.name != "hole"])
    return found


def need(*, ok: bool, needed: bool = True, role: str = "both") -> probe.Requirement:
    return probe.Requirement("userfaultfd", role, needed, ok, "something", "" if ok else "run as root")


@pytest.mark.parametrize(
    ("needs", "code"),
    [
        ([need(ok=True)], 0),
        ([need(ok=False)], 1),
        ([need(ok=False, needed=False)], 0),
        ([need(ok=True), need(ok=False, role="target")], 1),
    ],
)
def test_check_fails_exactly_when_a_need_does(
    monkeypatch: pytest.MonkeyPatch, needs: list[probe.Requirement], code: int
) -> None:
    monkeypatch.setattr(probe, "requirements", lambda: needs)
    result = CliRunner().invoke(check, standalone_mode=False)
    assert result.return_value == code
    assert ("run as root" in result.output) == any(not one.ok for one in needs)


def test_check_of_one_role_leaves_out_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "requirements", lambda: [need(ok=False, role="target"), need(ok=True, role="source")])
    assert CliRunner().invoke(check, ["--role", "source"], standalone_mode=False).return_value == 0


def test_check_of_this_very_host_as_json() -> None:
    result = CliRunner().invoke(check, ["--json"], standalone_mode=False)
    answer: dict[str, Any] = json.loads(result.output)
    assert answer["ok"] == (result.return_value == 0)
    assert {"name", "role", "needed", "ok", "found", "fix"} == set(answer["requirements"][0])


def test_check_tells_of_kernel_defects_and_fails_for_none(findings: list[defects.Finding]) -> None:
    findings += [
        defects.Finding("tracking of [2 MiB] pages", "source", "excludes", "not [reported]", "guests lose writes"),
        defects.Finding("unmapping", "target", "absent", "fine"),
        defects.Finding("hole", "source", "untested", "not tested"),
    ]
    told = CliRunner().invoke(check, standalone_mode=False).output
    assert "EXCLUDES" in told
    assert "not [reported]" in told
    assert "tracking of [2 MiB] pages: guests lose writes" in told
    assert "hole" not in told
    for arguments, names in (
        (["--role", "target"], ["unmapping"]),
        (["--role", "source", "--hanging"], ["tracking of [2 MiB] pages", "hole"]),
    ):
        result = CliRunner().invoke(check, ["--json", *arguments], standalone_mode=False)
        answer = json.loads(result.output)
        assert [one["name"] for one in answer["kernel_defects"]] == names
        assert result.return_value == (0 if answer["ok"] else 1)


def test_inspect_tells_shared_memory_from_private() -> None:
    with guest() as pid:
        result = CliRunner().invoke(inspect, [str(pid), "--json"], standalone_mode=False)
    assert result.return_value == 0
    answer: dict[str, Any] = json.loads(result.output)
    shared, private = answer["memory"]
    assert shared == {
        "file": "/memfd:guest (deleted)",
        "size_bytes": 32 << 20,
        "page_bytes": mmap.PAGESIZE,
        "shared": True,
        "movable": True,
        "reason": "",
    }
    assert (private["movable"], private["shared"], private["file"]) == (True, False, "(private memory)")
    assert private["size_bytes"] >= 64 << 20


def test_inspect_for_people() -> None:
    with guest() as pid:
        result = CliRunner().invoke(inspect, [str(pid)], standalone_mode=False)
    assert "/memfd:guest (deleted)" in result.output
    assert "32 MiB" in result.output


def test_inspect_of_private_memory_only() -> None:
    """What nearly every QEMU has."""
    program = MEMORY.replace("mmap.MAP_SHARED", "mmap.MAP_PRIVATE")
    with guest(program) as pid:
        result = CliRunner().invoke(inspect, [str(pid), "--json"], standalone_mode=False)
    answer: dict[str, Any] = json.loads(result.output)
    assert (answer["movable"], result.return_value) == (True, 0)
    assert sorted((row["file"], row["shared"], row["movable"]) for row in answer["memory"]) == [
        ("(private memory)", False, True),
        ("/memfd:guest (deleted)", False, True),
    ]


def test_a_name_without_a_table_is_a_mistake() -> None:
    result = CliRunner().invoke(inspect, ["1", "--name", "vm"])
    assert result.exit_code == 2


def test_inspect_of_a_process_that_is_gone_is_an_error() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    result = subprocess.run(
        [sys.executable, "-m", "migrated", "inspect", str(gone.pid)], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: process {gone.pid} has exited")


UNDER_SECCOMP = """
import ctypes, struct, sys
allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow)))
prctl = ctypes.CDLL(None).prctl
prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, ctypes.addressof(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
from migrated.cli import main
sys.argv = ["migrated", "check", "--json"]
sys.exit(main())
"""


def test_check_names_the_filter_it_is_under_and_what_makes_systemd_set_one() -> None:
    done = subprocess.run([sys.executable, "-c", UNDER_SECCOMP], capture_output=True, text=True)
    assert done.returncode == 1
    (found,) = [one for one in json.loads(done.stdout)["requirements"] if "seccomp" in one["name"]]
    assert (found["ok"], found["found"]) == (False, "this process is under one")
    assert "LockPersonality" in found["fix"]


@pytest.mark.parametrize(
    ("valid", "code", "mark"),
    [((-1, 365), 0, "valid until"), ((-1, 10), 0, "expires on"), ((-20, -10), 1, "expired on"), (None, 1, "tls.ca")],
    ids=["valid", "expires-soon", "expired", "missing"],
)
def test_check_looks_at_the_certificate_of_each_configured_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, valid: tuple[int, int] | None, code: int, mark: str
) -> None:
    monkeypatch.setattr(probe, "requirements", lambda: [need(ok=True)])
    monkeypatch.setattr(config, "CONFIG_DIRECTORY", tmp_path)
    pki = Pki(tmp_path)
    files = pki.write("target", valid=valid or (-1, 365))
    if valid is None:
        files.ca.unlink()
    tls = "\n".join(f'{key} = "{path}"' for key, path in files._asdict().items())
    (tmp_path / "target.toml").write_text(f"[tls]\n{tls}\n")
    (tmp_path / "source.toml").write_text("[tls]\ninsecure = true\n")
    shown = CliRunner().invoke(check, ["--json"], standalone_mode=False)
    assert shown.return_value == code
    rows = {row["name"]: row for row in json.loads(shown.output)["requirements"]}
    assert rows["certificate of the source agent"]["found"] == "none: tls.insecure"
    row = rows["certificate of the target agent"]
    assert mark in row["found"] + row["fix"]
    assert row["ok"] is (mark == "valid until")
    assert (row["found"] == "missing") is (valid is None)
    plain = CliRunner().invoke(check, [], standalone_mode=False)
    assert plain.return_value == code
