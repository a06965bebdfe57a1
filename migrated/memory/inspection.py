"""Report which memory of a process could be migrated: the substance of ``migrated inspect``.

For all other memory the report says what prevents it.
"""

from __future__ import annotations

import dataclasses
import itertools

from migrated.memory.maps import PROC, Area, FileKey, Process, areas, mapped_elsewhere
from migrated.memory.smaps import mapped_areas


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryFile:
    """Memory that may be a guest's: a file that a process maps shared, or one private area of it.

    ``path`` is empty for anonymous memory.  ``problem``: why it cannot be migrated; empty if it can.
    """

    path: str
    key: FileKey
    areas: tuple[Area, ...]
    page_bytes: int
    others: tuple[Process, ...]
    problem: str

    @property
    def size_bytes(self) -> int:
        """How much of it is mapped."""
        return sum(area.length_bytes for area in self.areas)

    @property
    def shared(self) -> bool:
        """Whether other processes may map it."""
        return self.areas[0].shared


def inspect(pid: int, *, least_bytes: int = 1 << 20, least_private_bytes: int = 16 << 20) -> list[MemoryFile]:
    """Return which memory of a process could be migrated and what prevents it: shared files first, then private memory.

    Files below ``least_bytes`` and private areas below ``least_private_bytes`` are left out: they are a program's own.
    Raises GuestError as `areas` does.
    """
    grouped: dict[FileKey, list[Area]] = {}
    private: list[Area] = []
    for area in areas(pid):
        if area.permissions[1] != "w":
            continue
        if area.shared and area.inode:
            grouped.setdefault(area.key, []).append(area)
        elif not area.shared and area.length_bytes >= least_private_bytes:
            private.append(area)
    shared = [group for group in grouped.values() if sum(area.length_bytes for area in group) >= least_bytes]
    every = [area for group in (*shared, private) for area in group]
    found = mapped_areas(pid, [(area.start, area.end) for area in every]) if every else []
    sizes = {residence.area.start: residence.page_bytes for residence in found}
    return [_inspect_file(pid, group, sizes) for group in shared] + [_inspect_private(area, sizes) for area in private]


def _inspect_file(pid: int, group: list[Area], sizes: dict[int, int]) -> MemoryFile:
    first = group[0]
    others = tuple(mapped_elsewhere({first.key}, {pid}))
    problem = ""
    if not _is_memory(first):
        problem = "a file on disk or of a device: its writes cannot be tracked"
    elif others:
        problem = "mapped by " + ", ".join(str(other) for other in others) + ", whose writes would not be seen"
    elif _overlap(group):
        problem = "mapped more than once in the process"
    return MemoryFile(first.path, first.key, tuple(group), sizes.get(first.start, 4096), others, problem)


def _inspect_private(area: Area, sizes: dict[int, int]) -> MemoryFile:
    anonymous = not area.inode
    problem = (
        "" if anonymous or _is_memory(area) else "a private mapping of a file on disk: its writes cannot be tracked"
    )
    return MemoryFile(area.path if not anonymous else "", area.key, (area,), sizes.get(area.start, 4096), (), problem)


def _is_memory(area: Area) -> bool:
    """Whether the file lives in memory: a memfd, shared anonymous memory, or a file on tmpfs or hugetlbfs."""
    if area.path.startswith(("/memfd:", "/anon_hugepage", "/dev/zero", "/SYSV")):
        return True
    return _file_systems().get(area.device, "") in {"tmpfs", "hugetlbfs", "devtmpfs"}


def _file_systems() -> dict[str, str]:
    """Return the kind of each mounted file system, by device as areas have it."""
    found = {}
    for line in (PROC / "self" / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        major, _, minor = before.split()[2].partition(":")
        found[f"{int(major):02x}:{int(minor):02x}"] = after.split()[0]
    return found


def _overlap(group: list[Area]) -> bool:
    pieces = sorted((area.offset, area.offset + area.length_bytes) for area in group)
    return any(before[1] > after[0] for before, after in itertools.pairwise(pieces))
