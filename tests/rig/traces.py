"""Find what is left of a guest on this machine: processes, userfaultfds, and processes that still hold its memory.

The search uses only what belongs to the test (a directory created for it, an inode), so that other users of this machine do
not affect the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from migrated.waiting import within

QEMU = "qemu-system"
GONE_SECONDS = 20.0


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def command_line(pid: int) -> str:
    """Return the command line of a process; empty if it has exited."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def processes(directory: Path) -> dict[int, str]:
    """Return all processes with ``directory`` in their command line, except this one."""
    lines = {pid: command_line(pid) for pid in _pids() if pid != os.getpid()}
    return {pid: line for pid, line in lines.items() if f"{directory}/" in line}


def qemus(directory: Path) -> list[int]:
    """Return the QEMU processes of the guests in ``directory``."""
    return sorted(pid for pid, line in processes(directory).items() if QEMU in line.split(" ")[0])


def userfaultfds(pid: int) -> list[int]:
    """Return the descriptor numbers of the userfaultfds that a process holds."""
    folder = Path(f"/proc/{pid}/fd")
    found = []
    for entry in os.listdir(folder):
        with contextlib.suppress(OSError):
            if "userfaultfd" in os.readlink(folder / entry):
                found.append(int(entry))
    return found


def memory_files(pid: int) -> set[tuple[int, int]]:
    """Return (device, inode) of each memfd that a process holds open."""
    found = set()
    folder = Path(f"/proc/{pid}/fd")
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(folder / entry).startswith("/memfd:"):
                    status = os.stat(folder / entry)
                    found.add((status.st_dev, status.st_ino))
    return found


def holders(files: set[tuple[int, int]]) -> dict[int, str]:
    """Return the processes that hold or map any of these memfds.  If there are none, the pages are back in the pool."""
    found = {}
    for pid in _pids():
        if memory_files(pid) & files or _mapped(pid) & files:
            found[pid] = command_line(pid)
    return found


async def released(files: set[tuple[int, int]]) -> None:
    """Wait until no process holds or maps any of these memfds: one that is exiting does so for a moment."""
    async with within(GONE_SECONDS, "the guest's memory to be released"):
        while holders(files):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.02)


def _mapped(pid: int) -> set[tuple[int, int]]:
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/memfd:"):
                major, minor = (int(part, 16) for part in fields[3].split(":"))
                found.add((os.makedev(major, minor), int(fields[4])))
    return found


def end_processes(directory: Path) -> None:
    """Kill by pid what is left of a test: only processes that name its directory."""
    for pid in processes(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
