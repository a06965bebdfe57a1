"""The kernel's pools of huge pages.  Changes are always relative, because other processes use the pools at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from migrated.memory.memfd import POOLS, pools
from tests.rig import supervisor

_LOCK = Path("/run/lock/migrated-tests-pool")


class PagesUnavailableError(Exception):
    """The kernel does not support this page size, or could not allocate enough pages."""


def change(page_bytes: int, by: int) -> int:
    """Grow or shrink the pool by this number of pages, and return the actual change."""
    path = POOLS / f"hugepages-{page_bytes >> 10}kB" / "nr_hugepages"
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(path.read_text())
        path.write_text(str(max(0, before + by)))
        return int(path.read_text()) - before


@contextlib.contextmanager
def more_pages(count: int, page_bytes: int) -> Iterator[None]:
    """Grow the pool by ``count`` pages of this size.  Raises PagesUnavailableError with the reason if that fails."""
    if page_bytes not in {pool.page_bytes for pool in pools()}:
        raise PagesUnavailableError(f"this kernel has no pages of {page_bytes >> 20} MiB")
    added = change(page_bytes, count)
    with supervisor.undoing(sys.executable, "-m", __name__, str(page_bytes), str(-added)):
        try:
            if added < count:
                raise PagesUnavailableError(f"the kernel found {added} of {count} more pages of {page_bytes >> 20} MiB")
            yield
        finally:
            if added:
                change(page_bytes, -added)


@contextlib.contextmanager
def pool_full(page_bytes: int) -> Iterator[int]:
    """Have a child process take all available pages of the pool; yields their number.

    The child only reserves the pages.  Nothing has to zero them, so this is immediate for a pool of any size.
    """
    command = [sys.executable, "-m", "tests.rig.page_holder", str(page_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if holder.stdin is None or holder.stdout is None:
            raise AssertionError
        try:
            yield int(holder.stdout.readline())
        finally:
            holder.stdin.close()  # the holder exits at end of file
            holder.wait()


if __name__ == "__main__":  # run by the supervisor after a test run was killed
    change(int(sys.argv[1]), int(sys.argv[2]))
