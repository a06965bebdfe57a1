"""Guests of every shape: regions, page sizes, many moves, writes that outrun the network, disks that write into memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.images import build_disk
from migrated.errors import GuestError
from migrated.guests.qemu.qmp import Monitor
from tests.rig import swap
from tests.rig.guest import MIB, MovingGuest, moving_guest
from tests.rig.pages import PagesUnavailableError, more_pages

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.usefixtures("page_pool"),
]

GIB = 1024 * MIB
MOVES = 10
#: A load that a move can follow, and one that writes as fast as the guest can, all over its memory.
CALM: dict[str, str | int] = {"rate": 2000, "pattern": "hot", "sweep_seconds": 0}
RELENTLESS: dict[str, str | int] = {"rate": 0, "pattern": "sparse", "sweep_seconds": 10}


async def test_one_guest_moves_ten_times_there_and_back() -> None:
    async with moving_guest(kind="boot", load=CALM) as guest:
        started = await guest.console.stats()
        pids = {*guest.pids}
        for number in range(MOVES):
            mode = ("hybrid", "postcopy", "precopy")[number % 3]
            await guest.move(mode=mode, downtime_limit_ms=2000)
            pids.update(guest.pids)
        assert len(pids) == MOVES + 1  # each time a new QEMU
        assert (await guest.console.stats()).operations > started.operations
        for host in guest.hosts:
            records = (await (await host.source()).request("GET", "/v1/migrations"))["migrations"]
            assert [record["state"] for record in records] == ["completed"] * (MOVES // 2)


@pytest.mark.parametrize("mode", ["hybrid", "postcopy"])
async def test_two_numa_regions_arrive_each_in_its_place(mode: str) -> None:
    async with moving_guest(kind="boot", load=CALM, regions=2, memory_bytes=192 * MIB) as guest:
        move = await guest.move(mode=mode)
        assert move.target["total_bytes"] > guest.guest.memory_bytes  # and the firmware
        await guest.move(mode=mode)


@pytest.mark.parametrize("mode", ["hybrid", "precopy", "postcopy"])
async def test_small_pages_become_huge_ones_and_small_again(mode: str) -> None:
    async with moving_guest(kind="boot", load=CALM, page_bytes=(4096, 2 * MIB)) as guest:
        there = await guest.move(mode=mode, downtime_limit_ms=2000)
        assert there.target["page_size"] == 2 * MIB
        back = await guest.move(mode=mode, downtime_limit_ms=2000)
        assert back.target["page_size"] == 4096


@pytest.mark.parametrize("load", [CALM, RELENTLESS], ids=["calm", "relentless"])
async def test_a_linux_guest_goes_from_small_pages_to_huge_ones(load: dict[str, str | int]) -> None:
    load = {"rate": load["rate"] or "max", "pattern": load["pattern"]}
    async with moving_guest(kind="linux", load=load, memory_bytes=192 * MIB, page_bytes=(4096, 2 * MIB)) as guest:
        await guest.move()


@pytest.mark.parametrize("how", ["prealloc", "mem-lock"])
@pytest.mark.parametrize("page_bytes", [4096, 2 * MIB], ids=["4k", "2m"])
async def test_a_target_that_preallocates_or_locks_its_memory_is_no_obstacle(how: str, page_bytes: int) -> None:
    async with moving_guest(kind="boot", load=CALM, memory="private", page_bytes=(4096, page_bytes)) as guest:
        table = guest.there.target_guests[guest.name]
        table["command"] += ["-mem-prealloc"] if how == "prealloc" else ["-overcommit", "mem-lock=on"]
        move = await guest.move(mode="postcopy")
        assert move.target["faults"]["stale"] > 0
        await guest.move()


async def test_memory_that_is_full_of_swapped_out_pages_arrives_whole() -> None:
    """Private memory is swapped out before it migrates: what is on swap was written by the guest too."""
    with _swap(256 * MIB):
        async with moving_guest(kind="boot", load=CALM, memory="private", page_bytes=(4096, 2 * MIB)) as guest:
            swapped = guest.swap_out()
            assert swapped > MIB
            await guest.move()


@pytest.mark.parametrize("memory", ["private", "memfd"])
async def test_memory_that_the_guest_gives_back_arrives_clear(tmp_path: Path, memory: str) -> None:
    """The balloon goes up and down, and free pages are reported, all the time: what was cleared must not come back."""
    monitor = tmp_path / "balloon.qmp"
    load: dict[str, str | int] = {"size": "35%", "rate": 2000, "pattern": "hot", "churn": 1}
    async with moving_guest(
        kind="linux",
        load=load,
        memory=memory,
        memory_bytes=256 * MIB,
        page_bytes=(4096 if memory == "private" else 2 * MIB, 2 * MIB),
        extra=("-device", "virtio-balloon-pci,free-page-reporting=on"),
        source_extra=("-qmp", f"unix:{monitor},server=on,wait=off"),
    ) as guest:
        qmp = await Monitor.connect("balloon", monitor)
        squeezing = asyncio.ensure_future(_squeeze(qmp, 256 * MIB))
        try:
            before = await guest.console.stats()
            await guest.console.wait_for(lambda load: load.churns > before.churns + 20, 60, "memory to be given back")
            await guest.move(mode="hybrid", max_bandwidth="400Mbit")
        finally:
            squeezing.cancel()
            await asyncio.gather(squeezing, return_exceptions=True)
            await qmp.close()
        assert squeezing.cancelled() or isinstance(squeezing.exception(), GuestError)  # with the first QEMU
        arrived = await guest.console.stats()
        await guest.console.wait_for(
            lambda load: load.churns > arrived.churns + 20, 60, "memory to be given back there"
        )
        await guest.move(mode="hybrid")


async def _squeeze(qmp: Monitor, memory_bytes: int) -> None:
    """Inflate and deflate the balloon until QEMU ends."""
    while True:
        for size in (memory_bytes * 3 // 4, memory_bytes):
            await qmp.execute("balloon", {"value": size})
            await asyncio.sleep(0.2)  # the guest follows in its own time


@contextlib.contextmanager
def _swap(size_bytes: int) -> Iterator[None]:
    """So much swap on compressed memory; skips where the kernel has no zram."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(swap.zram(size_bytes))
        except swap.SwapUnavailableError as error:
            pytest.skip(f"nothing to swap to: {error}")
        yield


