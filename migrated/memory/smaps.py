"""Read ``/proc/PID/smaps``: how much of its memory a process has mapped at the moment.

The ``VmFlags`` there also show which faults a userfaultfd gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection

from migrated import privileged
from migrated.errors import GuestError
from migrated.memory.maps import Area, parse

_FIELD = re.compile(r"^(\w+): +(\d+) kB$")
_PRESENT = frozenset({"Rss", "Shared_Hugetlb", "Private_Hugetlb"})


@dataclasses.dataclass(frozen=True, slots=True)
class MappedArea:
    """An area; the page size it is mapped with; the bytes of it that are mapped; its ``VmFlags``.

    Flags: ``lo`` locked; ``um``, ``ui``, ``uw``: a userfaultfd gets missing pages, minor faults, writes.
    """

    area: Area
    page_bytes: int
    present_bytes: int
    flags: frozenset[str]


def mapped_areas(pid: int, ranges: Collection[tuple[int, int]]) -> list[MappedArea]:
    """Return the areas that overlap one of these ranges, each ``(start, end)``.  Raises GuestError ``guest-gone``.

    Walks all page tables of the process (``smaps``): fast only while they hold little.
    """
    found: list[MappedArea] = []
    area: Area | None = None
    sizes: dict[str, int] = {}
    try:
        text = privileged.read_file(pid, "smaps")
    except OSError as error:
        raise GuestError(f"process {pid} has exited, or hides its memory from us", code="guest-gone") from error
    for line in text.splitlines():
        if field := _FIELD.match(line):
            sizes[field[1]] = int(field[2]) << 10
        elif line.startswith("VmFlags:"):
            if area is not None and any(area.start < end and start < area.end for start, end in ranges):
                present = sum(sizes.get(name, 0) for name in _PRESENT)
                found.append(MappedArea(area, sizes["KernelPageSize"], present, frozenset(line.split()[1:])))
        else:
            # This is the first line of the next area, or a field in other units (THPeligible, ProtectionKey).
            with contextlib.suppress(ValueError):
                area, sizes = parse(line)[0], {}
    return found
