from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from migrated import log, privileged
from migrated.memory.probe import SECCOMP_DIRECTIVES

SYSTEMD = Path(__file__).parents[3] / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))
HELPER = SYSTEMD / "migrated-helper.service"
AGENTS = [unit for unit in UNITS if unit != HELPER]
#: What a unit of an agent may have of `systemd-analyze security`, in tenths.
EXPOSURE = 40
#: Known from systemd 254 on; Debian 12 has 252, which says that it ignores them.
NEWER_KEYS = ("'FileDescriptorStorePreserve'",)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_units_pass_systemd_analyze_verify(unit: Path, tmp_path: Path) -> None:
    # The program is not installed where the unit looks for it: any executable will do for the check.
    for file in (*UNITS, *SYSTEMD.glob("*.socket")):
        (tmp_path / file.name).write_text(file.read_text().replace("/usr/local/bin/migrated", sys.executable))
    checked = tmp_path / unit.name
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(checked)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    complaints = [line for line in result.stderr.splitlines() if not any(key in line for key in NEWER_KEYS)]
    assert (result.returncode, complaints) == (0, [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", AGENTS, ids=lambda path: path.stem)
def test_an_agent_is_hardly_exposed(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE}", str(unit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr


@pytest.mark.parametrize("unit", AGENTS, ids=lambda path: path.stem)
def test_ending_an_agent_never_ends_a_guest(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    for line in ("KillMode=process", "OOMPolicy=continue", "RuntimeDirectoryPreserve=yes", "Type=notify"):
        assert line in lines
    assert any(line.startswith("FileDescriptorStoreMax=") for line in lines)


def test_the_helper_is_not_under_seccomp_and_its_unit_says_why() -> None:
    """A process under a filter may not suspend that of a guest."""
    text = HELPER.read_text()
    assert not {line.partition("=")[0] for line in text.splitlines()} & {*SECCOMP_DIRECTIVES, "SystemCallLog"}
    remarks = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert not [key for key in SECCOMP_DIRECTIVES if key not in remarks]


def test_ending_the_helper_never_ends_what_traces_a_guest() -> None:
    assert "KillMode=process" in HELPER.read_text().splitlines()


@pytest.mark.parametrize("unit", AGENTS, ids=lambda path: path.stem)
def test_an_agent_under_a_filter_uses_the_helper(unit: Path) -> None:
    lines = unit.read_text().splitlines()
    socket = (SYSTEMD / "migrated-helper.socket").read_text().partition("ListenSequentialPacket=")[2].split()[0]
    assert "SystemCallFilter=@system-service" in lines
    assert f"Environment={privileged.SOCKET}={socket}" in lines


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_every_capability_has_its_reason(unit: Path) -> None:
    text = unit.read_text()
    (capabilities,) = [
        line.partition("=")[2] for line in text.splitlines() if line.startswith("CapabilityBoundingSet=")
    ]
    remarks = "\n".join(line for line in text.splitlines() if line.startswith("# CAP_"))
    assert capabilities.split() == [word.rstrip(",") for word in remarks.split() if word.startswith("CAP_")]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_sysusers_is_understood() -> None:
    command = ["systemd-sysusers", "--dry-run", str(SYSTEMD / "migrated.sysusers.conf")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_secrets_never_reach_a_log() -> None:
    event = {"event": "hello", "token": b"abc", "peer": {"secret": "x", "name": "b"}}
    assert log.redact(None, "info", event) == {
        "event": "hello",
        "token": "(secret)",
        "peer": {"secret": "(secret)", "name": "b"},
    }
