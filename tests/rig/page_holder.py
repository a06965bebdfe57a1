"""Hold all available huge pages until standard input ends: ``python -m tests.rig.page_holder PAGE_BYTES``.

Prints the number of pages that it holds.
"""

from __future__ import annotations

import mmap
import os
import sys

from migrated.errors import MigratedError
from migrated.memory.memfd import allocate, pools


def available(page_bytes: int) -> int:
    """Return the number of pages that a new reservation can get."""
    return max(0, next(pool.available for pool in pools() if pool.page_bytes == page_bytes))


def take_all(page_bytes: int) -> list[tuple[int, mmap.mmap]]:
    """Reserve pages until none are left; other processes may take and return pages at the same time."""
    held = []
    while (count := available(page_bytes)) > 0:
        try:
            fd = allocate(count * page_bytes, page_bytes, "held")
        except MigratedError:
            continue
        held.append((fd, mmap.mmap(fd, count * page_bytes)))
    return held


if __name__ == "__main__":
    size = int(sys.argv[1])
    held = take_all(size)
    sys.stdout.write(f"{sum(os.fstat(fd).st_size for fd, _ in held) // size}\n")
    sys.stdout.flush()
    sys.stdin.read()
