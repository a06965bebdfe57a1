"""The address space of a process, as ``/proc/PID/maps`` tells it: where a file is mapped, and who else maps it.

Dirty tracking sees writes through one process's page tables only.  So before a guest is moved every *other* process that
maps the same memory must be found (invariant 7); the file is recognised by device and inode, since a memfd's name says
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from migrated.errors import GuestError
from migrated.memory.regions import Mapping

PROC = Path("/proc")
_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *(.*)$")

#: Device and inode of a file, the device as ``/proc/PID/maps`` writes it.
FileKey = tuple[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Area:
    """One line of ``/proc/PID/maps``: ``[start, end)`` shows the file ``(device, inode)`` from ``offset`` on."""

    start: int
    end: int
    permissions: str  # "rw-s": readable, writable, executable, shared or private
    offset: int
    device: str  # "fe:00", hexadecimal
    inode: int
    path: str

    @property
    def length_bytes(self) -> int:
        """How much it covers."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes reach the file."""
        return self.permissions[3] == "s"

    @property
    def key(self) -> FileKey:
        """The file; inode 0: no file at all."""
        return self.device, self.inode


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """Somebody who maps a file."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid})"


def parse(text: str) -> list[Area]:
    """The lines of a maps file, in address order.  ValueError on a line that is none."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"not a line of /proc/PID/maps: {line!r}")
        start, end, permissions, offset, device, inode, path = match.groups()
        found.append(Area(int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), path))
    return found


def areas(pid: int) -> list[Area]:
    """All areas of a process, in address order.  Raises GuestError ``guest-gone`` or ``no-rights``."""
    path = PROC / str(pid) / "maps"
    try:
        return parse(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestError(f"process {pid} has ended", code="guest-gone") from error
    except PermissionError as error:
        raise GuestError(
            f"cannot read {path}: {error.strerror}",
            code="no-rights",
            hint="the agent needs CAP_SYS_PTRACE, or the user the process runs as",
        ) from error


def file_key(fd: int) -> FileKey:
    """Device and inode of an open file, as areas have them."""
    status = os.fstat(fd)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


def find_mappings(
    pid: int, fd: int, *, region: int = 0, file_offset: int = 0, size_bytes: int | None = None
) -> tuple[Mapping, ...]:
    """Where a process maps (shared) the piece of ``fd`` that is a region: ``size_bytes`` from ``file_offset`` on.

    The same piece may be mapped more than once, or not wholly: it is for the caller to refuse that.
    """
    key = file_key(fd)
    region_end = file_offset + (os.fstat(fd).st_size - file_offset if size_bytes is None else size_bytes)
    found = []
    for area in areas(pid):
        first = max(area.offset, file_offset)
        end = min(area.offset + area.length_bytes, region_end)
        if area.key == key and area.shared and first < end:
            found.append(Mapping(region, area.start + first - area.offset, first - file_offset, end - first))
    return tuple(found)


def processes() -> Iterator[int]:
    """Every process of the host, threads left out."""
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def mapped_elsewhere(keys: Collection[FileKey], excluding: Collection[int] = ()) -> list[Process]:
    """Other processes that can write these files: each maps one of them shared.  Ours to exclude: the guest and ourselves.

    Processes that end meanwhile are left out, and so are those we may not look at (other users', when not root): a
    non-root agent can move only what belongs to its own user.
    """
    wanted = frozenset(keys)
    found = []
    for pid in processes():
        if pid in excluding:
            continue
        with contextlib.suppress(GuestError, OSError):
            if any(area.shared and area.key in wanted for area in areas(pid)):
                found.append(Process(pid, command(pid)))
    return found


def command(pid: int) -> str:
    """The short name of a process; empty once it has ended."""
    try:
        return (PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def open_area(pid: int, area: Area, *, writable: bool = False) -> int:
    """The file behind an area, even one without a name any more; the caller closes it.

    Raises GuestError ``no-rights`` or ``guest-gone``.
    """
    path = f"{PROC}/{pid}/map_files/{area.start:x}-{area.end:x}"
    try:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise GuestError(f"cannot open {path}: process or mapping is gone", code="guest-gone") from error
    except OSError as error:
        raise GuestError(
            f"cannot open {path}: {error.strerror}",
            code="no-rights",
            hint="the agent needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
        ) from error


def page_sizes(pid: int) -> dict[int, int]:
    """Page size in bytes of each area that is mapped with its own (KernelPageSize), by start address.

    Walks all page tables of the process (``smaps``): not for a hot path.
    """
    found: dict[int, int] = {}
    start = -1
    with (PROC / str(pid) / "smaps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if match := _LINE.match(line.rstrip("\n")):
                start = int(match[1], 16)
            elif line.startswith("KernelPageSize:"):
                found[start] = int(line.split()[1]) << 10
    return found


def page_bytes(fd: int) -> int:
    """Page size of the memory in a file: on hugetlbfs st_blksize is the huge page; else 4 KiB."""
    status = os.fstatvfs(fd)
    return status.f_bsize if status.f_bsize > 4096 and status.f_bsize & (status.f_bsize - 1) == 0 else 4096


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
    """Which memory of a process could be migrated, and what stands in the way: shared files first, then private memory.

    Files below ``least_bytes`` are left out, and so are private areas below ``least_private_bytes``: they are a program's own.
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
    sizes = page_sizes(pid) if shared or private else {}
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
    """Kind of each mounted file system, by device as areas have it."""
    found = {}
    for line in (PROC / "self" / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        major, _, minor = before.split()[2].partition(":")
        found[f"{int(major):02x}:{int(minor):02x}"] = after.split()[0]
    return found


def _overlap(group: list[Area]) -> bool:
    pieces = sorted((area.offset, area.offset + area.length_bytes) for area in group)
    return any(before[1] > after[0] for before, after in itertools.pairwise(pieces))
