"""The memory of a benchmark: huge pages are reserved, and all pages written once before anything is measured.

The first touch of memory that a virtual machine has never used costs its hypervisor several milliseconds per huge page.
Without this, the first system measured would pay for all of them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

from migrated.demo.pool import huge_pages

MFD_HUGE_SHIFT = 26
SMALL_BYTES = 4096


@contextlib.contextmanager
def warm_pages(size_bytes: int, page_bytes: int) -> Iterator[None]:
    """Provide free huge pages of this size, all of them touched.  Raises PoolError if there are not enough."""
    with huge_pages(size_bytes, page_bytes):
        touch(size_bytes, page_bytes)
        yield


def touch(size_bytes: int, page_bytes: int) -> None:
    """Write to this much of the free memory in the pool; pages of 4 KiB have none."""
    huge = 0 if page_bytes == SMALL_BYTES else os.MFD_HUGETLB | (page_bytes.bit_length() - 1) << MFD_HUGE_SHIFT
    fd = os.memfd_create("bench-warm", os.MFD_CLOEXEC | huge)
    try:
        os.ftruncate(fd, size_bytes)
        with mmap.mmap(fd, size_bytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)) as memory:
            memory[0] = 1
    finally:
        os.close(fd)
