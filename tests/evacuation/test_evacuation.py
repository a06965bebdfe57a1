"""Whole evacuations with real agents and guests: whatever is killed meanwhile, every guest runs in exactly one place."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.qemu_guest import QEMU
from tests.evacuation.site import MIB, site
from tests.rig.namespaces import star

pytestmark = pytest.mark.timeout(600)  # on a busy machine; usually seconds

SIX = {f"g{number}": 2 for number in range(6)}


def states(evacuation: dict[str, Any]) -> list[str]:
    return [move["state"] for move in evacuation["guests"]]


def phases(evacuation: dict[str, Any]) -> list[str]:
    return [move["phase"] for move in evacuation["guests"] if move["state"] == "migrating"]


@pytest.mark.root
async def test_twenty_guests_leave_for_two_hosts_and_one_target_agent_is_killed_meanwhile(program: Path) -> None:
    sizes = {"large": 24, **{f"g{number:02}": 1 + number % 2 for number in range(19)}}
    with star(2) as hosts:
        async with site(program, sizes, hosts=hosts) as here:
            limits = ("--parallel", "4", "--max-bandwidth", "8MB", "--patience", "600")
            command = await here.command_line("--to", here.to, "--order", "largest", *limits, "--json")

            def under_way(now: dict[str, Any]) -> bool:
                """Whether the large guest is on its way, and another has arrived where it goes."""
                large = next((move for move in now["guests"] if move["guest"] == "large"), None)
                if large is None or large["phase"] != "precopy" or "waiting" not in states(now):
                    return False
                there = [move for move in now["guests"] if move["target"] == large["target"]]
                return any(move["state"] == "completed" for move in there)

            address = (await here.until(under_way))["guests"][0]["target"]
            killed = next(host for host in here.hosts if host.address == address)
            await (await killed.target()).kill()
            await here.until(lambda now: now["guests"][0]["attempts"] != [])
            await killed.target()
            over = await here.over(command)
            evacuation = await here.now()
            assert over.code == 0, f"{over}\n{here.explain(evacuation)}"
            assert over.json == evacuation
            assert evacuation["state"] == "completed"
            assert states(evacuation) == ["completed"] * 20
            large, *others = evacuation["guests"]
            assert large["guest"] == "large"
            assert [attempt["target"] for attempt in large["attempts"] if attempt["counted"]] == [address]
            assert large["target"] != address
            assert {move["target"] for move in others} == {host.address for host in here.hosts[1:]}
            sizes_in_order = [move["memory_bytes"] for move in evacuation["guests"]]
            assert sizes_in_order == sorted((size * MIB for size in sizes.values()), reverse=True)
            await here.verify(evacuation)


# In post-copy a guest soon has what it touches, whatever the limit of the drain: it is large enough to be seen there.
@pytest.mark.parametrize(
    ("size", "options"),
    [(2, ("--max-bandwidth", "3MB")), (32, ("--mode", "postcopy", "--drain-bandwidth", "1MB"))],
    ids=["before-commit", "after-commit"],
)
async def test_after_a_crash_of_the_source_agent_the_next_one_goes_on(
    program: Path, size: int, options: tuple[str, ...]
) -> None:
    phase = "postcopy" if "postcopy" in options else "precopy"
    async with site(program, dict.fromkeys(SIX, size)) as here:
        command = await here.command_line("--to", here.to, "--parallel", "3", *options)
        killed = await here.until(lambda now: phase in phases(now) and "waiting" in states(now))
        committed = [move["guest"] for move in killed["guests"] if move["phase"] in ("postcopy", "completed")]
        source = await here.hosts[0].source()
        if phase == "postcopy":
            command.kill()
            assert (await here.over(command)).code == -signal.SIGKILL
        await source.kill()
        if phase == "precopy":
            over = await here.over(command)
            assert over.code == 1, over
            assert "the agent stopped during evacuation" in over.err
        await here.hosts[0].source()
        over = await here.evacuate("--resume", "--json")
        evacuation = over.json
        assert over.code == 0, f"{over}\n{here.explain(evacuation)}"
        assert states(evacuation) == ["completed"] * 6
        for name in SIX:
            ends = [record["state"] for record in await here.migrations(name)]
            assert ends.count("completed") == 1
            assert ends[-1] == "completed"
            assert ends == ["completed"] or name not in committed
        await here.verify(evacuation)


async def test_an_operator_plans_interrupts_aborts_and_begins_again(program: Path) -> None:
    busy = {"target": {"limits": {"max_migrations": 1}}}
    sizes = {**dict.fromkeys(SIX, 16), "g0": 1}
    async with site(program, sizes, hosts=({}, {}, busy)) as here:
        unreachable = await here.evacuate("--to", f"{here.to},127.0.0.1:1")
        assert unreachable.code == 1
        assert "127.0.0.1:1 cannot be reached" in unreachable.err
        plan = await here.evacuate("--to", here.to, "--only", "g[0-4]", "--except", "g0", "--dry-run", "--json")
        assert plan.code == 0
        assert [(move["guest"], move["state"]) for move in plan.json["guests"]] == [
            (f"g{number}", "waiting") for number in range(1, 5)
        ]
        assert {move["target"] for move in plan.json["guests"]} <= {host.address for host in here.hosts[1:]}
        assert sorted(plan.json["targets"][1]) == sorted(plan.json["targets"][0])
        assert len(here.processes()) == 6  # nothing was touched
        assert (await here.now())["guests"] == []

        # The small guest goes at once, the others would take minutes.
        command = await here.command_line("--to", here.to, "--max-bandwidth", "600KB")
        begun = await here.until(lambda now: "completed" in states(now) and "waiting" in states(now))
        command.send_signal(signal.SIGINT)
        over = await here.over(command)
        assert over.code == 130
        assert "the evacuation continues: migrated evacuate --resume" in over.err
        again = await here.evacuate("--to", here.to, "--json")
        assert (again.code, again.json["error"]["code"]) == (2, "evacuation-active")
        assert (await here.evacuate("--abort")).code == 0
        over = await here.evacuate("--resume", "--json")
        assert over.code == 3, over
        aborted = over.json
        assert (aborted["id"], aborted["state"]) == (begun["id"], "aborted")
        assert set(states(aborted)) == {"completed", "aborted"}
        await here.verify(aborted)

        over = await here.evacuate("--to", here.to, "--parallel", "4", "--parallel-per-target", "4", "--json")
        assert over.code == 0, f"{over}\n{here.explain(over.json)}"
        left = [move["guest"] for move in aborted["guests"] if move["state"] == "aborted"]
        done = [move["guest"] for move in over.json["guests"] if move["state"] == "completed"]
        assert sorted(done) == sorted(left)
        await here.verify({"guests": [move for move in over.json["guests"] if move["state"] == "completed"]})
        assert here.complaints() == []


@pytest.mark.root
@pytest.mark.guest
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")
async def test_guests_of_different_drivers_leave_in_one_run(program: Path) -> None:
    async with site(program, {"p0": 1, "p1": 2}, qemus_mib={"q0": 32, "q1": 48}) as here:
        over = await here.evacuate("--to", here.to, "--order", "largest", "--parallel", "4", "--json")
        assert over.code == 0, f"{over}\n{here.explain(await here.now())}"
        assert [(move["guest"], move["driver"]) for move in over.json["guests"]] == [
            ("q1", "qemu"),
            ("q0", "qemu"),
            ("p1", "process"),
            ("p0", "process"),
        ]
        await here.verify(over.json)
        assert here.complaints() == []
