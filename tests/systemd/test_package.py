"""The Debian package on two booted machines: installed, upgraded in the middle of a migration, and removed."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.demo.pair import short_directory
from package import deb
from tests.packages.conftest import debian_packages, suite_under_test
from tests.packages.dockerfile import Stage
from tests.rig import supervisor, trees
from tests.rig.trees import TreeUnavailableError
from tests.systemd.conftest import Machines, MakeGuest
from tests.systemd.machine import MachineUnavailableError, booted
from tests.systemd.test_units import post_copy
from tests.systemd.units import UnitAgent

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(600),  # the first one fetches the packages, and may make a Debian tree
]
#: dpkg may take its time: the 64 MiB of a guest take ten minutes.
DRAIN = "100kB"
Packages = tuple[Path, Path]


@pytest.fixture(scope="module")
def packages() -> Packages:
    """Two revisions of the package, the older one first."""
    return debian_packages()


def missing_packages(package: Path, directory: Path) -> list[Path]:
    """Fetch what the package depends on and the tree of this release lacks: the tree has no apt to do so."""
    suite = suite_under_test()
    query = ["dpkg-query", f"--admindir={trees.tree(suite) / 'var/lib/dpkg'}", "--show", "--showformat=${Package}\\n"]
    present = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
    fields = ["dpkg-deb", "--show", "--showformat=${Depends}", str(package)]
    depends = subprocess.run(fields, check=True, capture_output=True, text=True).stdout
    # A library may have been renamed since, and what replaces it says so.
    names = {item.split()[0] for item in depends.split(",")}
    missing = sorted(name for name in names if not {name, f"{name}t64"} & set(present))
    if not missing:
        return []
    image = Stage(directory / "apt", trees.image(suite))
    image.run("sh", "-euc", 'apt-get --quiet update; cd /srv; apt-get --quiet download "$@"', "sh", *missing)
    return sorted((image.files / "srv").glob("*.deb"))


@pytest.fixture(scope="module")
def machines(packages: Packages) -> Iterator[Machines]:
    """Two machines with the older package."""
    suite = suite_under_test()
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(supervisor.directory("mgp-", short_directory()))
        try:
            needed = missing_packages(packages[0], shared)
            made = [stack.enter_context(booted(name, suite, shared, *needed, packages[0])) for name in "ab"]
        except (TreeUnavailableError, MachineUnavailableError) as error:
            pytest.skip(str(error))
        yield made[0], made[1]


def test_nothing_runs_and_nothing_is_open_to_others_after_the_installation(machines: Machines) -> None:
    machine = machines[0]
    for unit in deb.units(".service", ".socket"):
        shown = machine.show(unit, "LoadState", "ActiveState", "UnitFileState")
        assert (shown["LoadState"], shown["ActiveState"]) == ("loaded", "inactive")
        assert shown["UnitFileState"] in {"disabled", "static"}
    assert machine.run("migrated", "--version").startswith("migrated ")
    assert stat.S_IMODE(machine.path("/etc/migrated").stat().st_mode) == 0o750
    assert stat.S_IMODE(machine.path("/etc/migrated/target.toml").stat().st_mode) == 0o640
    assert machine.run("getent", "group", "migrated")


def test_every_module_is_compiled_and_none_is_changed(machines: Machines) -> None:
    site = machines[0].path("/usr/lib/migrated/lib")
    modules = {path for path in site.rglob("*.py") if "migrated" in path.relative_to(site).parts[2:3]}
    compiled = {path.parents[1] / f"{path.name.partition('.')[0]}.py" for path in site.rglob("*.pyc")}
    assert modules <= compiled
    verified = machines[0].dpkg("--verify", "migrated", check=False).splitlines()
    # The tree has no documents, of whichever package.
    assert not [line for line in verified if not re.match(r"missing +/usr/share/(doc|man)", line)]


def test_an_upgrade_that_could_not_read_a_journal_is_refused(machines: Machines, packages: Packages) -> None:
    journal = machines[0].path("/run/migrated/source/journal/1.journal")
    journal.parent.mkdir(parents=True)
    try:
        journal.write_text('0123\n{"version":1,"boot_id":"0","entry":{}}\n')
        with pytest.raises(AssertionError, match=r"1\.journal is of version 1, and this package reads"):
            machines[0].dpkg("--install", str(packages[1]))
    finally:
        shutil.rmtree(journal.parents[1])
    shown = machines[0].run("dpkg-query", "--show", "--showformat=${Status} ${Version}", "migrated")
    assert re.fullmatch(r"install ok installed .*-1\+deb\d+", shown)
    assert list(machines[0].path("/usr/lib/migrated").rglob("*.pyc"))


async def restarted(agent: UnitAgent, package: Path) -> None:
    """Install another revision; its agent runs when dpkg returns, or a moment later."""
    former = agent.pid
    await asyncio.to_thread(agent.machine.dpkg, "--install", str(package))
    await agent.restarted(former)


async def test_agents_are_upgraded_while_a_guest_is_in_post_copy(
    machines: Machines, packages: Packages, unit_guest: MakeGuest
) -> None:
    async with post_copy(unit_guest, drain=DRAIN) as state:
        for agent in (state.target, state.source):
            await restarted(agent, packages[1])
            version = agent.machine.run("dpkg-query", "--show", "--showformat=${Version}", "migrated")
            assert "-2+" in version
        assert await state.lacking() > 0


async def test_the_package_stays_while_a_guest_needs_its_agent(machines: Machines, unit_guest: MakeGuest) -> None:
    async with post_copy(unit_guest, drain=DRAIN) as state:
        for agent in (state.source, state.target):
            former = agent.pid
            with pytest.raises(AssertionError, match=f"needs the {agent.role} agent"):
                await asyncio.to_thread(agent.machine.dpkg, "--remove", "migrated")
            assert agent.pid == former
        assert await state.lacking() > 0


async def test_a_guest_that_has_arrived_runs_on_without_the_package(
    machines: Machines, packages: Packages, unit_guest: MakeGuest
) -> None:
    async with unit_guest() as guest:
        before = await guest.console.stats()
        await guest.move()
        machine = machines[1]
        await asyncio.to_thread(machine.dpkg, "--remove", "migrated")
        for unit in deb.units(".service", ".socket"):
            assert machine.show(unit, "LoadState")["LoadState"] == "not-found"
        assert not machine.path("/usr/lib/migrated").exists()
        assert machine.path("/etc/migrated/target.toml").exists()
        await asyncio.to_thread(machine.dpkg, "--purge", "migrated")
        assert not machine.path("/etc/migrated").exists()
        assert not machine.path("/run/migrated/source").exists()
        await guest.assert_sound(before)
        machine.install_packages(packages[1])
