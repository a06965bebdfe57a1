"""A guest that writes and checks its memory all the time migrates there and back, in every mode, from every kind of memory.

Each test starts a guest of its own: only the first migration is away from the memory that its QEMU was started with.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guests.conftest import KVM
from tests.rig import supervisor
from tests.rig.guest import MIB, moving_guest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.usefixtures("page_pool"),
]

MODES = ["hybrid", "precopy", "postcopy"]
#: Where the first QEMU has the guest's memory; on the second host it is on 2 MiB pages.
MEMORY: dict[str, dict[str, Any]] = {
    "private": {"memory": "private", "page_bytes": (4096, 2 * MIB)},
    "private-without-thp": {"memory": "private-small", "page_bytes": (4096, 2 * MIB)},
    "memfd-4k": {"page_bytes": (4096, 2 * MIB)},
    "memfd-2m": {"page_bytes": (2 * MIB, 2 * MIB)},
    "hugetlbfs-file": {"memory": "file", "page_bytes": (2 * MIB, 2 * MIB)},
    "two-private-backends": {"memory": "private", "regions": 2, "page_bytes": (4096, 2 * MIB)},
}
GUESTS: dict[str, dict[str, Any]] = {
    "linux-tcg": {
        "kind": "linux",
        "accel": "tcg",
        "memory_bytes": 192 * MIB,
        "load": {"size": "60%", "rate": 2000, "pattern": "hot"},
    },
    "boot-kvm": {
        "kind": "boot",
        "accel": "kvm",
        "memory_bytes": 128 * MIB,
        "load": {"rate": 2000, "pattern": "hot", "sweep_seconds": 0},
    },
}


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs of 2 MiB pages."""
    with supervisor.undoing("umount", "-l", str(tmp_path)):
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", tmp_path], check=True)
        try:
            yield tmp_path
        finally:
            subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("guest", GUESTS)
async def test_a_guest_arrives_whole_and_comes_back(guest: str, memory: str, mode: str, hugetlbfs: Path) -> None:
    if guest == "boot-kvm" and not KVM.exists():
        pytest.skip(f"{KVM} is not there")
    shape = {**GUESTS[guest], **MEMORY[memory]}
    async with moving_guest(**shape, hugetlbfs=hugetlbfs) as moving:
        there = await moving.move(mode=mode, downtime_limit_ms=2000)
        assert there.source["mode"] == mode
        assert there.source["page_size"] == there.target["page_size"] == 2 * MIB
        assert there.source["total_bytes"] > shape["memory_bytes"]  # firmware, ROMs and ACPI tables too
        if mode == "postcopy":
            assert there.source["round"] == 0
            assert there.source["stale_pages"] > 0
            assert there.target["faults"]["stale"] > 0
        if mode == "precopy":
            assert there.source["stale_pages"] == 0
        back = await moving.move(mode=mode, downtime_limit_ms=2000)
        assert back.target["page_size"] == shape["page_bytes"][0]


async def test_a_frame_buffer_full_of_noise_arrives_with_the_guest(accel: str) -> None:
    """Video memory is a region like RAM: it is copied while the guest runs, whatever is in it."""
    async with moving_guest(
        kind="boot", accel=accel, memory="private", load=GUESTS["boot-kvm"]["load"], extra=("-vga", "std")
    ) as moving:
        await moving.fill_video_memory()
        there = await moving.move(mode="precopy", downtime_limit_ms=2000)
        assert there.source["transferred_bytes"] > 16 * MIB
        await moving.assert_video_memory()
        await moving.move(mode="postcopy")
        await moving.assert_video_memory()
