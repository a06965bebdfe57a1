"""The diagonal on real guests: QEMU, its agents in namespaces, a link that is really cut, agents that are really killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.guests.conftest import fast_accel, machine, page_pool  # noqa: F401 - fixtures
from tests.rig.guest import MIB, MovingGuest, moving_guest
from tests.rig.namespaces import Namespaces, ip, namespaces
from tests.rig.reconnects import check_record

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("page_pool"),
]

LOAD: dict[str, str | int] = {"rate": 1000, "pattern": "hot", "sweep_seconds": 0}
HEARTBEAT_LIMIT = 3.0
CONFIG: dict[str, Any] = {
    "timeouts": {
        "heartbeat_interval": 0.5,
        "heartbeat_limit": HEARTBEAT_LIMIT,
        "reconnect_interval": 0.1,
        "connect": 2.0,
    }
}
SLOW_DRAIN = "4MB"
#: Where the first QEMU has the guest's memory.
MEMORY: dict[str, dict[str, Any]] = {
    "private": {"memory": "private", "page_bytes": (4096, 2 * MIB)},
    "memfd": {"page_bytes": (2 * MIB, 2 * MIB)},
}
#: Of the ten that the heartbeats' limit is by default; TCP, which tries ever more rarely, needs some of them.
STALL_SECONDS = 4.0


@pytest.fixture(params=MEMORY)
def memory(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MEMORY[request.param]


@pytest.fixture
def link() -> Iterator[Namespaces]:
    with namespaces() as pair:
        yield pair


def switch(link: Namespaces, state: str) -> None:
    """Pull the cable, or put it in: the address stays."""
    device = "veth0"
    for line in ip("-n", link.names[0], "-o", "link", "show", "type", "veth").splitlines():
        device = line.split(": ")[1].split("@")[0]
    ip("-n", link.names[0], "link", "set", device, state)


async def in_postcopy(guest: MovingGuest) -> str:
    migration = await guest.begin(mode="postcopy", drain_bandwidth=SLOW_DRAIN)
    source = await guest.here.source()
    assert (await source.wait(migration, "postcopy"))["state"] == "postcopy"
    return migration


async def faster(guest: MovingGuest, migration: str) -> None:
    source = await guest.here.source()
    await source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0"})


def hosts(link: Namespaces) -> tuple[dict[str, Any], ...]:
    return tuple({**host, "config": CONFIG} for host in link.hosts)


async def test_a_cut_link_pauses_a_postcopy_which_goes_on_when_it_is_back(
    link: Namespaces,
    fast_accel: str,  # noqa: F811
    memory: dict[str, Any],
) -> None:
    async with moving_guest(
        kind="boot", accel=fast_accel, load=LOAD, memory_bytes=128 * MIB, **memory, hosts=hosts(link)
    ) as guest:
        before = await guest.console.stats()
        migration = await in_postcopy(guest)
        source, target = await guest.here.source(), await guest.there.target()
        switch(link, "down")
        for agent in (source, target):
            assert (await agent.wait(migration, "postcopy-paused", limit_seconds=60))["state"] == "postcopy-paused"
        switch(link, "up")
        assert (await source.wait(migration, "postcopy", limit_seconds=60))["state"] in ("postcopy", "completed")
        await faster(guest, migration)
        await guest.arrive(migration)
        check_record(await source.record(migration), heartbeat_limit=HEARTBEAT_LIMIT, least=1)
        await guest.assert_sound(before)


async def test_a_cut_link_in_precopy_leaves_the_guest_where_it_is(
    link: Namespaces,
    fast_accel: str,  # noqa: F811
    memory: dict[str, Any],
) -> None:
    async with moving_guest(
        kind="boot", accel=fast_accel, load=LOAD, memory_bytes=128 * MIB, **memory, hosts=hosts(link)
    ) as guest:
        before = await guest.console.stats()
        migration = await guest.begin(mode="hybrid", max_bandwidth="2MB")
        source, target = await guest.here.source(), await guest.there.target()
        assert (await source.wait(migration, "precopy"))["state"] == "precopy"
        switch(link, "down")
        for agent in (source, target):
            assert (await agent.wait(migration, limit_seconds=60))["state"] == "failed"
        switch(link, "up")
        await guest.alone()
        await guest.assert_sound(before)
        await guest.move(mode="hybrid")


@pytest.mark.parametrize("phase", ["precopy", "postcopy"])
async def test_a_link_that_is_away_for_some_seconds_is_waited_for(
    link: Namespaces,
    phase: str,
    fast_accel: str,  # noqa: F811
) -> None:
    """Within the limits, as they are where nobody sets them."""
    async with moving_guest(
        kind="boot", accel=fast_accel, load=LOAD, memory_bytes=128 * MIB, hosts=link.hosts
    ) as guest:
        before = await guest.console.stats()
        options = {"mode": "hybrid", "max_bandwidth": SLOW_DRAIN} if phase == "precopy" else {}
        migration = await guest.begin(**options) if options else await in_postcopy(guest)
        source, target = await guest.here.source(), await guest.there.target()
        assert (await source.wait(migration, phase))["state"] == phase
        switch(link, "down")
        await asyncio.sleep(STALL_SECONDS)
        switch(link, "up")
        await source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0", "max_bandwidth": "0"})
        await guest.arrive(migration)
        for agent in (source, target):
            seen = [change["state"] for change in (await agent.record(migration))["timeline"]]
            assert "postcopy-paused" not in seen, seen
        await guest.assert_sound(before)


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_an_agent_killed_in_postcopy_goes_on_when_it_is_started_again(
    link: Namespaces,
    victim: str,
    fast_accel: str,  # noqa: F811
    memory: dict[str, Any],
) -> None:
    async with moving_guest(
        kind="boot", accel=fast_accel, load=LOAD, memory_bytes=128 * MIB, **memory, hosts=hosts(link)
    ) as guest:
        before = await guest.console.stats()
        migration = await in_postcopy(guest)
        agent = await (guest.here.source() if victim == "source" else guest.there.target())
        await agent.kill()
        await agent.start()
        source = await guest.here.source()
        async with asyncio.timeout(60):
            assert (await source.wait(migration, "postcopy"))["state"] in ("postcopy", "completed")
        await faster(guest, migration)
        await guest.arrive(migration)
        check_record(await source.record(migration), heartbeat_limit=HEARTBEAT_LIMIT, least=1)
        await guest.assert_sound(before)


async def test_private_memory_that_goes_with_its_qemu_is_lost_by_name(fast_accel: str) -> None:  # noqa: F811
    """Nobody else can hold private memory: the migration ends with an error of its own, and does not dial for ever."""
    async with moving_guest(
        kind="boot", accel=fast_accel, load=LOAD, memory_bytes=128 * MIB, **MEMORY["private"]
    ) as guest:
        (left,) = guest.pids
        migration = await in_postcopy(guest)
        os.kill(left, signal.SIGKILL)
        source, target = await guest.here.source(), await guest.there.target()
        record = await source.wait(migration, limit_seconds=60)
        assert (record["state"], record["error"]["code"]) == ("failed", "guest-memory-lost"), guest.explain(record)
        assert (await target.wait(migration, "postcopy-paused", limit_seconds=60))["state"] == "postcopy-paused"
        (arrived,) = guest.pids
        os.kill(arrived, signal.SIGKILL)
        assert (await target.wait(migration, limit_seconds=60))["error"]["code"] in {"guest-died", "guest-gone"}
