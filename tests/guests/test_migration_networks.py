"""Two hosts for real: each agent in a network namespace of its own, and the guest moves over the link between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rig.guest import MIB, moving_guest
from tests.rig.namespaces import Namespaces, ip, namespaces

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.usefixtures("page_pool"),
]

LOAD: dict[str, str | int] = {"rate": 2000, "pattern": "hot", "sweep_seconds": 0}
RELENTLESS: dict[str, str | int] = {"rate": 0, "pattern": "sparse"}


@pytest.fixture
def link() -> Iterator[Namespaces]:
    with namespaces() as pair:
        yield pair


@pytest.mark.parametrize("mode", ["hybrid", "precopy", "postcopy"])
async def test_a_guest_moves_over_a_link_between_two_namespaces(link: Namespaces, mode: str) -> None:
    async with moving_guest(kind="boot", load=LOAD, hosts=link.hosts) as guest:
        move = await guest.move(mode=mode, downtime_limit_ms=2000)
        # Headers of TCP and IP included, so at least what the agent counts; and it did go this way.
        assert link.sent_bytes(0) >= move.source["transferred_bytes"] > 0
        await guest.move(mode=mode, downtime_limit_ms=2000)
        assert ip("netns", "pids", link.names[0]).split()


@pytest.mark.parametrize("load", [LOAD, RELENTLESS], ids=["calm", "relentless"])
async def test_a_guest_moves_over_a_slow_link(link: Namespaces, load: dict[str, str | int]) -> None:
    link.limit(0, "400mbit")
    async with moving_guest(kind="boot", load=load, memory_bytes=64 * MIB, hosts=link.hosts) as guest:
        move = await guest.move(mode="hybrid")
        assert move.source["stale_pages"] > 0 or load is LOAD


async def test_a_linux_guest_moves_between_the_namespaces(link: Namespaces) -> None:
    load: dict[str, str | int] = {"size": "50%", "rate": 5000, "pattern": "sparse"}
    async with moving_guest(kind="linux", load=load, memory_bytes=192 * MIB, hosts=link.hosts) as guest:
        await guest.move(mode="hybrid")
