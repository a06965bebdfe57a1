"""SIGHUP: an agent takes over its configuration, and active migrations go on as they began."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.pair import AgentProcess, to_toml
from migrated.errors import MigratedError
from migrated.waiting import within
from tests.integration.place import PATIENCE_SECONDS, Place, place

RELOADED = "configuration reloaded"
NOT_RELOADED = "the configuration was not reloaded"


async def reload(here: Place, agent: str, text: str | None = None) -> dict[str, Any]:
    """Write the agent's table (or ``text``) to its file, send SIGHUP, and return the line in which it says the outcome."""
    side = side_of(here, agent)
    table = {"agent": {"state_dir": str(side.state_dir)}, **side.table}
    side.config_path.write_text(to_toml(table) if text is None else text)
    before = len(outcomes(here, agent))
    assert side.process is not None
    side.process.send_signal(signal.SIGHUP)
    async with within(PATIENCE_SECONDS, "the agent to say how the reload went"):
        while len(outcomes(here, agent)) == before:  # noqa: ASYNC110 - a log
            await asyncio.sleep(0.02)
    return outcomes(here, agent)[-1]


def side_of(here: Place, agent: str) -> AgentProcess:
    return here.source if agent == "source" else here.target


def outcomes(here: Place, agent: str) -> list[dict[str, Any]]:
    lines = here.logged(agent, "info") + here.logged(agent, "warning")
    return sorted(
        (line for line in lines if line["event"] in {RELOADED, NOT_RELOADED}), key=lambda line: str(line["timestamp"])
    )


async def test_a_guest_is_added_and_defaults_change_while_another_migrates(program: Path) -> None:
    async with place(program) as here:
        guest, later = await here.guest("g0"), "g2"
        tables = {agent: side_of(here, agent).table["guests"].pop(later) for agent in ("source", "target")}
        for agent in tables:
            assert (await reload(here, agent))["event"] == RELOADED
        with pytest.raises(MigratedError) as caught:
            await here.start(later)
        assert caught.value.code == "unknown-guest"
        migration = await here.precopying(guest.name)
        for agent, table in tables.items():
            side_of(here, agent).table["guests"][later] = table
        here.source.table["migration"] = {"mode": "postcopy"}
        for agent in tables:
            assert (await reload(here, agent))["event"] == RELOADED
        assert (await here.source.record(migration))["state"] == "precopy"
        other = await here.guest(later)  # it connects to the socket that the reload has made
        moved = await here.over(await here.start(later))
        assert moved["state"] == "completed", moved
        assert moved["mode"] == "postcopy"
        await here.over(moved["id"], "target")
        await other.arrived()
        await here.source.request("POST", f"/v1/migrations/{migration}/set", {"max_bandwidth": "0"})
        assert (await here.over(migration))["state"] == "completed"
        await here.over(migration, "target")
        await guest.arrived()


async def test_a_wrong_file_changes_nothing(program: Path) -> None:
    async with place(program) as here:
        guest = await here.guest()
        failed = await reload(here, "source", "[guests.g0]\ndriver = 7\n")
        assert failed["event"] == NOT_RELOADED
        assert str(here.source.config_path) in failed["message"]
        assert (await here.over(await here.start(guest.name)))["state"] == "completed"
        await guest.arrived()


async def test_the_table_of_a_guest_that_is_migrated_stays(program: Path) -> None:
    async with place(program) as here:
        guest = await here.guest()
        migration = await here.precopying(guest.name)
        for agent in ("source", "target"):
            del side_of(here, agent).table["guests"][guest.name]
            failed = await reload(here, agent)
            assert (failed["event"], failed["code"]) == (NOT_RELOADED, "guest-migrating")
        await here.source.request("POST", f"/v1/migrations/{migration}/set", {"max_bandwidth": "0"})
        assert (await here.over(migration))["state"] == "completed"
        await guest.arrived()
        await here.over(migration, "target")
        assert (await reload(here, "source"))["event"] == RELOADED


async def test_a_table_that_needs_a_restart_is_named(program: Path) -> None:
    async with place(program) as here:
        here.source.table["limits"] = {"max_migrations": 3}
        assert (await reload(here, "source"))["event"] == RELOADED
        named = [line["tables"] for line in here.logged("source", "warning") if "tables" in line]
        assert named == [["limits"]]
