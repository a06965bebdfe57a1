"""The agents under a real systemd: guests arrive, and whatever happens to an agent, they survive it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.systemd.conftest import Agents, Machines, MakeGuest
from tests.systemd.units import PATIENCE_SECONDS, UnitGuest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(400),  # the first one may make a Debian tree
]

ROLES = ["source", "target"]
HELPER = "migrated-helper.service"
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SYS_PTRACE, CAP_SYS_ADMIN = 0, 1, 3, 5, 19, 21


class PostCopy:
    """A guest that has just been switched over to the second machine, and most of its memory has not."""

    def __init__(self, guest: UnitGuest, migration: str) -> None:
        self.migration = migration
        self.source, self.target = guest.source, guest.target

    async def lacking(self) -> int:
        """Bytes that are still to come."""
        return int((await self.target.record(self.migration))["remaining_bytes"])

    async def hurry(self) -> None:
        """Let the rest come."""
        record = await self.source.wait(self.migration, "postcopy")
        if record["state"] == "postcopy":
            await self.source.request("POST", f"/v1/migrations/{self.migration}/set", {"drain_bandwidth": "0"})


@contextlib.asynccontextmanager
async def post_copy(
    unit_guest: MakeGuest, config: dict[str, Any] | None = None, *, drain: str = "1MB"
) -> AsyncIterator[PostCopy]:
    """At the end of the block the rest comes, and the guest's memory is checked; until then it comes this slowly."""
    async with unit_guest(config) as guest:
        before = await guest.console.stats()
        migration = await guest.begin(mode="postcopy", drain_bandwidth=drain)
        await guest.source.wait(migration, "postcopy")
        await guest.target.wait(migration, "postcopy")
        state = PostCopy(guest, migration)
        assert await state.lacking() > 0
        yield state
        await state.hurry()
        await guest.arrive(migration)
        await guest.assert_sound(before)


