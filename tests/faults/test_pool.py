"""The target's pool of huge pages is full: before a guest comes, while it comes, and once it runs there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from migrated.waiting import within
from tests.faults.cases import STAGES
from tests.faults.conftest import Rigs
from tests.faults.proxy import Gate, Proxy
from tests.faults.rig import LIMIT_SECONDS
from tests.guests.conftest import fast_accel, machine, page_pool  # noqa: F401 - fixtures
from tests.rig.guest import MIB, moving_guest
from tests.rig.pages import PagesUnavailableError, more_pages, pool_full

PAGE_BYTES = 2 * MIB

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def pool() -> Iterator[None]:
    """Pages for the guest as it arrives, and as it leaves for the next round."""
    try:
        with more_pages(32, PAGE_BYTES):
            yield
    except PagesUnavailableError as error:
        pytest.skip(str(error))


async def test_a_full_pool_on_the_target_is_told_by_name_and_nothing_is_started(rigs: Rigs, pool: None) -> None:
    made = await rigs.get(target_pages="2M")
    try:
        guest = await made.sound()
        with pool_full(PAGE_BYTES):
            record = await made.migrate(mode="hybrid", downtime_limit_ms=300.0)
            assert record["state"] == "failed", f"{record}\n{made.logs()}"
            assert record["error"]["code"] == "no-huge-pages", record["error"]
            assert "nr_hugepages" in record["error"]["hint"], record["error"]
            assert await made.sound() == guest
        record = await made.migrate(mode="hybrid", downtime_limit_ms=300.0)
        assert record["state"] == "completed", f"{record}\n{made.logs()}"
        assert await made.sound() != guest
    except BaseException:
        await rigs.drop(made)
        raise


@pytest.mark.parametrize(
    ("mode", "stage"),
    [
        ("hybrid", "ready"),
        ("precopy", "round-1-pages"),
        ("hybrid", "switchover"),
        ("postcopy", "running"),
        ("postcopy", "drain-early"),
        ("postcopy", "drain-late"),
    ],
)
async def test_a_pool_that_gets_full_while_a_guest_is_under_way_does_not_matter_to_it(
    rigs: Rigs, pool: None, mode: str, stage: str
) -> None:
    """Its pages were reserved before anything was started."""
    made = await rigs.get(target_pages="2M")
    try:
        guest = made.guest = await made.sound()
        gate = STAGES[stage].gate()
        made.proxy.expect(gate)
        await made.begin(**STAGES[stage].settings(mode))
        async with within(LIMIT_SECONDS, f"{stage} to be reached"):
            await gate.reached.wait()
        with pool_full(PAGE_BYTES):
            gate.release()
            record = await made.over()
            assert record["state"] == "completed", f"{record}\n{made.logs()}"
            assert await made.sound() != guest
    except BaseException:
        await rigs.drop(made)
        raise


@pytest.mark.hugepages
@pytest.mark.guest
@pytest.mark.parametrize(("mode", "after"), [("hybrid", "round"), ("postcopy", "commit")])
async def test_qemu_arrives_while_the_pool_is_full(page_pool: None, fast_accel: str, mode: str, after: str) -> None:  # noqa: F811
    """It touches pages that never came too: those that were empty."""
    load: dict[str, str | int] = {"rate": 1000, "pattern": "hot", "sweep_seconds": 0}
    options: dict[str, Any] = {"kind": "boot", "accel": fast_accel, "load": load, "memory_bytes": 128 * MIB}
    async with moving_guest(**options) as guest:
        host, _, port = guest.there.address.rpartition(":")
        async with Proxy((host, int(port))).listening() as proxy:
            before = await guest.console.stats()
            gate = Gate(page_bytes=MIB, after=after)
            proxy.expect(gate)
            migration = await guest.begin(to=proxy.address, mode=mode)
            async with within(LIMIT_SECONDS, "pages to be under way"):
                await gate.reached.wait()
            with pool_full(PAGE_BYTES):
                gate.release()
                await guest.arrive(migration)
                await guest.assert_sound(before)
