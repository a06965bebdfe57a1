"""Where a QEMU process has the memory of its guest: which mapping belongs to which memory backend.

QMP names backends and sizes, `/proc/PID/maps` has addresses and files, and nothing joins the two: every
``memory-backend-memfd`` has the same name in `/proc`, and two NUMA nodes have the same size.  So the address is asked of
QEMU itself: newer ones print it in ``info ramblock``; older ones translate a guest-physical address (``gpa2hva``), and
``info mtree -f`` says at which guest-physical address each backend is visible.  Only a backend that is not visible at the
moment (a device's, not mapped by the guest) is found by elimination, and refused when more than one mapping could be it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import struct
from typing import Any

from migrated.errors import GuestRefusedError
from migrated.guests.driver import Mapping, Region
from migrated.guests.pidfd import open_files
from migrated.guests.qmp import Monitor
from migrated.memory.maps import Area, areas

_HUGETLBFS = 0x958458F6
_TMPFS = 0x01021994
_PAGE_BYTES = 4096

_RAMBLOCK = re.compile(r"^ *(\S+) +\d+ [KMG]iB +0x\w+ +0x\w+ +0x(\w+)(?: +0x(\w+) +\w+)?", re.MULTILINE)
_FLAT_RANGE = re.compile(r"^ +([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, ram\): (\S+)(?: @([0-9a-f]+))?", re.MULTILINE)
_GPA2HVA = re.compile(r"\((.*)\) is 0x([0-9a-f]+)")

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """A memory backend that the guest uses, from ``query-memdev``."""

    name: str
    size_bytes: int
    share: bool
    prealloc: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """A backend and the mappings that show it, in address order, without a gap."""

    backend: Backend
    areas: tuple[Area, ...]

    @property
    def address(self) -> int:
        """Where it begins in the process."""
        return self.areas[0].start

    @property
    def file_offset(self) -> int:
        """Where it begins in its file."""
        return self.areas[0].offset

    def mappings(self, region: int) -> tuple[Mapping, ...]:
        """As the driver contract tells them."""
        return tuple(Mapping(region, a.start, a.start - self.address, a.end - a.start) for a in self.areas)


async def backends(monitor: Monitor) -> tuple[Backend, ...]:
    """The backends that are part of the guest, by name.

    One that was created and never plugged in holds nothing of the guest: QEMU has no name for its RAM block.
    Raises GuestRefusedError ``memory-not-in-backends`` when guest memory lies elsewhere.
    """
    blocks = {match[1] for match in _RAMBLOCK.finditer(await monitor.hmp("info ramblock"))}
    found = []
    for memdev in await monitor.execute("query-memdev"):
        name = memdev.get("id")
        if name is None or not {name, f"/objects/{name}"} & blocks:
            continue
        found.append(Backend(name, int(memdev["size"]), bool(memdev.get("share", False)), bool(memdev["prealloc"])))
    summary = await monitor.execute("query-memory-size-summary")
    total = int(summary["base-memory"]) + int(summary.get("plugged-memory", 0))
    inside = sum(backend.size_bytes for backend in found)
    if total > inside:
        raise GuestRefusedError(
            f"guest {monitor.guest}: {total - inside} bytes of its memory are in no memory backend",
            code="memory-not-in-backends",
            hint="give QEMU all memory as -object memory-backend-…,share=on with -machine memory-backend=ID (or -numa)",
        )
    return tuple(sorted(found, key=lambda backend: backend.name))


def refuse_private(guest: str, found: tuple[Backend, ...]) -> None:
    """Raises GuestRefusedError ``memory-not-shared`` naming the backends nobody else can reach."""
    private = [backend.name for backend in found if not backend.share]
    if private:
        raise GuestRefusedError(
            f"guest {guest}: memory backend {', '.join(private)} is private to QEMU (share=off)",
            code="memory-not-shared",
            hint="start QEMU with -object memory-backend-memfd (or -file),…,share=on and -machine memory-backend=ID",
        )


async def place(monitor: Monitor, pid: int, found: tuple[Backend, ...]) -> tuple[Placed, ...]:
    """Find each backend's mappings in process ``pid``.  Raises GuestRefusedError ``memory-not-found``."""
    addresses = await _addresses(monitor, found)
    shared = [area for area in areas(pid) if area.shared and area.inode]
    placed: dict[str, Placed] = {}
    for backend in found:
        if backend.name in addresses:
            placed[backend.name] = Placed(backend, _cover(monitor.guest, shared, backend, addresses[backend.name]))
    for backend in found:
        if backend.name not in placed:
            placed[backend.name] = Placed(backend, _only_candidate(monitor.guest, shared, backend, placed))
    _refuse_second_view(monitor.guest, pid, shared, tuple(placed.values()))
    return tuple(placed[backend.name] for backend in found)


