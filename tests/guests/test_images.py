"""The test guests are worth believing: they boot, work, sweep their memory, and notice when it is not what they wrote."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrated.demo.console import GuestConsole
from migrated.demo.images import build_bootsector, build_disk, build_linux_guest
from migrated.demo.qemu_guest import QEMU
from migrated.demo.run import cache_directory

MIB = 1 << 20
LIMIT = 60.0

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason="QEMU is not installed"),
]


@pytest.fixture(scope="module")
def cache() -> Path:
    """The one of all tests: the kernel comes from the network, a hundred megabytes."""
    return cache_directory()


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="mg") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def running(short: Path, accel: str, mib: int, arguments: list[str]) -> AsyncIterator[tuple[GuestConsole, int]]:
    """A guest with one shared memory backend; its console, and a descriptor of its memory."""
    memory = os.memfd_create("guest", 0)
    os.ftruncate(memory, mib * MIB)
    backend = f"memory-backend-file,id=ram,size={mib}M,share=on,mem-path=/proc/self/fd/{memory}"
    process = await asyncio.create_subprocess_exec(
        *(QEMU, "-accel", accel, "-m", f"{mib}M", "-object", backend, "-machine", "pc,memory-backend=ram"),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"unix:{short}/con,server=on,wait=off"),
        *arguments,
        pass_fds=(memory,),
    )
    console = GuestConsole()
    try:
        await console.attach(short / "con")
        await console.wait_booted(LIMIT)
        yield console, memory
    finally:
        await console.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(memory)


def boot_drive(image: Path) -> list[str]:
    return ["-drive", f"file={image},format=raw,if=ide,snapshot=on"]


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
@pytest.mark.parametrize("pattern", ["sparse", "dense"])
async def test_the_boot_sector_guest_works_and_sweeps(short: Path, cache: Path, accel: str, pattern: str) -> None:
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no KVM")
    image = build_bootsector(cache, pattern=pattern, sweep_seconds=1)
    async with running(short, accel, 32, boot_drive(image)) as (console, _):
        first = await console.stats(LIMIT)
        later = await console.wait_for(lambda load: load.sweeps > first.sweeps, LIMIT, "a sweep")
        assert later.operations > first.operations
        assert (await console.sweep(LIMIT)).blocks > 30 * MIB // 4096 - 64
        assert await console.verified(LIMIT)


async def test_a_load_with_a_size_and_a_rate_keeps_to_them(short: Path, cache: Path) -> None:
    image = build_bootsector(cache, size_bytes=4 * MIB, rate=100)
    async with running(short, "tcg", 32, boot_drive(image)) as (console, _):
        load = await console.wait_for(lambda load: load.seconds >= 1, LIMIT, "a second of work")
        assert load.operations <= 100 * load.seconds + 10
        assert (await console.sweep(LIMIT)).blocks <= 4 * MIB // 4096


async def test_one_changed_bit_is_found_and_told(short: Path, cache: Path) -> None:
    image = build_bootsector(cache, pattern="idle", sweep_seconds=0)
    async with running(short, "tcg", 32, boot_drive(image)) as (console, memory):
        assert await console.verified(LIMIT)
        with mmap.mmap(memory, 32 * MIB) as view:
            view[16 * MIB + 1234] ^= 1
        swept = await console.sweep(LIMIT)
        assert swept.wrong == 1
        assert not await console.verified(LIMIT)
        assert "CORRUPT" in console.corrupt[0]


async def test_a_block_rolled_back_to_an_older_state_is_found(short: Path, cache: Path) -> None:
    image = build_bootsector(cache, pattern="dense", sweep_seconds=0)
    async with running(short, "tcg", 16, boot_drive(image)) as (console, memory):
        with mmap.mmap(memory, 16 * MIB) as view:
            old = view[8 * MIB : 8 * MIB + 4096]
            start = (await console.stats(LIMIT)).operations
            await console.wait_for(lambda load: load.operations > start + 3 * 4096, LIMIT, "a turn over all blocks")
            view[8 * MIB : 8 * MIB + 4096] = old
        assert (await console.sweep(LIMIT)).errors >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first one fetches the kernel
async def test_the_linux_guest_checks_memory_and_direct_disk_reads(short: Path, cache: Path) -> None:
    disk = build_disk(short / "disk", 4 * MIB)
    arguments = build_linux_guest(cache).arguments(rate=500, disk="/dev/vda", size="40%")
    arguments += ["-drive", f"file={disk},format=raw,if=virtio"]
    async with running(short, "tcg", 192, arguments) as (console, _):
        first = await console.stats(LIMIT)
        await console.wait_for(lambda load: load.disk_reads > first.disk_reads + 100, LIMIT, "disk reads")
        assert await console.verified(LIMIT)
