"""Real guests around COMMIT: connections lost just before it, the arrived QEMU killed just after it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from migrated.guests.qemu.qmp import Monitor
from migrated.protocol.preamble import Purpose
from migrated.waiting import within
from tests.faults.proxy import DOWN, UP, Gate, Proxy
from tests.guests.conftest import fast_accel, machine, page_pool  # noqa: F401 - fixtures
from tests.rig import traces
from tests.rig.guest import MIB, MovingGuest, moving_guest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("page_pool"),
]

LOAD: dict[str, str | int] = {"rate": 1000, "pattern": "hot", "sweep_seconds": 0}
CONFIG: dict[str, Any] = {"timeouts": {"reconnect_interval": 0.1, "abort": 5.0}}
GATES: dict[str, Callable[[], Gate]] = {
    "switchover": lambda: Gate(UP, "switchover"),
    "state": lambda: Gate(UP, "state"),
    "state-end": lambda: Gate(UP, "state-end"),
    "loaded": lambda: Gate(DOWN, "loaded"),
}
LOSSES = {"bulk": Purpose.BULK, "control": Purpose.CONTROL}
LIMIT_SECONDS = 60.0


@contextlib.asynccontextmanager
async def behind_proxy(accel: str, **shape: Any) -> AsyncIterator[tuple[MovingGuest, Proxy]]:
    shape = {"kind": "boot", "accel": accel, "load": LOAD, "memory_bytes": 128 * MIB, "config": CONFIG, **shape}
    async with moving_guest(**shape) as guest:
        host, _, port = guest.there.address.rpartition(":")
        async with Proxy((host, int(port))).listening() as proxy:
            yield guest, proxy


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["private", "memfd"])
async def pair(
    page_pool: None,  # noqa: F811
    fast_accel: str,  # noqa: F811
    request: pytest.FixtureRequest,
) -> AsyncIterator[tuple[MovingGuest, Proxy]]:
    """A guest that stays where it is, so that one of each kind is enough."""
    async with behind_proxy(fast_accel, memory=request.param) as both:
        yield both


async def stopped_at(guest: MovingGuest, proxy: Proxy, gate: Gate, **options: Any) -> str:
    """A migration under way that waits there; its id."""
    proxy.expect(gate)
    migration = await guest.begin(to=proxy.address, **options)
    async with within(LIMIT_SECONDS, f"{gate.tag} to be reached"):
        await gate.reached.wait()
    return migration


async def gives_up(guest: MovingGuest, migration: str) -> None:
    """Until the source has noticed."""

    def noticed() -> bool:
        return any(
            event["event"] == "migration failed, rolling back" and event.get("migration") == migration
            for event in guest.here.events("source")
        )

    async with within(LIMIT_SECONDS, "the source to notice what it has lost"):
        while not noticed():  # noqa: ASYNC110 - a log tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("at", list(GATES))
async def test_a_connection_lost_before_commit_leaves_qemu_running_at_its_source(
    pair: tuple[MovingGuest, Proxy], at: str, loss: str
) -> None:
    guest, proxy = pair
    before = await guest.console.stats()
    gate = GATES[at]()
    migration = await stopped_at(guest, proxy, gate, mode="postcopy")
    arriving = [pid for pid in guest.pids if str(guest.there.directory) in traces.command_line(pid)]
    assert len(arriving) == 1
    memory = traces.memory_files(arriving[0])
    proxy.cut(purposes=(LOSSES[loss],))
    await gives_up(guest, migration)
    gate.release(drop=loss == "control")
    for agent in (await guest.here.source(), await guest.there.target()):
        record = await agent.wait(migration, limit_seconds=LIMIT_SECONDS)
        assert record["state"] == "failed", guest.explain(record)
        assert record["error"]["message"]
    await guest.alone()
    await traces.released(memory)
    await guest.assert_sound(before)


@pytest.mark.parametrize("tag", ["running", "pages"])
async def test_a_qemu_killed_on_the_target_after_commit_is_lost_by_name_and_can_be_run_at_its_source_by_hand(
    page_pool: None,  # noqa: F811
    fast_accel: str,  # noqa: F811
    tag: str,
) -> None:
    async with behind_proxy(fast_accel) as (guest, proxy):
        before = await guest.console.stats()
        gate = Gate(DOWN, "running") if tag == "running" else Gate(page_bytes=0, after="commit")
        migration = await stopped_at(guest, proxy, gate, mode="postcopy")
        (arrived,) = [pid for pid in guest.pids if str(guest.there.directory) in traces.command_line(pid)]
        os.kill(arrived, signal.SIGKILL)
        target, source = await guest.there.target(), await guest.here.source()
        at_target = await target.wait(migration, limit_seconds=LIMIT_SECONDS)
        gate.release()
        at_source = await source.wait(migration, limit_seconds=LIMIT_SECONDS)
        assert (at_target["state"], at_source["state"]) == ("failed", "failed"), guest.explain(at_source)
        assert at_target["error"]["code"] in {"guest-died", "guest-gone"}, at_target["error"]
        assert at_source["error"]["code"] == "target-lost-guest", at_source["error"]
        async with within(LIMIT_SECONDS, "the killed QEMU to be gone"):
            while len(guest.pids) != 1:  # noqa: ASYNC110 - processes tell nobody of their end
                await asyncio.sleep(0.02)
        # It stands still at its source, and the error's hint is right: by hand it can be run there, having lost nothing.
        monitor = await Monitor.connect("people", guest.here.qmp(guest.name))
        try:
            assert await monitor.status() in {"postmigrate", "paused"}
            await monitor.execute("cont")
        finally:
            await monitor.close()
        await guest.assert_sound(before)
