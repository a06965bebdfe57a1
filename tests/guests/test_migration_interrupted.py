"""Agents that stop, or come to a standstill, in the middle of a move: the guest does not lose anything by it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.pair import short_directory
from migrated.waiting import within
from tests.rig import supervisor, traces
from tests.rig.guest import MIB, MovingGuest, moving_guest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.usefixtures("page_pool"),
]

LOAD: dict[str, str | int] = {"rate": 1000, "pattern": "hot", "sweep_seconds": 0}
#: So slow that a 128 MiB guest stays in pre-copy for as long as a test wants it to.
SLOWLY = "2MB"


# ---------------------------------------------------------------- SIGTERM


@contextlib.asynccontextmanager
async def _half_way(guest: MovingGuest) -> AsyncIterator[str]:
    """In the middle of pre-copy; afterwards the guest runs where it did, and nothing of it is left on the other host."""
    before = await guest.console.stats()
    migration = await guest.begin(mode="hybrid", max_bandwidth=SLOWLY)
    source, target = await guest.here.source(), await guest.there.target()
    assert (await source.wait(migration, "precopy"))["state"] == "precopy"
    async with within(20, "pages to arrive"):
        while (await target.record(migration))["transferred_bytes"] < MIB:  # noqa: ASYNC110 - the target tells nobody
            await asyncio.sleep(0.05)
    arriving = [pid for pid in guest.pids if str(guest.there.directory) in traces.command_line(pid)]
    assert len(arriving) == 1
    memory = traces.memory_files(arriving[0])
    assert {*arriving, target.pid} <= traces.holders(memory).keys()
    yield migration
    await guest.alone()
    # Nobody holds the memfds any more, so their pages are free again; and no directory is left of it.
    await traces.released(memory)
    async with within(20, "the directory of what was to arrive to go"):
        while guest.there.qmp(guest.name).parent.exists():  # noqa: ASYNC110 - directories tell nobody
            await asyncio.sleep(0.01)
    await guest.assert_sound(before)


async def test_a_source_agent_that_is_told_to_end_leaves_the_guest_running_there(fast_accel: str) -> None:
    async with moving_guest(kind="boot", accel=fast_accel, load=LOAD) as guest:
        async with _half_way(guest) as migration:
            assert await (await guest.here.source()).stop() == 0
            record = await (await guest.there.target()).wait(migration)
            assert record["state"] in {"aborted", "failed"}
            assert record["error"]["message"]
        # Both agents can do it anew.
        await guest.move()


async def test_a_target_agent_that_is_told_to_end_leaves_the_guest_running_on_the_source(fast_accel: str) -> None:
    async with moving_guest(kind="boot", accel=fast_accel, load=LOAD) as guest:
        async with _half_way(guest) as migration:
            assert await (await guest.there.target()).stop() == 0
            record = await (await guest.here.source()).wait(migration)
            assert record["state"] in {"aborted", "failed"}
            assert record["error"]["message"]
            async with within(20, "the holder of the agent's descriptors to end, too"):
                while traces.processes(guest.there.directory):  # noqa: ASYNC110 - it is nobody's child
                    await asyncio.sleep(0.02)
        await guest.move()


async def test_an_abort_on_either_side_leaves_the_guest_running_on_the_source() -> None:
    async with moving_guest(kind="boot", load=LOAD) as guest:
        for side in ("source", "target"):
            async with _half_way(guest) as migration:
                source, target = await guest.here.source(), await guest.there.target()
                agent = source if side == "source" else target
                await agent.request("POST", f"/v1/migrations/{migration}/abort")
                assert (await source.wait(migration))["state"] in {"aborted", "failed"}
                assert (await target.wait(migration))["state"] in {"aborted", "failed"}
        await guest.move()


async def test_a_target_agent_that_is_told_to_end_in_postcopy_serves_to_the_end() -> None:
    async with moving_guest(kind="boot", load=LOAD) as guest:
        before = await guest.console.stats()
        migration = await guest.begin(mode="postcopy", drain_bandwidth="100MB")
        source, target = await guest.here.source(), await guest.there.target()
        attach = asyncio.ensure_future(guest.console.attach(guest.guest.target_serial(1), 60))
        record = await source.wait(migration, "postcopy")
        assert record["state"] in {"postcopy", "completed"}, guest.explain(record)
        ending = asyncio.gather(target.stop(), source.stop())
        await attach
        assert list(await ending) == [0, 0]
        guest.at = 1
        await guest.alone()
        await guest.assert_sound(before)


# ---------------------------------------------------------------- a standstill


@pytest.fixture
def standstill() -> Iterator[Path]:
    """The socket that brings the target agent to a standstill."""
    with supervisor.directory("mgt-", short_directory()) as directory:
        yield directory / "still.sock"


async def test_faults_are_served_while_no_python_runs_in_the_target_agent(standstill: Path) -> None:
    """For five seconds the interpreter lock is held; all the while the guest works, on pages it has to ask for."""
    program = (sys.executable, "-m", "tests.rig.stubborn_agent", str(standstill))
    # Few blocks a second, all over memory: each time another page, and none has come by the drain.
    load: dict[str, str | int] = {"rate": 25, "pattern": "sparse", "sweep_seconds": 0}
    hosts: tuple[dict[str, Any], ...] = ({}, {"program": program})
    async with moving_guest(kind="boot", load=load, memory_bytes=256 * MIB, hosts=hosts) as guest:
        before = await guest.console.stats()
        migration = await guest.begin(mode="postcopy", drain_bandwidth="1KB")
        source = await guest.here.source()
        attach = asyncio.ensure_future(guest.console.attach(guest.guest.target_serial(1), 60))
        assert (await source.wait(migration, "postcopy"))["state"] == "postcopy"
        await attach

        reader, writer = await asyncio.open_unix_connection(str(standstill))
        writer.write(b"5")
        assert await reader.readline() == b"held\n"
        demanded, worked = [], []
        freed = asyncio.ensure_future(reader.readline())
        while not freed.done():
            record = await source.record(migration)
            demanded.append(record["bytes_by_kind"]["demand"])
            load_line = asyncio.ensure_future(guest.console.stats())
            await asyncio.wait({load_line, freed}, return_when=asyncio.FIRST_COMPLETED)
            if freed.done():
                load_line.cancel()
            else:
                worked.append(load_line.result().operations)
        assert freed.result() == b"free\n"
        writer.close()
        # Not only at the edges: again and again while nothing of Python ran there.
        assert sum(later > earlier for earlier, later in itertools.pairwise(demanded)) >= 3, demanded
        assert sum(later > earlier for earlier, later in itertools.pairwise(worked)) >= 3, worked

        await source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0"})
        move = await guest.arrive(migration)
        assert move.target["faults"]["stale"] > 3
        await guest.assert_sound(before)
