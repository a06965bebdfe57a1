"""A guest that writes and checks its memory all the time moves from host to host, in every mode, and loses nothing.

A guest is shared by the tests of its kind: each test moves it on, from where the one before has left it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.rig.guest import MIB, MovingGuest, moving_guest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("page_pool"),
]

MODES = ["hybrid", "precopy", "postcopy"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def linux(page_pool: None) -> AsyncIterator[MovingGuest]:
    load: dict[str, str | int] = {"size": "60%", "rate": 2000, "pattern": "hot"}
    async with moving_guest(kind="linux", memory_bytes=192 * MIB, load=load) as guest:
        yield guest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def boot(page_pool: None, accel: str) -> AsyncIterator[MovingGuest]:
    load: dict[str, str | int] = {"rate": 2000, "pattern": "hot", "sweep_seconds": 0}
    async with moving_guest(kind="boot", accel=accel, load=load) as guest:
        yield guest


@pytest.mark.parametrize("mode", MODES)
async def test_a_linux_guest_arrives_whole(linux: MovingGuest, mode: str) -> None:
    move = await linux.move(mode=mode, downtime_limit_ms=2000)
    assert move.source["mode"] == mode
    assert move.source["page_size"] == move.target["page_size"] == 2 * MIB
    if mode == "postcopy":
        assert move.source["round"] == 0
        assert move.source["stale_pages"] > 0
        assert move.target["faults"]["stale"] > 0
    if mode == "precopy":
        assert move.source["stale_pages"] == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_boot_sector_guest_arrives_whole(boot: MovingGuest, mode: str) -> None:
    move = await boot.move(mode=mode, downtime_limit_ms=2000)
    assert move.source["round"] > 0 or mode == "postcopy"
    assert move.source["stale_pages"] == 0 or mode != "precopy"
    assert sum(move.target["faults"].values()) > 0 or mode == "precopy"
