"""What is told of a migration while its link is away."""

from __future__ import annotations

import pytest

from migrated.waiting import within
from tests.faults.cases import STAGES
from tests.faults.conftest import Rigs
from tests.faults.rig import LIMIT_SECONDS

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


async def test_a_source_whose_link_was_cut_does_not_call_lost_pages_arrived(rigs: Rigs) -> None:
    made = await rigs.get(timeouts=None)
    try:
        guest = made.guest = await made.sound()
        gate = STAGES["drain-late"].gate()
        made.proxy.expect(gate)
        await made.begin(mode="postcopy")
        async with within(LIMIT_SECONDS, "most pages to have gone"):
            await gate.reached.wait()
        made.proxy.refusing = True
        made.proxy.cut()
        gate.release(drop=True)
        try:
            for agent in made.agents:
                await agent.wait(made.migration, "postcopy-paused", limit_seconds=LIMIT_SECONDS)
            at_source, at_target = [await agent.record(made.migration) for agent in made.agents]
            assert at_target["remaining_bytes"] > 0, made.logs()
            assert at_source["remaining_bytes"] >= at_target["remaining_bytes"], (at_source, at_target)
        finally:
            made.proxy.refusing = False
        assert (await made.over())["state"] == "completed", made.logs()
        made.check_reconnects(least=1)
        for agent in made.agents:
            assert (await agent.record(made.migration))["remaining_bytes"] == 0
        assert await made.sound() != guest
    except BaseException:
        await rigs.drop(made)
        raise
