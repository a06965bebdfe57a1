"""What QEMU says of its RAM blocks, version by version, and what a process's mappings make of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from migrated.errors import GuestRefusedError
from migrated.guests.qemu import memory as qemu_memory
from migrated.guests.qemu.memory import locate_blocks, ram_blocks
from migrated.memory import maps

OLD = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000000400000 0x0000000000400000
   0000:00:02.0/vga.vram    4 KiB  0x0000000010080000 0x0000000000200000 0x0000000000200000
    /rom@etc/acpi/tables    4 KiB  0x0000000011140000 0x0000000000020000 0x0000000000200000
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000
0000:00:04.0/virtio-net-pci.rom    4 KiB  0x0000000011100000 0x0000000000040000 0x0000000000040000
"""
NEW = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
           /objects/ram0    2 MiB  0x0000000000000000 0x0000000000400000 0x0000000000400000 0x00007f0000000000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000011140000 0x0000000000020000 0x0000000000200000 0x00007f0010000000  ro
"""
MTREE = """\
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-00000000003fffff (prio 0, ram): pc.ram @0000000000100000

FlatView #1
 AS "I/O", root: io
"""


class FakeMonitor:
    """Answers what a real one was seen to answer."""

    guest = "vm"

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    async def hmp(self, line: str) -> str:
        return self._answers[line].replace("\n", "\r\n")


def monitor(**answers: str) -> Any:
    return FakeMonitor({key.replace("_", " "): value for key, value in answers.items()})


MapsOf = Callable[[str], None]


@pytest.fixture
def maps_of(monkeypatch: pytest.MonkeyPatch) -> MapsOf:
    """Make the process's mappings these."""

    def use(text: str) -> None:
        monkeypatch.setattr(qemu_memory, "areas", lambda _: maps.parse(text))

    return use


async def test_blocks_of_an_old_qemu_have_no_address() -> None:
    blocks = await ram_blocks(monitor(info_ramblock=OLD))
    assert [(block.name, block.page_bytes, block.used_bytes, block.size_bytes, block.rom) for block in blocks] == [
        ("pc.ram", 4096, 4 << 20, 4 << 20, False),
        ("0000:00:02.0/vga.vram", 4096, 2 << 20, 2 << 20, False),
        ("/rom@etc/acpi/tables", 4096, 0x20000, 2 << 20, True),
        ("pc.bios", 4096, 0x40000, 0x40000, True),
        ("0000:00:04.0/virtio-net-pci.rom", 4096, 0x40000, 0x40000, True),
    ]
    assert {block.address for block in blocks} == {None}


async def test_blocks_of_a_new_qemu_have_one() -> None:
    ram, tables = await ram_blocks(monitor(info_ramblock=NEW))
    assert (ram.id, ram.name, ram.page_bytes, ram.address, ram.rom) == (
        "/objects/ram0",
        "ram0",
        2 << 20,
        0x7F0000000000,
        False,
    )
    assert (tables.used_bytes, tables.size_bytes, tables.rom) == (0x20000, 2 << 20, True)


RAM = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \n"
BIOS = "7f0001000000-7f0001040000 rw-p 00000000 00:00 0 \n"
VGA = "7f0002000000-7f0002200000 rw-p 00000000 00:00 0 \n"
GPA = {
    "info ramblock": OLD,
    "info mtree -f": MTREE,
    "gpa2hva 0x0000000000000000": "Host virtual address for 0x0 (pc.ram) is 0x7f0000000000\n",
    "gpa2hva 0x00000000000e0000": "Host virtual address for 0xe0000 (pc.bios) is 0x7f0001020000\n",
}


