"""Guests that an agent has started under a real systemd: each in a unit of its own, which the agent's never touches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from migrated.privileged import open_files
from tests.systemd.conftest import MakeGuest
from tests.systemd.units import UnitGuest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(400),  # the first one may make a Debian tree
]

NOBODY = 65534


def cgroup(pid: int) -> str:
    """That of systemd's own hierarchy."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.split(":", 2)[2] for line in lines if line.split(":")[1] in {"", "name=systemd"})


def status(pid: int) -> dict[str, list[str]]:
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.split() for name, value in lines}


def inherited(pid: int) -> dict[str, str]:
    raw = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0")
    return dict(variable.split("=", 1) for variable in raw.split("\0"))


def files(pid: int) -> set[str]:
    return set(open_files(pid).values())


def configure(guest: UnitGuest, **keys: Any) -> None:
    """Add keys to the guest's table on the host to which it moves next."""
    guest.there.target_guests[guest.name] |= keys


async def test_a_guest_has_a_unit_of_its_own_which_outlives_its_agent(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        configure(guest, slice="guests.slice", nice=3)
        await guest.move()
        (pid,) = guest.pids
        path = cgroup(pid)
        assert re.search(r"/guests\.slice/migrated-guest-vm-[0-9a-f]{8}\.service$", path)
        assert not {"NOTIFY_SOCKET", "MIGRATED_TEST_RUN", "RUNTIME_DIRECTORY"} & inherited(pid).keys()
        assert not [name for name in files(pid) if "ledger" in name or re.search(r"/run/migrated.*(?<!\.log)$", name)]
        former = guest.target.pid
        before = await guest.console.stats()
        await guest.target._systemctl("restart")
        assert guest.target.pid != former
        await guest.target.stop()
        assert guest.pids == [pid]
        assert cgroup(pid) == path
        assert int(status(pid)["NSpid"][-1]) not in {0, former}
        await guest.assert_sound(before)


async def test_a_guest_with_a_user_of_its_own_moves_and_has_no_privileges(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        guest.machine.shared.chmod(0o711)
        guest.directory.chmod(0o777)  # for the console's socket
        configure(guest, user="nobody", groups=["daemon"])
        before = await guest.console.stats()
        migration = await guest.begin(mode="postcopy", drain_bandwidth="1MB")
        record = await guest.source.wait(migration, "postcopy")
        assert record["state"] == "postcopy", guest.explain(record)
        await guest.target.wait(migration, "postcopy")
        await guest.target.kill()  # the next agent reaches what belongs to that user as well
        await guest.source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0"})
        await guest.arrive(migration)
        await guest.assert_sound(before)
        (pid,) = guest.pids
        found = status(pid)
        assert {*map(int, found["Uid"])} == {*map(int, found["Gid"])} == {NOBODY}
        assert {1, NOBODY} == {*map(int, found["Groups"])}
        assert found["NoNewPrivs"] == ["1"]
        assert {int(found[f"Cap{kind}"][0], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
