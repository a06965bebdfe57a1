"""The guest's process on the target killed after COMMIT: lost, as if it had crashed at home.  Both sides say so, none runs it again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from migrated.waiting import within
from tests.faults.cases import STAGES
from tests.faults.rig import LIMIT_SECONDS, Rig, is_alive, rig

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

#: Who notices first says it: the watch on the process, or the fault thread.
GUEST_OVER = ("guest-died", "guest-gone")
CASES = [
    ("hybrid", "commit"),
    ("postcopy", "commit"),
    ("hybrid", "running"),
    ("postcopy", "running"),
    ("hybrid", "postcopy-early"),
    ("postcopy", "drain-early"),
    ("postcopy", "drain-late"),
]


async def killed_at(made: Rig, mode: str, stage_name: str) -> int:
    """A migration whose arrived guest is killed at that stage; the pid of the guest at the source."""
    stage = STAGES[stage_name]
    guest = made.guest = await made.sound()
    gate = stage.gate()
    made.proxy.expect(gate)
    # Something must be left to fetch.
    await made.begin(**{**stage.settings(mode), "downtime_limit_ms": 0.01, "max_rounds": 1})
    async with within(LIMIT_SECONDS, f"{stage_name} to be reached"):
        await gate.reached.wait()
    (arrived,) = set(made.guests()) - {guest}
    os.kill(arrived, signal.SIGKILL)
    if stage.name != "commit":  # there it may learn of COMMIT and of the end at once
        # Before the last page can come: a guest that has them all is free, and its end is nobody's failure.
        await made.target.wait(made.migration, limit_seconds=LIMIT_SECONDS)
    gate.release()
    return guest


async def told(made: Rig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The errors of both records, which must be failed."""
    await made.over()
    made.proxy.expect(None)
    errors = []
    for agent in made.agents:
        record = await agent.record(made.migration)
        assert record["state"] == "failed", f"{record}\n{made.logs()}"
        assert record["ended_at"] is not None
        errors.append(record["error"])
    return errors[0], errors[1]


@pytest.mark.parametrize(("mode", "stage"), [pytest.param(*case, id="-".join(case)) for case in CASES])
async def test_a_guest_killed_on_the_target_after_commit_is_lost_by_name_and_not_run_at_its_source(
    guest_program: Path, mode: str, stage: str
) -> None:
    async with rig(guest_program, prove=False) as made:
        guest = await killed_at(made, mode, stage)
        at_source, at_target = await told(made)
        assert at_source["code"] == "target-lost-guest", at_source
        assert at_source["hint"]
        assert at_target["code"] in GUEST_OVER, at_target
        assert "process" in at_target["message"], at_target
        # The source's own is kept, paused and with its memory, for people to decide upon.
        assert made.guests() == [guest]
        status = await made.ask(guest, "status")
        assert status.paused
        assert status.parked
        await moves_again(made, guest)


async def test_a_target_agent_that_cannot_serve_a_guest_after_a_restart_keeps_it_for_the_next(
    guest_program: Path,
) -> None:
    """Its table is gone from the configuration: the guest waits, its source goes on asking; put right, all goes on."""
    async with rig(guest_program, prove=False) as made:
        await made.sound()
        gate = STAGES["drain-early"].gate()
        made.proxy.expect(gate)
        await made.begin(**STAGES["drain-early"].settings("postcopy"))
        async with within(LIMIT_SECONDS, "post-copy to be reached"):
            await gate.reached.wait()
        await made.target.kill()
        guests, made.target.table["guests"] = made.target.table["guests"], {}
        await made.restart(made.target)
        gate.release()
        made.proxy.expect(None)
        async with within(LIMIT_SECONDS, "the source to ask for it"):
            while "waits for the next agent" not in made.target.log_path.read_text():  # noqa: ASYNC110 - a log
                await asyncio.sleep(0.05)
        record = await made.source.record(made.migration)
        assert record["state"] in {"postcopy-paused", "recovering"}, f"{record}\n{made.logs()}"
        await made.target.kill()
        made.target.table["guests"] = guests
        await made.restart(made.target)
        record = await made.over()
        made.check_reconnects(least=1)
        assert record["state"] == "completed", f"{record}\n{made.logs()}"
        (arrived,) = made.guests()
        status = await made.sweep(arrived)
        assert (status.wrong, status.errors, status.twice) == (0, 0, 0), f"{status}\n{made.logs()}"


async def moves_again(made: Rig, guest: int) -> None:
    """People have ended what was left of it: both agents move the next one as ever."""
    os.kill(guest, signal.SIGKILL)
    async with within(LIMIT_SECONDS, "the guest at the source to end"):
        while is_alive(guest):  # noqa: ASYNC110 - processes tell nobody of their end
            await asyncio.sleep(0.01)
    async with within(LIMIT_SECONDS, "the source to know of it"):
        while "guest disconnected" not in made.source.log_path.read_text():  # noqa: ASYNC110 - neither does a log
            await asyncio.sleep(0.01)
    before = await made.start_guest()
    record = await made.migrate(mode="hybrid", downtime_limit_ms=300.0)
    assert record["state"] == "completed", f"{record}\n{made.logs()}"
    async with within(LIMIT_SECONDS, "the guest that has moved on to end"):
        while is_alive(before):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (arrived,) = made.guests()
    status = await made.sweep(arrived)
    assert (status.wrong, status.errors, status.twice) == (0, 0, 0), f"{status}\n{made.logs()}"