@contextlib.contextmanager
def _pages_or_skip(count: int, page_bytes: int) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(more_pages(count, page_bytes))
        except PagesUnavailableError as error:
            pytest.skip(f"{count} pages of {page_bytes // MIB} MiB are needed: {error}")
        yield


@pytest.mark.parametrize("mode", ["hybrid", "postcopy"])
async def test_a_guest_on_one_gibibyte_page_arrives_whole_on_another(mode: str, fast_accel: str) -> None:
    shape: dict[str, Any] = {"accel": fast_accel, "memory_bytes": GIB, "page_bytes": (GIB, GIB)}
    with _pages_or_skip(2, GIB):
        async with moving_guest(kind="boot", load=CALM, **shape) as guest:
            move = await guest.move(mode=mode)
            assert move.source["page_size"] == GIB
            # Counted as one page: fewer than the smaller ones in it. The firmware's own pages are 4 KiB.
            assert move.source["stale_pages"] < GIB // (2 * MIB)


async def test_one_gibibyte_page_becomes_huge_ones_and_one_again(fast_accel: str) -> None:
    """With one such page to be had: it is the guest's on the way out, and free for its return."""
    shape: dict[str, Any] = {"accel": fast_accel, "memory_bytes": GIB, "page_bytes": (GIB, 2 * MIB)}
    with _pages_or_skip(1, GIB), _pages_or_skip(GIB // (2 * MIB), 2 * MIB):
        async with moving_guest(kind="boot", load=CALM, **shape) as guest:
            out = await guest.move()
            assert out.target["page_size"] == 2 * MIB
            back = await guest.move()
            assert back.target["page_size"] == GIB


async def test_writes_that_outrun_precopy_fail_it_and_hybrid_moves_the_guest_all_the_same(accel: str) -> None:
    async with moving_guest(kind="boot", accel=accel, load=RELENTLESS, memory_bytes=256 * MIB) as guest:
        # One round of half a second or more: a later, shorter one may find nothing written by a guest that had no processor.
        one_round: dict[str, Any] = {"downtime_limit_ms": 1, "max_rounds": 1, "max_bandwidth": "400MB"}
        record = await guest.fail(mode="precopy", **one_round)
        assert record["state"] == "failed"
        assert record["error"]["code"] == "not-converging"
        assert "writes faster than it can be sent" in record["error"]["message"]
        assert "hybrid" in record["error"]["hint"]
        target = await (await guest.there.target()).record(record["id"])
        assert target["state"] == "failed"
        # `fail` has seen that one QEMU is left, on the source and without a userfaultfd: so it can be tracked anew.
        move = await guest.move(mode="hybrid", **one_round)
        assert move.source["stale_pages"] > 0


async def test_a_linux_guest_that_never_stops_writing_arrives_in_hybrid_mode() -> None:
    load: dict[str, str | int] = {"size": "60%", "rate": "max", "pattern": "sparse"}
    async with moving_guest(kind="linux", load=load, memory_bytes=192 * MIB) as guest:
        # A limit that the only round does not keep, however quick this machine is.
        move = await guest.move(mode="hybrid", downtime_limit_ms=1.0, max_rounds=1)
        assert move.target["faults"]["stale"] > 0


# ---------------------------------------------------------------- direct I/O


async def _reads_go_on(guest: MovingGuest) -> None:
    before = await guest.console.stats()
    await guest.console.wait_for(lambda load: load.disk_reads > before.disk_reads, 30, "disk reads to go on")


@pytest.mark.parametrize("mode", ["hybrid", "precopy", "postcopy"])
async def test_direct_disk_reads_in_flight_lose_nothing(tmp_path: Path, mode: str) -> None:
    """What a disk writes into pinned memory no fault reports: the scans are quiesced then."""
    disk = build_disk(tmp_path / "disk", 32 * MIB)
    load: dict[str, str | int] = {"size": "50%", "rate": 500, "pattern": "hot", "disk": "/dev/vda"}
    async with moving_guest(
        kind="linux", load=load, memory_bytes=192 * MIB, disk=disk, disk_options="cache=none"
    ) as guest:
        await _reads_go_on(guest)
        await guest.move(mode=mode, downtime_limit_ms=2000)
        await _reads_go_on(guest)
        armed = [event for event in guest.hosts[0].events("source") if event["event"] == "tracking writes"]
        assert [event["quiesced"] for event in armed] == [True]
        scans = [event for event in guest.hosts[0].events("source") if event["event"] == "quiesced scan"]
        assert len(scans) == (0 if mode == "postcopy" else 1)
        await guest.move(mode=mode, downtime_limit_ms=2000)
        await _reads_go_on(guest)


async def test_a_guest_without_direct_reads_is_not_stopped_for_its_scans() -> None:
    async with moving_guest(kind="boot", load=CALM) as guest:
        await guest.move()
        armed = [event for event in guest.hosts[0].events("source") if event["event"] == "tracking writes"]
        assert [event["quiesced"] for event in armed] == [False]
