"""The kernel's pools of huge pages, changed only relative to what they are: others use them at the same time."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from migrated.memory.memfd import POOLS, pools

_LOCK = Path("/run/lock/migrated-tests-pool")  # the same as tests/conftest.py takes


class PagesUnavailableError(Exception):
    """The kernel has no such pages, or found too few."""


def _change(page_bytes: int, by: int) -> int:
    path = POOLS / f"hugepages-{page_bytes >> 10}kB" / "nr_hugepages"
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(path.read_text())
        path.write_text(str(max(0, before + by)))
        return int(path.read_text()) - before


@contextlib.contextmanager
def more_pages(count: int, page_bytes: int) -> Iterator[None]:
    """``count`` more pages of this size in the pool.  PagesUnavailableError says what is in the way."""
    if page_bytes not in {pool.page_bytes for pool in pools()}:
        raise PagesUnavailableError(f"this kernel has no pages of {page_bytes >> 20} MiB")
    added = _change(page_bytes, count)
    try:
        if added < count:
            raise PagesUnavailableError(f"the kernel found {added} of {count} more pages of {page_bytes >> 20} MiB")
        yield
    finally:
        if added:
            _change(page_bytes, -added)
