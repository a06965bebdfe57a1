"""Find where a QEMU process keeps its RAM blocks: guest RAM, video memory, ROMs, ACPI tables.

QEMU migrates RAM blocks by name, so both sides of a migration pair their memory by these names.  QEMU 8.0 and newer
print the host address of each block in ``info ramblock``.  For older ones, ``info mtree -f`` gives the guest-physical
address at which a block is visible, and ``gpa2hva`` translates that address.  A block that is not visible at the moment
(a BAR that is not enabled, as on every incoming QEMU) is found by its size, if exactly one mapping has it.

ROM blocks that an old QEMU shows nowhere are left out: QEMU fills them itself on both sides.  A writable block that
cannot be found is refused.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import re
import struct
from collections.abc import Iterable
from typing import Any

from migrated.errors import GuestRefusedError
from migrated.guests.qemu.qmp import MonitorCommands
from migrated.memory.maps import Area, areas
from migrated.memory.regions import Mapping, Region
from migrated.privileged import open_files
from migrated.units import parse_size

_HUGETLBFS = 0x958458F6
_TMPFS = 0x01021994
BASE_PAGE_BYTES = 4096

# Block Name, PSize, Offset, Used, Total; since QEMU 8.0 also the host address, since 8.1 whether the block is a ROM.
_RAMBLOCK = re.compile(
    r"^ *(\S+) +(\d+) ([KMGTPE]?)i?B +0x\w+ +0x(\w+) +0x(\w+)(?: +0x(\w+)(?: +(ro|rw))?)? *\r?$", re.MULTILINE
)
_FLAT_RANGE = re.compile(
    r"^ +([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, (?:ram|rom|romd|nv-dimm)\): (\S+)(?: @([0-9a-f]+))?", re.MULTILINE
)
_GPA2HVA = re.compile(r"\((.*)\) is 0x([0-9a-f]+)")
_OBJECTS = "/objects/"

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A RAM block.

    ``id`` is QEMU's name for it; ``name`` is the same without ``/objects/``, which only some versions put before the id
    of a memory backend.  ``size_bytes`` is the mapped size, ``used_bytes`` the size that the guest sees: they differ
    for resizable blocks.  ``address``: where it begins in the process, if QEMU reports it.
    """

    id: str
    page_bytes: int
    used_bytes: int
    size_bytes: int
    address: int | None
    rom: bool

    @property
    def name(self) -> str:
        """The name by which the two sides of a migration pair the block."""
        return self.id.removeprefix(_OBJECTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """A memory backend that the guest uses, from ``query-memdev``."""

    name: str
    share: bool


@dataclasses.dataclass(frozen=True, slots=True)
class LocatedBlock:
    """A block and the areas that show it, in address order, without a gap."""

    block: Block
    address: int
    areas: tuple[Area, ...]

    @property
    def shared(self) -> bool:
        """Whether the block is in a file that others can map too."""
        return self.areas[0].shared

    @property
    def file_offset(self) -> int:
        """Where the block begins in its file, if it is shared."""
        return self.areas[0].offset + self.address - self.areas[0].start

    @property
    def shows_file(self) -> bool:
        """Whether private memory shows a file's content where the guest has written nothing."""
        return not self.shared and self.areas[0].inode != 0 and self.block.page_bytes == BASE_PAGE_BYTES

    def mapping(self, region: int) -> Mapping:
        """Return the block as a mapping of the driver contract."""
        return Mapping(region, self.address, 0, self.block.size_bytes)


# ---------------------------------------------------------------- asking QEMU


async def ram_blocks(monitor: MonitorCommands) -> tuple[Block, ...]:
    """Return every RAM block that QEMU would migrate, in QEMU's order."""
    found = []
    for match in _RAMBLOCK.finditer(await monitor.hmp("info ramblock")):
        ident, pages, unit, used, total, address, kind = match.groups()
        if int(total, 16) == 0:
            continue
        found.append(
            Block(
                id=ident,
                page_bytes=parse_size(f"{pages}{unit}"),
                used_bytes=int(used, 16),
                size_bytes=int(total, 16),
                address=int(address, 16) if address is not None and int(address, 16) else None,
                rom=kind == "ro" if kind is not None else _named_as_rom(ident),
            )
        )
    return tuple(found)


def _named_as_rom(ident: str) -> bool:
    return ident.endswith(".rom") or ident.startswith("/rom@") or ident in {"pc.bios", "isa-bios"}


async def backends(monitor: MonitorCommands, blocks: Iterable[Block]) -> tuple[Backend, ...]:
    """Return the memory backends among the blocks; a backend that was never plugged in holds no guest memory."""
    names = {block.name for block in blocks}
    return tuple(
        Backend(memdev["id"], bool(memdev.get("share", False)))
        for memdev in await monitor.execute("query-memdev")
        if memdev.get("id") in names
    )


async def machine_type(monitor: MonitorCommands) -> str:
    """Return the concrete machine type (``pc-q35-7.2``), which QEMU's stream names."""
    kind = str(await monitor.execute("qom-get", {"path": "/machine", "property": "type"}))
    return kind.removesuffix("-machine")


async def version(monitor: MonitorCommands) -> tuple[int, int, int]:
    """Return QEMU's version."""
    found = (await monitor.execute("query-version"))["qemu"]
    return int(found["major"]), int(found["minor"]), int(found["micro"])


# ---------------------------------------------------------------- finding the blocks in the process


async def locate_blocks(monitor: MonitorCommands, pid: int, blocks: Iterable[Block]) -> tuple[LocatedBlock, ...]:
    """Find the blocks in process ``pid``.

    Raises GuestRefusedError ``memory-not-found`` for a writable block that cannot be found, and ``memory-mapped-elsewhere``
    for one that the process maps a second time.
    """
    wanted = tuple(blocks)
    addresses = {block.id: block.address for block in wanted if block.address is not None}
    if len(addresses) < len(wanted):
        addresses |= await _visible(monitor, [block for block in wanted if block.id not in addresses])
    every = areas(pid)
    located = [cover(monitor.guest, every, block, addresses[block.id]) for block in wanted if block.id in addresses]
    for block in wanted:
        if block.id not in addresses and not block.rom:
            located.append(_only_candidate(monitor.guest, every, block, located))
    _refuse_second_view(monitor.guest, pid, every, located)
    order = {block.id: index for index, block in enumerate(wanted)}
    return tuple(sorted(located, key=lambda item: order[item.block.id]))


async def _visible(monitor: MonitorCommands, blocks: list[Block]) -> dict[str, int]:
    """Return the addresses of the blocks that the guest has mapped at the moment."""
    found: dict[str, int] = {}
    for view in (await monitor.hmp("info mtree -f")).replace("\r", "").split("FlatView #"):
        if 'AS "memory"' not in view:
            continue
        for match in _FLAT_RANGE.finditer(view):
            # A memory region's name lacks the device that its block is named after.
            named = [block for block in blocks if block.id == match[2] or block.id.endswith(f"/{match[2]}")]
            if len(named) != 1 or named[0].id in found:
                continue
            answer = _GPA2HVA.search(await monitor.hmp(f"gpa2hva 0x{match[1]}"))
            if answer is not None and answer[1] == match[2]:
                found[named[0].id] = int(answer[2], 16) - int(match[3] or "0", 16)
    return found


def cover(guest: str, every: list[Area], block: Block, address: int) -> LocatedBlock:
    """Return the areas that show the block: adjacent, and all private or all of one file."""
    end = address + block.size_bytes
    covering = tuple(area for area in every if area.end > address and area.start < end)
    whole = bool(covering) and covering[0].start <= address and covering[-1].end >= end
    if not whole or not all(_continues(before, after) for before, after in itertools.pairwise(covering)):
        raise GuestRefusedError(
            f"guest {guest}: RAM block {block.id} is not one mapping of {block.size_bytes} bytes at {address:#x}",
            code="memory-not-found",
        )
    return LocatedBlock(block, address, covering)


def _continues(before: Area, after: Area) -> bool:
    """Whether ``after`` continues ``before`` in the address space and, if there is one, in the file."""
    if before.end != after.start or before.key != after.key or before.shared != after.shared:
        return False
    return not before.inode or after.offset - before.offset == after.start - before.start


def _only_candidate(guest: str, every: list[Area], block: Block, located: list[LocatedBlock]) -> LocatedBlock:
    """Return the one mapping that could be the block: writable, of its size, and not any other block's."""
    taken = [(item.address, item.address + item.block.size_bytes) for item in located]
    candidates = [
        area
        for area in every
        if area.length_bytes == block.size_bytes
        and area.permissions[:3] == "rw-"
        and not area.path.startswith("[")
        and not any(begin < area.end and area.start < end for begin, end in taken)
    ]
    if len(candidates) != 1:
        raise GuestRefusedError(
            f"guest {guest}: cannot tell which mapping of QEMU is RAM block {block.id} of {block.size_bytes} bytes: "
            f"{len(candidates)} could be it",
            code="memory-not-found",
            hint="QEMU 8.0 and newer say where each block is",
        )
    return LocatedBlock(block, candidates[0].start, (candidates[0],))


def _refuse_second_view(guest: str, pid: int, every: list[Area], located: list[LocatedBlock]) -> None:
    """Refuse a second mapping of the same memory in the process: tracking would not see writes through it."""
    for item in located:
        if not item.shared:
            continue
        begin, end = item.file_offset, item.file_offset + item.block.size_bytes
        for area in every:
            same = area.key == item.areas[0].key and area.offset < end and begin < area.offset + area.length_bytes
            if same and area not in item.areas:
                raise GuestRefusedError(
                    f"guest {guest}: QEMU (process {pid}) maps RAM block {item.block.id} twice",
                    code="memory-mapped-elsewhere",
                )


# ---------------------------------------------------------------- blocks as regions


def region(located: LocatedBlock, backends: Iterable[Backend], fd: int) -> Region:
    """Return the block as a region of the migration; ``fd`` is open on its memory.

    QEMU does not know that we map huge pages over a block that it made of small ones.
    """
    block = located.block
    huge = located.shared and _file_system(fd) == _HUGETLBFS
    page_bytes = os.fstat(fd).st_blksize if huge else block.page_bytes
    return Region(block.name, block.size_bytes, page_bytes, device=is_device(block, backends))


def is_device(block: Block, backends: Iterable[Backend]) -> bool:
    """Whether the block belongs to a device or to the firmware, not to a memory backend."""
    return block.name not in {backend.name for backend in backends}


def refuse_disk_file(guest: str, block: Block, fd: int) -> None:
    """Raise GuestRefusedError ``memory-unsupported`` for a file on disk: writes to it cannot be tracked."""
    if _file_system(fd) not in {_HUGETLBFS, _TMPFS}:
        raise GuestRefusedError(
            f"guest {guest}: RAM block {block.id} is a file of a kind whose writes cannot be tracked",
            code="memory-unsupported",
            hint="shared memory must be a memfd, or a file on hugetlbfs or tmpfs",
        )


def _file_system(fd: int) -> int:
    """Return f_type of fstatfs(2), which os.fstatvfs leaves out."""
    buffer = ctypes.create_string_buffer(512)
    if _LIBC.fstatfs(fd, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "fstatfs")
    return int(struct.unpack_from("l", buffer)[0]) & 0xFFFFFFFF


# ---------------------------------------------------------------- writers that tracking cannot see


def passed_through_devices(pid: int) -> list[str]:
    """Return the open device files through which hardware writes guest memory unseen."""
    links = set(open_files(pid).values())
    return sorted(
        link
        for link in links
        if link.startswith(("/dev/vfio/", "/dev/vhost-vdpa")) or link in {"/dev/iommu", "anon_inode:[vfio-device]"}
    )


async def disks_pin_buffers(monitor: MonitorCommands, pid: int) -> bool:
    """Whether a disk may read into pinned guest memory.

    Direct I/O does, an io_uring beside any disk may, and so does a host device: scsi-block hands the guest's buffers to
    SG_IO whatever the cache mode is.
    """
    nodes: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
    return any(node.get("cache", {}).get("direct", True) or node.get("drv") == "host_device" for node in nodes) or (
        bool(nodes) and "anon_inode:[io_uring]" in open_files(pid).values()
    )
