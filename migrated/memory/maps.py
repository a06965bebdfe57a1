"""Read a process's address space from ``/proc/PID/maps``: where it maps a file, and which other processes map it.

Dirty tracking sees writes through one process's page tables only.  So before a guest is moved every *other* process
that maps the same memory must be found (invariant 7).  Device and inode identify the file, since a memfd's name proves
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from migrated import privileged
from migrated.errors import GuestError
from migrated.memory.regions import Mapping

PROC = Path("/proc")
_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *(.*)$")

#: Device and inode of a file.  The device has the form of ``/proc/PID/maps``.
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
        """The length of the area."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes reach the file."""
        return self.permissions[3] == "s"

    @property
    def key(self) -> FileKey:
        """The file.  Inode 0 means no file."""
        return self.device, self.inode


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A process that maps a file."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid})"


def parse(text: str) -> list[Area]:
    """Parse the lines of a maps file, in address order.  Raises ValueError on any other line."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"not a line of /proc/PID/maps: {line!r}")
        start, end, permissions, offset, device, inode, path = match.groups()
        found.append(Area(int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), path))
    return found


def areas(pid: int) -> list[Area]:
    """Return all areas of a process, in address order.  Raises GuestError ``guest-gone`` or ``no-rights``."""
    path = PROC / str(pid) / "maps"
    try:
        return parse(privileged.read_file(pid, "maps"))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestError(f"process {pid} has exited", code="guest-gone") from error
    except PermissionError as error:
        raise GuestError(
            f"cannot read {path}: {error.strerror}",
            code="no-rights",
            hint="the agent needs CAP_SYS_PTRACE, or the user the process runs as",
        ) from error


def file_key(fd: int) -> FileKey:
    """Return device and inode of an open file, as areas have them."""
    status = os.fstat(fd)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


def find_mappings(
    pid: int, fd: int, *, region: int = 0, file_offset: int = 0, size_bytes: int | None = None
) -> tuple[Mapping, ...]:
    """Return where a process maps (shared) a region of ``fd``: ``size_bytes`` from ``file_offset`` on.

    The region may be mapped more than once, or only in part: the caller must refuse that.
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
    """Yield every process of the host, without threads."""
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def mapped_elsewhere(keys: Collection[FileKey], excluding: Collection[int] = ()) -> list[Process]:
    """Return other processes that map one of these files shared, and so can write it.

    The caller excludes the guest and ourselves.  Processes that exit meanwhile are left out, and so are those that we
    may not inspect (other users', when not root): a non-root agent can move only what belongs to its own user.
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
    """Return the short name of a process; empty once it has exited."""
    try:
        return (PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def open_area(pid: int, area: Area) -> int:
    """Open the file behind an area, even one that has no name any more; the caller closes it.

    It is opened for writing where that is allowed, although nobody writes: the kernel registers no mapping of a read-only
    descriptor with a userfaultfd, and without that the engine cannot compare huge pages in place.

    Raises GuestError ``no-rights`` or ``guest-gone``.
    """
    name = f"map_files/{area.start:x}-{area.end:x}"
    path = f"{PROC}/{pid}/{name}"
    try:
        with contextlib.suppress(OSError):  # the next call reports what fails for reading, too
            return privileged.open_file(pid, name, writable=True)
        return privileged.open_file(pid, name)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestError(f"cannot open {path}: process or mapping is gone", code="guest-gone") from error
    except OSError as error:
        raise GuestError(
            f"cannot open {path}: {error.strerror}",
            code="no-rights",
            hint="the agent needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
        ) from error
