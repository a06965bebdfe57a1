"""The same on other versions of QEMU than this machine's, and from an older version to a newer one.

The other versions are those of other Debian releases (tests/rig/trees.py).  `make test-interop` runs all tests of guests on
each of them; these are the ones that every test run makes.
"""

from __future__ import annotations

import platform
import subprocess

import pytest

from tests.guests.conftest import KVM
from tests.guests.test_migration import GUESTS, MEMORY
from tests.rig import trees
from tests.rig.guest import moving_guest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(900),  # the first test of a release may fetch it
    pytest.mark.usefixtures("page_pool"),
]

OTHERS = [suite for suite in trees.SUITES if suite != platform.freedesktop_os_release().get("VERSION_CODENAME")]
UPWARD = [("bookworm", "trixie", "hybrid"), ("trixie", "sid", "postcopy")]
#: Of the matrix in test_migration.py.
DIAGONAL = [
    ("linux-tcg", "private", "hybrid"),
    ("linux-tcg", "memfd-4k", "precopy"),
    ("boot-kvm", "memfd-2m", "postcopy"),
]


def qemu(suite: str) -> str:
    try:
        return str(trees.qemu(suite))
    except trees.TreeUnavailableError as error:
        pytest.skip(f"no QEMU of {suite}: {error}")


def machine_type(program: str) -> str:
    """What ``q35`` means to this version."""
    for line in subprocess.run(
        [program, "-machine", "help"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        name, _, described = line.partition(" ")
        if name == "q35":
            return described.rpartition("(alias of ")[2].rstrip(")")
    raise AssertionError


@pytest.mark.parametrize(("guest", "memory", "mode"), DIAGONAL)
@pytest.mark.parametrize("suite", OTHERS)
async def test_a_guest_of_another_version_arrives_whole_and_comes_back(
    suite: str, guest: str, memory: str, mode: str
) -> None:
    if guest == "boot-kvm" and not KVM.exists():
        pytest.skip(f"{KVM} is not there")
    shape = {**GUESTS[guest], **MEMORY[memory]}
    async with moving_guest(**shape, program=qemu(suite)) as moving:
        await moving.move(mode=mode, downtime_limit_ms=2000)
        await moving.move(mode=mode, downtime_limit_ms=2000)


@pytest.mark.parametrize(("older", "newer", "mode"), UPWARD)
async def test_a_guest_moves_up_to_a_newer_version(older: str, newer: str, mode: str) -> None:
    # ``-cpu max`` is another processor in each version.
    shape = {**GUESTS["linux-tcg"], **MEMORY["private"], "extra": ("-cpu", "qemu64")}
    machine = machine_type(qemu(trees.SUITES[0]))  # one for the whole way up
    async with moving_guest(**shape, program=qemu(older), target_program=qemu(newer), machine=machine) as moving:
        move = await moving.move(mode=mode, downtime_limit_ms=2000)
        assert move.source["state"] == "completed"
