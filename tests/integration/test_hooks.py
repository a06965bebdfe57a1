"""Hooks of both agents, with a real guest: what they are told, and that a refusal leaves the guest at its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.place import Place, place

ENDS = ["completed", "aborted", "failed"]
BEFORE = {"source": ["setup", "precopy", "switchover"], "target": ["setup", "precopy", "postcopy"]}
PROGRAM = """\
#!/bin/sh
echo "$@ $(cat)" >>{told}
[ "$1 $2" != "{refused}" ] || {{ echo not today; exit 1; }}
"""


def with_both_hooks(here: Place) -> None:
    for agent in BEFORE:
        with_hooks(here, agent)


def with_hooks(here: Place, agent: str, refused: str = "") -> None:
    """Have an agent run a hook, which refuses one phase; the agent is started later."""
    side = here.source if agent == "source" else here.target
    program = here.directory / f"{agent}.hook"
    program.write_text(PROGRAM.format(told=here.directory / f"{agent}.told", refused=refused))
    program.chmod(0o755)
    on = ["precopy", "switchover", "postcopy", *ENDS]
    side.table["hooks"] = {"program": str(program), "before": BEFORE[agent], "on": on}


def told(here: Place, agent: str) -> list[tuple[str, str, dict[str, Any]]]:
    lines = [line.split(" ", 2) for line in (here.directory / f"{agent}.told").read_text().splitlines()]
    return [(when, what, json.loads(record)) for when, what, record in lines]


async def test_both_hooks_are_asked_and_told_throughout(program: Path) -> None:
    async with place(program, prepare=with_both_hooks) as here:
        guest = await here.guest()
        migration = await here.start()
        assert (await here.over(migration))["state"] == "completed"
        arrived = await here.over(migration, "target")
        await guest.arrived()
        assert "hook" in arrived["downtime_breakdown"]
        for side in (here.source, here.target):
            await side.stop()  # which waits for the last hook
        for agent, before in BEFORE.items():
            calls = told(here, agent)
            assert [what for when, what, _ in calls if when == "before"] == before
            assert [what for when, what, _ in calls if when == "on"] == [
                "precopy",
                "switchover",
                "postcopy",
                "completed",
            ]
            assert {record["id"] for _, _, record in calls} == {migration}


@pytest.mark.parametrize(("agent", "phase"), [(agent, phase) for agent in BEFORE for phase in BEFORE[agent]])
async def test_a_refusal_leaves_the_guest_where_it_is(program: Path, agent: str, phase: str) -> None:
    async with place(program, prepare=lambda here: with_hooks(here, agent, f"before {phase}")) as here:
        guest = await here.guest()
        record = await here.over(await here.start())
        assert record["state"] == "failed"
        assert record["error"]["code"] == "hook"
        assert f"before {phase} ended with status 1: not today" in record["error"]["message"]
        await guest.assert_sound()
        await here.source.stop()
        await here.target.stop()
        assert here.left_of(guest.name) == []
        assert "failed" in [what for when, what, _ in told(here, agent) if when == "on"]