async def test_a_block_that_is_not_visible_is_found_by_its_size(maps_of: MapsOf) -> None:
    maps_of(RAM + BIOS + VGA + "7f0003000000-7f0003200000 rw-p 00000000 00:00 0 [heap]\n")
    old: Any = FakeMonitor(GPA)
    located = {item.block.name: item.address for item in await locate_blocks(old, os.getpid(), await ram_blocks(old))}
    # The ROMs that QEMU shows nowhere are left to the target's QEMU.
    assert located == {
        "pc.ram": 0x7F0000000000,
        "0000:00:02.0/vga.vram": 0x7F0002000000,
        "pc.bios": 0x7F0001000000,
    }


@pytest.mark.parametrize("second", ["7f0003000000-7f0003200000 rw-p 00000000 00:00 0 \n", None])
async def test_a_writable_block_that_cannot_be_told_is_refused(maps_of: MapsOf, second: str | None) -> None:
    maps_of(RAM + BIOS + (VGA + second if second else ""))
    old: Any = FakeMonitor(GPA)
    with pytest.raises(GuestRefusedError, match=r"vga\.vram.*2097152") as caught:
        await locate_blocks(old, os.getpid(), await ram_blocks(old))
    assert caught.value.code == "memory-not-found"


TABLES = "7f0010000000-7f0010200000 rw-p 00000000 00:00 0 \n"
FILE = "rw-s {offset} 00:01 77 /memfd:ram (deleted)\n"


async def test_private_memory_may_be_part_of_a_larger_mapping(maps_of: MapsOf) -> None:
    maps_of("7eff00000000-7f0000400000 rw-p 00000000 00:00 0 \n" + TABLES)
    new = monitor(info_ramblock=NEW)
    ram, _ = await locate_blocks(new, os.getpid(), await ram_blocks(new))
    assert (ram.address, ram.shared, ram.shows_file) == (0x7F0000000000, False, False)


async def test_shared_memory_may_be_split_and_begin_inside_its_file(maps_of: MapsOf) -> None:
    split = (
        "7f0000000000-7f0000200000 "
        + FILE.format(offset="00600000")
        + "7f0000200000-7f0000400000 "
        + FILE.format(offset="00800000")
    )
    maps_of(split + TABLES)
    new = monitor(info_ramblock=NEW)
    ram, _ = await locate_blocks(new, os.getpid(), await ram_blocks(new))
    assert (ram.shared, ram.file_offset, len(ram.areas)) == (True, 0x600000, 2)
    assert (ram.mapping(3).region, ram.mapping(3).length_bytes) == (3, 4 << 20)


@pytest.mark.parametrize(
    "text",
    [
        "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n",
        "7f0000001000-7f0000400000 rw-p 00000000 00:00 0 \n",
        "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n7f0000201000-7f0000400000 rw-p 00000000 00:00 0 \n",
        "7f0000000000-7f0000200000 rw-s 00000000 00:01 77 /a\n7f0000200000-7f0000400000 rw-s 00000000 00:01 77 /a\n",
        "7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n7f0000200000-7f0000400000 rw-s 00000000 00:01 77 /a\n",
    ],
    ids=["short", "late", "gap", "same piece twice", "mixed"],
)
async def test_a_block_that_is_not_one_mapping_is_refused(maps_of: MapsOf, text: str) -> None:
    maps_of(text + TABLES)
    new = monitor(info_ramblock=NEW)
    with pytest.raises(GuestRefusedError, match="ram0") as caught:
        await locate_blocks(new, os.getpid(), await ram_blocks(new))
    assert caught.value.code == "memory-not-found"


async def test_memory_that_the_process_maps_twice_is_refused(maps_of: MapsOf) -> None:
    once = "7f0000000000-7f0000400000 " + FILE.format(offset="00000000")
    maps_of(once + TABLES + "7f0020000000-7f0020001000 " + FILE.format(offset="003ff000"))
    new = monitor(info_ramblock=NEW)
    with pytest.raises(GuestRefusedError) as caught:
        await locate_blocks(new, os.getpid(), await ram_blocks(new))
    assert caught.value.code == "memory-mapped-elsewhere"