async def test_a_qemu_guest_moves_between_units_there_and_back(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        await guest.move()
        await guest.move()


def seccomp(pid: int, root: Path = Path("/")) -> str:
    """The mode of a process: 2 if it is under a filter."""
    return (root / f"proc/{pid}/status").read_text().partition("Seccomp:")[2].split()[0]


def capabilities(pid: int, root: Path) -> set[int]:
    bits = int((root / f"proc/{pid}/status").read_text().partition("CapEff:")[2].split()[0], 16)
    return {number for number in range(64) if bits >> number & 1}


async def test_agents_are_confined_and_the_helper_only_in_what_it_may_do(agents: Agents) -> None:
    machine = agents[0].machine
    root = machine.path("/")
    for agent, more in zip(agents, (set(), {CAP_FOWNER}), strict=True):
        await agent.start()
        assert seccomp(agent.pid, root) == "2"
        assert capabilities(agent.pid, root) == {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_KILL} | more
        machine.run("systemd-analyze", "security", "--no-pager", "--threshold=40", agent.unit)
    machine.run("systemctl", "start", HELPER)
    helper = int(machine.show(HELPER, "MainPID")["MainPID"])
    assert seccomp(helper, root) == "0"
    assert capabilities(helper, root) == {CAP_DAC_OVERRIDE, CAP_SYS_PTRACE, CAP_SYS_ADMIN}


async def test_a_guest_with_a_filter_of_its_own_moves_between_confined_agents(unit_guest: MakeGuest) -> None:
    async with unit_guest(extra=("-sandbox", "on")) as guest:
        for _ in range(2):
            assert [seccomp(pid) for pid in guest.pids] == ["2"]
            await guest.move()
        assert [seccomp(pid) for pid in guest.pids] == ["2"]


async def test_the_filter_of_an_agent_does_not_reach_its_guests(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        await guest.move()
        assert [seccomp(pid) for pid in guest.pids] == ["0"]


async def test_a_helper_that_is_killed_is_started_again_when_it_is_needed(unit_guest: MakeGuest) -> None:
    async with post_copy(unit_guest) as state:
        for agent in (state.source, state.target):
            agent.machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", HELPER)
        former = state.target.pid
        await state.target.kill()
        await state.target.restarted(former)
    for agent in (state.source, state.target):
        assert agent.machine.show(HELPER, "ActiveState")["ActiveState"] == "active"


@pytest.mark.parametrize("role", ROLES)
async def test_a_killed_agent_has_its_descriptors_back_from_the_store(unit_guest: MakeGuest, role: str) -> None:
    async with post_copy(unit_guest) as state:
        agent = state.source if role == "source" else state.target
        former = agent.pid
        assert int(agent.show("NFileDescriptorStore")) > 0
        await agent.kill()
        await agent.restarted(former)
        assert await state.lacking() > 0
        for machine in (state.source.machine, state.target.machine):
            assert not [line for line in machine.processes().values() if "migrated.recovery.holder" in line]
    assert int(agent.show("NFileDescriptorStore")) == 0


async def test_the_watchdog_restarts_an_agent_that_hangs(machines: Machines, unit_guest: MakeGuest) -> None:
    # A stopped process does not take the watchdog's SIGABRT, so SIGKILL follows at once.
    with machines[1].drop_in("migrated-target.service", "WatchdogSec=5", "TimeoutAbortSec=1"):
        async with post_copy(unit_guest) as state:
            agent = state.target
            former = agent.pid
            await agent.signal("STOP")
            await agent.restarted(former)
            assert int(agent.show("NRestarts")) > 0


async def test_agents_that_are_stopped_serve_post_copy_to_its_end(unit_guest: MakeGuest) -> None:
    async with post_copy(unit_guest) as state:
        both = (state.source, state.target)
        stops = [asyncio.ensure_future(agent.stop()) for agent in both]
        for agent in both:
            await agent.reaches("deactivating")
        assert await state.lacking() > 0
        await state.hurry()
        await asyncio.gather(*stops)
        for agent in both:
            assert agent.show("Result") == "success"
            await agent.start()
            assert (await agent.record(state.migration))["state"] == "completed"


async def test_a_target_that_is_stopped_while_its_source_is_silent_goes_on_when_started(unit_guest: MakeGuest) -> None:
    """Debian 12's systemd empties the descriptor store at a stop."""
    async with post_copy(unit_guest, {"timeouts": {"heartbeat_limit": 5, "shutdown": 5}}) as state:
        await state.source.signal("STOP")
        await state.target.wait(state.migration, "postcopy-paused")
        await state.target.stop()
        await state.target.start()
        await state.source.signal("CONT")
        assert await state.lacking() > 0


async def test_an_agent_is_ready_when_its_sources_can_connect(agents: Agents) -> None:
    _, target = agents
    await target.start()
    host, _, port = target.table["listen"]["address"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS):
        pass


WRONG: dict[str, tuple[str, dict[str, Any] | None, str]] = {
    "no-file": ("target", None, "no such configuration file"),
    "key": ("target", {"limits": {"max_migration": 3}}, "limits.max_migration: no such key"),
    "guest-table": (
        "source",
        {"guests": {"vm": {"driver": "qemu", "qpm": "/x"}}},
        "source.toml: guests.vm.qpm: no such key",
    ),
    "guest-driver": (
        "target",
        {"guests": {"vm": {"driver": "xen"}}},
        "target.toml: guests.vm.driver: 'xen' is unknown",
    ),
    "address": (
        "target",
        {"listen": {"address": "192.0.2.1:7440"}, "tls": {"insecure": True, "trusted_network": True}},
        "target.toml: listen.address: cannot listen on 192.0.2.1:7440",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_configuration_ends_an_agent_once_with_status_2(agents: Agents, wrong: str) -> None:
    role, table, message = WRONG[wrong]
    agent = agents[ROLES.index(role)]
    if table is None:
        agent.config_path.unlink(missing_ok=True)
    else:
        agent.table.update(table)
    with pytest.raises(AssertionError, match="status 1"):  # systemctl's own
        await agent.start(configure=table is not None)
    await agent.reaches("failed")
    shown = agent.machine.show(agent.unit, "ExecMainStatus", "NRestarts", "Result")
    assert shown == {"ExecMainStatus": "2", "NRestarts": "0", "Result": "exit-code"}
    await agent.says(message)


async def test_an_agent_that_fails_is_started_again(agents: Agents) -> None:
    """Here: its port is taken for a while."""
    _, target = agents
    host, _, port = target.table["listen"]["address"].rpartition(":")
    with socket.create_server((host, int(port))):
        with pytest.raises(AssertionError, match="status 1"):
            await target.start()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while int(target.show("NRestarts")) < 2:  # noqa: ASYNC110 - systemd counts, and tells nobody
                await asyncio.sleep(0.1)
        await target.says("has the port")
    await target.reaches("active")
