"""Two booted machines, and a guest that moves between them."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from migrated.demo.pair import short_directory
from migrated.demo.qemu_guest import QemuGuest
from tests.rig import supervisor
from tests.rig.pages import PagesUnavailableError, more_pages
from tests.rig.trees import TreeUnavailableError
from tests.systemd.machine import Machine, MachineUnavailableError, booted
from tests.systemd.units import MIB, UnitAgent, UnitGuest, UnitHost

PAGE_BYTES = 2 * MIB
#: Of source and target together, and some for a guest that the test before has just left.
POOL_BYTES = 512 * MIB
Machines = tuple[Machine, Machine]
Agents = tuple[UnitAgent, UnitAgent]
MakeGuest = Callable[..., AbstractAsyncContextManager[UnitGuest]]


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """Two machines of this Debian release; a skip says why there are none."""
    suite = os.environ.get("MIGRATED_TEST_SUITE") or platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(supervisor.directory("mgs-", short_directory()))
        try:
            made = [stack.enter_context(booted(name, suite, shared)) for name in "ab"]
        except (TreeUnavailableError, MachineUnavailableError) as error:
            pytest.skip(str(error))
        yield made[0], made[1]


@pytest.fixture
def huge_page_pool(machines: Machines) -> Iterator[None]:
    """The pool is one for all: it is raised from outside."""
    try:
        with more_pages(POOL_BYTES // PAGE_BYTES, PAGE_BYTES):
            yield
    except PagesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
async def agents(machines: Machines) -> AsyncIterator[Agents]:
    """Source and target agent of the first machine, not running yet, without guests."""
    with supervisor.directory("a-", str(machines[0].shared)) as directory:
        host = UnitHost(directory, machines[0].name, machines[0])
        try:
            yield host.units["source"], host.units["target"]
        finally:
            await host.stop()


@pytest.fixture
def unit_guest(machines: Machines, huge_page_pool: None) -> MakeGuest:
    """``async with unit_guest() as guest``: booted on the first machine, no agent running yet."""

    @contextlib.asynccontextmanager
    async def make(config: dict[str, Any] | None = None, *, extra: tuple[str, ...] = ()) -> AsyncIterator[UnitGuest]:
        with supervisor.directory("g-", str(machines[0].shared)) as directory:
            guest = QemuGuest(
                directory=directory,
                cache=directory,  # which any user can be let into
                name="vm",
                program="qemu-system-x86_64",  # the machine's own, whatever other tests use
                kind="boot",
                accel="tcg",
                memory_bytes=64 * MIB,
                page_bytes=PAGE_BYTES,
                memory="private",
                # A page every few seconds: post-copy is over when a test lets it, not when the guest has touched everything.
                extra=extra,
                load={"rate": 200, "pattern": "dense", "sweep_seconds": 0},
            )
            hosts = tuple(UnitHost(directory, machine.name, machine, config) for machine in machines)
            moving = UnitGuest(guest, (hosts[0], hosts[1]), PAGE_BYTES)
            try:
                await moving.start()
                yield moving
            finally:
                await moving.stop()

    return make
