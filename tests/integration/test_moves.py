"""A guest moves between two agents in every mode, started and watched from the command line, and loses nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration.place import Guest, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODES = ["hybrid", "precopy", "postcopy"]


def check_completed(record: dict[str, Any], here: Place) -> None:
    assert record["state"] == "completed"
    assert record["error"] is None
    assert record["total_bytes"] == here.memory_bytes
    assert record["page_size"] == 4096
    assert record["remaining_bytes"] == 0
    assert record["transferred_bytes"] > 0
    assert record["downtime_seconds"] > 0
    assert record["started_at"] < record["ended_at"]
    states = [change["state"] for change in record["timeline"]]
    assert states == ["setup", "precopy", "switchover", "postcopy", "completed"]
    times = [change["at"] for change in record["timeline"]]
    assert times == sorted(times)


@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_arrives_whole(here: Place, guest: Guest, mode: str) -> None:
    await guest.assert_sound()
    moved = await here.cli(
        *("start", guest.name, "--to", here.address, "--mode", mode, "--downtime-limit", "2000", "--wait", "--json")
    )
    assert moved.code == 0, moved
    record = moved.json
    check_completed(record, here)
    assert (record["guest"], record["role"], record["mode"]) == (guest.name, "source", mode)
    assert record["peer"] == here.address
    if mode == "postcopy":
        assert record["round"] == 0
        assert record["stale_pages"] > 0
    else:
        assert record["round"] >= 1
    if mode == "precopy":
        assert record["stale_pages"] == 0
    await guest.arrived()
    assert await guest.ended() == 0
    other = await here.over(record["id"], "target")
    check_completed(other, here)
    assert other["role"] == "target"
    assert sum(other["faults"].values()) == sum(other["fault_seconds"]["histogram_log2_us"])


async def test_a_guest_in_python_arrives_whole(here: Place) -> None:
    guest = await here.guest("python")
    migration = await here.start("python", mode="hybrid")
    assert (await here.over(migration))["state"] == "completed"
    await guest.arrived()


async def test_afterwards_everybody_says_the_same(here: Place, guest: Guest) -> None:
    migration = await here.start()
    waited = await here.cli("wait", migration, "--json")
    assert waited.code == 0
    await here.over(migration, "target")
    for agent in ("source", "target"):
        status, listed, live = await asyncio.gather(
            here.cli("status", migration[:6], "--json", agent=agent),
            here.cli("list", "--all", "--json", agent=agent),
            here.cli("list", agent=agent),
        )
        assert status.code == 0
        assert (status.json["id"], status.json["state"]) == (migration, "completed")
        assert status.json in listed.json["migrations"]
        assert "no migration is under way" in live.out
    await guest.arrived()


async def test_several_guests_move_at_once(here: Place) -> None:
    guests = [await here.guest(name) for name in ("g0", "g1", "g2")]
    migrations = [
        await here.start(one.name, mode=mode, downtime_limit_ms=2000)
        for one, mode in zip(guests, ("hybrid", "postcopy", "precopy"), strict=True)
    ]
    assert len(set(migrations)) == 3
    records = await asyncio.gather(*(here.over(migration) for migration in migrations))
    assert [record["state"] for record in records] == ["completed"] * 3
    for one in guests:
        await one.arrived()


async def test_two_watchers_see_a_migration_to_its_end(here: Place, guest: Guest) -> None:
    migration = await here.precopying()

    async def watch(agent: str) -> list[str]:
        side = here.source if agent == "source" else here.target
        return [record["state"] async for record in side.events(migration)]

    watching = [asyncio.ensure_future(watch(agent)) for agent in ("source", "source", "target")]
    await here.until(migration, lambda record: record["round"] == 1, "target")
    assert (await here.cli("set", migration, "--max-bandwidth", "0")).code == 0
    for states in await asyncio.gather(*watching):
        assert states[0] in {"precopy", "switchover", "postcopy"}
        assert states[-1] == "completed"
        assert states.count("completed") == 1
    await guest.arrived()
