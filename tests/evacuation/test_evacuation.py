"""Whole evacuations with real agents and guests: whatever is killed meanwhile, every guest runs in exactly one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evacuation.site import MIB, site
from tests.rig.namespaces import star

pytestmark = pytest.mark.timeout(300)  # on a busy machine; usually seconds

SIX = {f"g{number}": 2 for number in range(6)}


def states(evacuation: dict[str, Any]) -> list[str]:
    return [move["state"] for move in evacuation["guests"]]


def phases(evacuation: dict[str, Any]) -> list[str]:
    return [move["phase"] for move in evacuation["guests"] if move["state"] == "migrating"]


@pytest.mark.root
async def test_twenty_guests_leave_for_two_hosts_and_one_target_agent_is_killed_meanwhile(program: Path) -> None:
    sizes = {f"g{number:02}": 1 + number % 4 for number in range(20)}
    with star(2) as hosts:
        async with site(program, sizes, hosts=hosts) as here:
            command = await here.command_line(
                *("--to", here.to, "--parallel", "4", "--max-bandwidth", "16MB", "--patience", "600", "--json")
            )
            killed = here.hosts[1]
            # Guests have arrived there and others are on their way.
            await here.until(
                lambda now: (
                    any(move["state"] == "completed" and move["target"] == killed.address for move in now["guests"])
                    and any(
                        move["state"] == "migrating" and move["target"] == killed.address and move["phase"] == "precopy"
                        for move in now["guests"]
                    )
                )
            )
            await (await killed.target()).kill()
            # Who was on the way there before COMMIT goes to the other host.
            await here.until(
                lambda now: any(
                    move["state"] == "completed" and move["attempts"] and move["target"] != killed.address
                    for move in now["guests"]
                )
            )
            await killed.target()
            over = await here.over(command)
            evacuation = await here.now()
            assert over.code == 0, f"{over}\n{here.explain(evacuation)}"
            assert over.json == evacuation
            assert evacuation["state"] == "completed"
            assert states(evacuation) == ["completed"] * 20
            assert {move["target"] for move in evacuation["guests"]} == {host.address for host in here.hosts[1:]}
            sizes_in_order = [move["memory_bytes"] for move in evacuation["guests"]]
            assert sizes_in_order == sorted(sizes[move["guest"]] * MIB for move in evacuation["guests"])
            await here.verify(evacuation)
