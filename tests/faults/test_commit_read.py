"""COMMIT and the loss of a page connection reach the target at once: the guest runs there, and does not wait for a second COMMIT."""

from __future__ import annotations

import asyncio

import pytest

from migrated.protocol.preamble import Purpose
from migrated.waiting import within
from tests.faults.cases import STAGES
from tests.faults.conftest import Rigs
from tests.faults.rig import LIMIT_SECONDS

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.parametrize("turns", range(8))
async def test_a_commit_that_comes_with_a_lost_page_connection_is_obeyed(rigs: Rigs, turns: int) -> None:
    made = await rigs.get(timeouts=None)
    try:
        guest = made.guest = await made.sound()
        gate = STAGES["commit"].gate()
        made.proxy.expect(gate)
        await made.begin(mode="postcopy")
        async with within(LIMIT_SECONDS, "COMMIT to be under way"):
            await gate.reached.wait()
        made.proxy.cut(purposes=(Purpose.BULK, Purpose.URGENT))
        for _ in range(turns):  # so much sooner does the target see the loss
            await asyncio.sleep(0)
        gate.release()
        record = await made.over()
        made.check_reconnects()
        made.proxy.expect(None)
        assert record["state"] == "completed", f"{record}\n{made.logs()}"
        assert await made.sound() != guest
    except BaseException:
        await rigs.drop(made)
        raise
