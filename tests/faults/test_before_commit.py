"""Connections lost while the guest is paused and COMMIT is not sent: it runs on at its source, and the target keeps nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from migrated.protocol.preamble import Purpose
from migrated.waiting import within
from tests.faults.conftest import Rigs
from tests.faults.proxy import DOWN, UP, Gate
from tests.faults.rig import LIMIT_SECONDS, Rig

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

#: Where the guest is paused, in the order of a switch-over; the first two only where all is sent before it.
GATES: dict[str, Callable[[], Gate]] = {
    "last-pages": lambda: Gate(page_bytes=0, after="barrier-ack", purposes=(Purpose.BULK,)),
    "last-barrier": lambda: Gate(DOWN, "barrier-ack", 2),
    "switchover": lambda: Gate(UP, "switchover"),
    "stale-map-end": lambda: Gate(UP, "stale-map-end"),
    "state": lambda: Gate(UP, "state"),
    "state-end": lambda: Gate(UP, "state-end"),
    "loaded": lambda: Gate(DOWN, "loaded"),
}
#: Under mode precopy nothing is stale: once the map has said so, nobody needs the page connections any more.
EARLY, LATE = ("precopy", "hybrid", "postcopy"), ("hybrid", "postcopy")
MODES = {
    "last-pages": ("precopy",),
    "last-barrier": ("precopy",),
    "switchover": EARLY,
    "stale-map-end": EARLY,
    "state": LATE,
    "state-end": LATE,
    "loaded": LATE,
}
#: Settings of the migration; under hybrid something is left for post-copy.
OPTIONS: dict[str, dict[str, Any]] = {
    "precopy": {"downtime_limit_ms": 300.0},
    "hybrid": {"downtime_limit_ms": 0.01, "max_rounds": 1},
    "postcopy": {},
}
#: What is lost: which connections, and of those how many.
LOSSES: dict[str, tuple[tuple[Purpose, ...], int]] = {
    "one-bulk": ((Purpose.BULK,), 1),
    "all-bulk": ((Purpose.BULK,), 4),
    "urgent": ((Purpose.URGENT,), 1),
    "control": ((Purpose.CONTROL,), 1),
}


def cases() -> list[Any]:
    """Every loss at every gate; the modes, and whether it is an end or a reset, take turns."""
    pairs = [(gate, loss) for gate in GATES for loss in LOSSES]
    found = []
    for turn, (gate, loss) in enumerate(pairs):
        mode, reset = MODES[gate][turn % len(MODES[gate])], turn % 3 == 0
        found.append(pytest.param(gate, loss, mode, reset, id=f"{mode}-{gate}-{loss}-{'reset' if reset else 'end'}"))
    return found


async def noticed(made: Rig) -> None:
    """Until the source knows; before that it would be right to commit."""

    def gives_up() -> bool:
        lines = made.source.log_path.read_text().splitlines()
        return any(made.migration in line and '"migration failed, rolling back"' in line for line in lines)

    async with within(LIMIT_SECONDS, "the source to notice what it has lost"):
        while not gives_up():  # noqa: ASYNC110 - a log tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("at", "loss", "mode", "reset"), cases())
async def test_a_connection_lost_while_the_guest_is_paused_leaves_it_at_its_source(
    rigs: Rigs, at: str, loss: str, mode: str, reset: bool
) -> None:
    made = await rigs.get(timeouts=None)
    purposes, count = LOSSES[loss]
    gate = GATES[at]()
    try:
        guest = made.guest = await made.sound()
        made.proxy.expect(gate)
        await made.begin(mode=mode, streams=4, **OPTIONS[mode])
        async with within(LIMIT_SECONDS, f"{at} to be reached"):
            await gate.reached.wait()
        assert (await made.ask(guest, "status")).paused
        for connection in made.proxy.chosen(purposes)[:count]:
            connection.end(reset=reset)
        await noticed(made)
        gate.release(drop=loss == "control")
        record = await made.over()
        assert (DOWN, "resumed") not in made.proxy.passed, "nothing is taken up again: it is undone"
        made.proxy.expect(None)
        assert record["state"] == "failed", f"{record}\n{made.logs()}"
        assert record["error"]["message"], record
        other = await made.target.record(made.migration)
        assert other["state"] == "failed", f"{other}\n{made.logs()}"
        assert await made.sound() == guest, made.logs()
    except BaseException:
        await rigs.drop(made)
        raise
