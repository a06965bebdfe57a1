"""A dirty tracker on a process that knows nothing of it: the userfaultfd is made by injection."""

from __future__ import annotations

import ctypes
import os

from migrated.memory import native
from migrated.memory.regions import SourceMemory
from migrated.memory.tracker import Tracker

SYS_USERFAULTFD, SYS_PIDFD_GETFD = 323, 438


def _take_fd(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        return int(ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, number, 0))
    finally:
        os.close(pidfd)


def track(memory: SourceMemory) -> Tracker:
    """To be closed by the caller."""
    injected = native.inject_syscall(memory.pid, SYS_USERFAULTFD, [os.O_CLOEXEC | os.O_NONBLOCK])
    assert injected.result >= 0
    assert injected.stopped_seconds > 0
    uffd = _take_fd(memory.pid, injected.result)
    try:
        native.uffd_api(uffd, faults=False, tracking=True)
        return Tracker(memory, uffd)
    finally:
        os.close(uffd)


def pages(bitmaps: list[bytes]) -> set[int]:
    """The bits of the only region."""
    (bitmap,) = bitmaps
    number = int.from_bytes(bitmap, "little")
    return {page for page in range(8 * len(bitmap)) if number >> page & 1}
