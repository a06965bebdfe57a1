"""SIGTERM never harms a guest, and a restarted agent still tells what has been."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from migrated.demo.pair import AgentProcess
from migrated.errors import MigratedError
from migrated.waiting import within
from tests.integration.place import PATIENCE_SECONDS, Place, place


@pytest.mark.parametrize("agent", ["source", "target"])
async def test_an_agent_stopped_before_commit_gives_up_and_is_no_loss(program: Path, agent: str) -> None:
    async with place(program) as here:
        guest = await here.guest()
        migration = await here.precopying()
        stopping = here.source if agent == "source" else here.target
        assert await stopping.stop() == 0
        assert here.left_of(guest.name) == []
        await guest.assert_sound()
        other = "target" if agent == "source" else "source"
        ended = await here.over(migration, other)
        assert ended["state"] == "aborted"
        assert ended["error"]["code"] == "aborted"
        await guest.assert_sound()
        await stopping.start()
        kept = await stopping.record(migration)
        assert kept["state"] == "aborted"
        assert kept["ended_at"] is not None
        await back_at_work(here)
        await guest.arrived()


async def back_at_work(here: Place) -> None:
    """The restarted agents move a guest as ever; a guest that has lost its agent connects again by itself."""
    async with within(PATIENCE_SECONDS, "the guest to connect again"):
        while True:
            record = await here.over(await here.start())
            if record["state"] == "completed":
                return
            assert record["error"]["code"] == "guest-not-connected", record
            await asyncio.sleep(0.1)


async def test_what_has_been_is_still_told_after_a_restart(program: Path) -> None:
    async with place(program) as here:
        guest = await here.guest()
        moved = await here.start()
        assert (await here.over(moved))["state"] == "completed"
        await here.over(moved, "target")
        await guest.arrived()
        refused = await here.start("nobody")
        assert (await here.over(refused))["state"] == "failed"
        before = {agent: (await side.request("GET", "/v1/migrations"))["migrations"] for agent, side in sides(here)}
        for _, side in sides(here):
            assert await side.stop() == 0
            await side.start()
        for agent, side in sides(here):
            after = (await side.request("GET", "/v1/migrations"))["migrations"]
            changed = [
                {key: (was[key], now[key]) for key in was if was[key] != now[key]}
                for was, now in zip(before[agent], after, strict=True)
            ]
            assert changed == [{} for _ in after]
            assert (await side.request("GET", "/v1/migrations?ended=false"))["migrations"] == []
            assert [record["state"] async for record in side.events(moved)] == ["completed"]
        listed = await here.cli("list", "--all", "--json")
        assert [one["id"] for one in listed.json["migrations"]] == [moved, refused]
        assert (await here.cli("wait", refused, "--json")).code == 1
        with pytest.raises(MigratedError, match="ended before this agent was started") as caught:
            await here.source.request("POST", f"/v1/migrations/{moved}/abort", {})
        assert caught.value.code == "conflict"
        await guest.assert_sound()


def sides(here: Place) -> list[tuple[str, AgentProcess]]:
    return [("source", here.source), ("target", here.target)]