async def _addresses(monitor: Monitor, found: tuple[Backend, ...]) -> dict[str, int]:
    """Host addresses, as far as QEMU tells them."""
    names = {form: backend.name for backend in found for form in (backend.name, f"/objects/{backend.name}")}
    addresses: dict[str, int] = {}
    for match in _RAMBLOCK.finditer(await monitor.hmp("info ramblock")):
        if match[1] in names and match[3] is not None:
            addresses[names[match[1]]] = int(match[3], 16)
    missing = {backend.name for backend in found} - addresses.keys()
    if not missing:
        return addresses
    for view in (await monitor.hmp("info mtree -f")).replace("\r", "").split("FlatView #"):
        if 'AS "memory"' not in view:
            continue
        for match in _FLAT_RANGE.finditer(view):
            name = match[2]
            if name not in missing:
                continue
            answer = _GPA2HVA.search(await monitor.hmp(f"gpa2hva 0x{match[1]}"))
            if answer is not None and answer[1] == name:
                addresses[name] = int(answer[2], 16) - int(match[3] or "0", 16)
                missing.discard(name)
    return addresses


def _run_from(shared: list[Area], address: int) -> list[Area]:
    """The areas from ``address`` on that continue one another in the address space and in one file."""
    by_start = {area.start: area for area in shared}
    run: list[Area] = []
    area = by_start.get(address)
    while area is not None:
        if run and (area.key != run[0].key or area.offset - run[0].offset != area.start - run[0].start):
            break
        run.append(area)
        area = by_start.get(area.end)
    return run


def _cover(guest: str, shared: list[Area], backend: Backend, address: int) -> tuple[Area, ...]:
    run = _run_from(shared, address)
    end = address + backend.size_bytes
    covering = tuple(area for area in run if area.start < end)
    if not covering or covering[-1].end != end:
        raise GuestRefusedError(
            f"guest {guest}: memory backend {backend.name} is not one shared mapping of {backend.size_bytes} bytes "
            f"at {address:#x}",
            code="memory-not-found",
        )
    return covering


def _only_candidate(guest: str, shared: list[Area], backend: Backend, placed: dict[str, Placed]) -> tuple[Area, ...]:
    taken = {area.start for other in placed.values() for area in other.areas}
    candidates = []
    for area in shared:
        if area.start in taken:
            continue
        run = _run_from(shared, area.start)
        if run and run[-1].end - area.start == backend.size_bytes:
            candidates.append(tuple(run))
    if len(candidates) != 1:
        raise GuestRefusedError(
            f"guest {guest}: cannot tell which mapping of QEMU is memory backend {backend.name} "
            f"({len(candidates)} could be it)",
            code="memory-not-found",
            hint="the guest has not mapped this device memory now; unplug it, or move the guest once its driver is loaded",
        )
    return candidates[0]


def _refuse_second_view(guest: str, pid: int, shared: list[Area], placed: tuple[Placed, ...]) -> None:
    """Writes through another mapping of the same bytes in the same process would not be seen (invariant 7)."""
    ours = {area.start for place_ in placed for area in place_.areas}
    for place_ in placed:
        first = place_.areas[0]
        begin, end = place_.file_offset, place_.file_offset + place_.backend.size_bytes
        for area in shared:
            same_file = area.key == first.key
            overlaps = area.offset < end and begin < area.offset + (area.end - area.start)
            if same_file and overlaps and (area.start not in ours or area not in place_.areas):
                raise GuestRefusedError(
                    f"guest {guest}: QEMU (process {pid}) maps memory backend {place_.backend.name} twice",
                    code="memory-mapped-elsewhere",
                )


def page_bytes(guest: str, backend: Backend, fd: int) -> int:
    """The page size of the memory behind ``fd``.  Raises GuestRefusedError ``memory-unsupported`` (a disk file)."""
    kind, block_bytes = _file_system(fd)
    if kind == _HUGETLBFS:
        return block_bytes
    if kind == _TMPFS:
        return _PAGE_BYTES
    raise GuestRefusedError(
        f"guest {guest}: memory backend {backend.name} is a file of a kind whose writes cannot be tracked",
        code="memory-unsupported",
        hint="memory must be a memfd, or a file on hugetlbfs or tmpfs",
    )


def _file_system(fd: int) -> tuple[int, int]:
    """f_type and f_bsize of fstatfs(2); os.fstatvfs leaves the type out."""
    buffer = ctypes.create_string_buffer(512)
    if _LIBC.fstatfs(fd, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "fstatfs")
    kind, block_bytes = struct.unpack_from("ll", buffer)
    return kind & 0xFFFFFFFF, block_bytes


def region(guest: str, backend: Backend, fd: int) -> Region:
    """The backend as a region of the migration."""
    return Region(backend.name, backend.size_bytes, page_bytes(guest, backend, fd))


def passed_through_devices(pid: int) -> list[str]:
    """Open device files through which hardware writes guest memory unseen."""
    links = set(open_files(pid).values())
    return sorted(
        link
        for link in links
        if link.startswith(("/dev/vfio/", "/dev/vhost-vdpa")) or link in {"/dev/iommu", "anon_inode:[vfio-device]"}
    )


async def disks_pin_buffers(monitor: Monitor, pid: int) -> bool:
    """Whether a disk may read into pinned guest memory: direct I/O, or an io_uring beside any disk."""
    nodes: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
    return any(node.get("cache", {}).get("direct", True) for node in nodes) or (
        bool(nodes) and "anon_inode:[io_uring]" in open_files(pid).values()
    )
