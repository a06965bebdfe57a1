"""Every failure at every stage in every mode: the guest runs in one place, with every byte it wrote, and nothing is left behind."""

from __future__ import annotations

import os

import pytest

from tests.faults.cases import cases, run_case
from tests.faults.conftest import Rigs

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: FAULT_PAGES=4K,2M runs everything on both; FAULTS=all runs every failure at every stage in every mode.
PAGES = tuple(os.environ.get("FAULT_PAGES", "4K").split(","))
#: What must go unnoticed is shorter than the heartbeats' limit by more than a busy machine adds to it.
PATIENT = {"stall": {"heartbeat_limit": 8.0}}
CASES = list(cases(every=os.environ.get("FAULTS") == "all"))


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize(("mode", "stage", "failure"), [pytest.param(*case, id="-".join(case)) for case in CASES])
async def test_nothing_is_lost(rigs: Rigs, pages: str, mode: str, stage: str, failure: str) -> None:
    rig = await rigs.get(pages=pages, timeouts=PATIENT.get(failure))
    try:
        await run_case(rig, mode, stage, failure)
    except BaseException:
        await rigs.drop(rig)
        raise
