"""The mappings of a process as `/proc` tells them, and who else maps the same file."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)$")
_FIELD = re.compile(r"^(\w+): +(\d+) kB$")


@dataclasses.dataclass(frozen=True, slots=True)
class Area:
    """One line of `/proc/PID/maps`: ``[start, end)`` shows the file ``(device, inode)`` from ``offset`` on."""

    start: int
    end: int
    shared: bool
    offset: int
    device: str
    inode: int
    path: str


@dataclasses.dataclass(frozen=True, slots=True)
class Residence:
    """What `/proc/PID/smaps` says of an area: bytes mapped right now, whether locked, which userfaultfd modes."""

    area: Area
    present_bytes: int
    locked: bool
    flags: frozenset[str]


def _area(line: str) -> Area | None:
    match = _LINE.match(line)
    if match is None:
        return None
    start, end, permissions, offset, device, inode, path = match.groups()
    return Area(int(start, 16), int(end, 16), permissions[3] == "s", int(offset, 16), device, int(inode), path)


def areas(pid: int) -> list[Area]:
    """All of them, in address order.  Raises OSError (no such process, no right)."""
    text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape")
    return [area for line in text.splitlines() if (area := _area(line)) is not None]


def file_key(fd: int) -> tuple[str, int]:
    """Device and inode of an open file, as `Area` has them."""
    status = os.fstat(fd)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


def residences(pid: int, keys: frozenset[tuple[str, int]]) -> list[Residence]:
    """Shared mappings of these files.  Walks the whole process's page tables: cheap only while they are empty."""
    found: list[Residence] = []
    area: Area | None = None
    present = 0
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if (head := _area(line)) is not None:
            area, present = head, 0
        elif area is None or (area.device, area.inode) not in keys:
            continue
        elif (field := _FIELD.match(line)) is not None:
            if field[1] in {"Rss", "Shared_Hugetlb", "Private_Hugetlb"}:
                present += int(field[2]) * 1024
        elif line.startswith("VmFlags:"):
            flags = frozenset(line.split()[1:])
            found.append(Residence(area, present, "lo" in flags, flags))
    return found


def mapped_elsewhere(keys: frozenset[tuple[str, int]], pid: int) -> list[tuple[int, str]]:
    """Other processes that map one of these files: (pid, command name)."""
    found = []
    for entry in (path.name for path in Path("/proc").iterdir()):
        if not entry.isdigit() or int(entry) == pid:
            continue
        try:
            if any((area.device, area.inode) in keys for area in areas(int(entry))):
                found.append((int(entry), Path(f"/proc/{entry}/comm").read_text(encoding="utf-8").strip()))
        except OSError:
            continue  # ended meanwhile, or a kernel thread
    return found
