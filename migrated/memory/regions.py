"""Describe guest memory for every layer: regions, where a process maps them, and the files behind them.

A driver finds or makes them (`migrated.guests.driver`); engines and trackers work on them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """A piece of a region in the guest process: ``[address, address+length)`` shows the region from ``offset`` on."""

    region: int
    address: int
    offset: int
    length_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """One contiguous piece of guest memory in one file.

    ``name`` pairs the regions of the two sides (QEMU: the name of the RAM block).
    ``page_bytes`` is the page size of the memory behind it: 4096, 2 MiB, 1 GiB.
    ``device``: memory of a device or of the firmware, which the target keeps on 4 KiB pages whatever page size the
    guest's RAM has.
    """

    name: str
    size_bytes: int
    page_bytes: int
    device: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SourceMemory:
    """Where the running guest's memory is.

    ``memory_fds[i]`` is open on the file of ``regions[i]``, which starts at ``file_offsets[i]``; the driver closes the
    descriptors in `SourceGuest.close`.  It is only read, but should be open for writing, too: see `maps.open_area`.

    ``private[i]``: the region is private memory of the process ``pid`` (anonymous, on huge pages, or a private mapping
    of a file).  Then ``memory_fds[i]`` is open for reading on ``/proc/PID/mem`` (several regions may share it), and
    ``file_offsets[i]`` is the address at which the region begins there; its one mapping has that address and offset 0.
    ``file_behind[i]``: a private mapping of a file.  Pages that the guest has not touched show the file, so the whole
    region is read and sent.

    Both have one entry per region; if they are left out, no region is private.
    """

    pid: int
    regions: tuple[Region, ...]
    mappings: tuple[Mapping, ...]
    memory_fds: tuple[int, ...]
    file_offsets: tuple[int, ...]
    private: tuple[bool, ...] = ()
    file_behind: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("private", "file_behind"):
            object.__setattr__(self, name, getattr(self, name) or (False,) * len(self.regions))


@dataclasses.dataclass(frozen=True, slots=True)
class TargetMemory:
    """One region that the agent prepared for the incoming guest: a memfd of ``region.size_bytes``, empty.

    ``reserve``: mapping it reserves its pages.  False: they are already reserved, or are taken as they are needed.
    """

    region: Region
    memory_fd: int
    reserve: bool = True
