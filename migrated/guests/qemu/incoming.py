"""Take over the faults of an incoming QEMU before it touches a page of our memory.

This module finds where QEMU maps the memory and registers those mappings with a userfaultfd made in QEMU.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from migrated.errors import GuestError, GuestRefusedError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.driver import FaultSource
from migrated.guests.qemu.command import regions_differ
from migrated.guests.qemu.process import ManagedQemu
from migrated.memory.maps import Area, areas, file_key, mapped_elsewhere
from migrated.memory.native import uffd_register
from migrated.memory.regions import Mapping, TargetMemory
from migrated.memory.smaps import mapped_areas
from migrated.waiting import in_thread


async def take_faults(
    guest: str, process: PidHandle, memory: tuple[TargetMemory, ...], open_uffd: Callable[[], Awaitable[int]]
) -> FaultSource:
    """Register all of our memory that QEMU maps with a userfaultfd made in QEMU; none is in its page tables."""
    mappings = await find_mappings(guest, process.pid, memory)
    uffd = await open_uffd()
    await _empty_page_tables(process, mappings)
    for mapping in mappings:
        uffd_register(uffd, mapping.address, mapping.length_bytes, missing=True, minor=True, tracking=False)
    # What QEMU populated between the two steps would never be reported.
    if present := await _present(process.pid, mappings):
        raise GuestRefusedError(
            f"guest {guest}: QEMU has touched its memory before it arrived, at {present[0].address:#x}",
            code="memory-preallocated",
            hint="something in the command (a device, a display) uses guest memory on an incoming QEMU: remove it",
        )
    return FaultSource(pid=process.pid, uffd=uffd, mappings=mappings)


async def find_mappings(guest: str, pid: int, memory: tuple[TargetMemory, ...]) -> tuple[Mapping, ...]:
    """Find where QEMU maps our memory: each region whole and once."""
    found: list[Mapping] = []
    every = areas(pid)
    for index, item in enumerate(memory):
        key = file_key(item.memory_fd)
        ours: list[Area] = [area for area in every if area.key == key]
        ends = {area.offset + area.end - area.start for area in ours}
        starts = {area.offset for area in ours}
        covered = sum(area.end - area.start for area in ours)
        whole = covered == item.region.size_bytes and starts - ends == {0} and ends - starts == {covered}
        if not whole or not all(area.shared for area in ours):
            raise regions_differ(
                guest,
                f"QEMU maps {covered} of the {item.region.size_bytes} bytes made for {item.region.name}, or not as one",
            )
        found += [Mapping(index, area.start, area.offset, area.end - area.start) for area in ours]
    keys = frozenset(file_key(item.memory_fd) for item in memory)
    # We exclude ourselves: the alias is not the guest's.
    for other in await asyncio.to_thread(mapped_elsewhere, keys, (pid, os.getpid())):
        raise GuestRefusedError(
            f"guest {guest}: its memory is also mapped by {other}",
            code="memory-mapped-elsewhere",
            hint="vhost-user back ends cannot take part in a move yet",
        )
    return tuple(found)


async def _present(pid: int, mappings: tuple[Mapping, ...]) -> list[Mapping]:
    """Return the mappings that have pages in QEMU's page tables, or that are locked there."""
    ranges = [(mapping.address, mapping.address + mapping.length_bytes) for mapping in mappings]
    states = await asyncio.to_thread(mapped_areas, pid, ranges)
    present = [state.area for state in states if state.present_bytes]
    return [
        mapping
        for mapping, (start, end) in zip(mappings, ranges, strict=True)
        if any(area.start < end and start < area.end for area in present)
    ]


async def _empty_page_tables(process: PidHandle, mappings: tuple[Mapping, ...]) -> None:
    """Empty the page tables: pages that QEMU has preallocated or locked would never fault."""
    for mapping in await _present(process.pid, mappings):
        await in_thread(injection.empty_page_tables, process, mapping.address, mapping.length_bytes)


async def adopt(
    guest: str, qemu: ManagedQemu[Any], pid: int, uffd: int, memory: tuple[TargetMemory, ...]
) -> FaultSource:
    """Take over the QEMU of an agent that has exited, with the userfaultfd that was kept.  Raises ``guest-gone``."""
    process = PidHandle.attach(pid)
    try:
        remote = injection.find_remote(pid, uffd)
        if remote is None:
            raise GuestError(
                f"guest {guest}: process {pid} does not hold the userfaultfd of this migration", code="guest-gone"
            )
        mappings = await find_mappings(guest, pid, memory)
    except BaseException:
        process.close()
        raise
    qemu.adopt(process, injection.InjectedUffd(process, uffd, remote, 0.0))
    return FaultSource(pid=pid, uffd=uffd, mappings=mappings)
