"""Huge pages for as long as they are needed: the pool is raised, and put back on the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from migrated.errors import PoolError

POOLS = Path("/sys/kernel/mm/hugepages")


def _pool(page_bytes: int) -> Path:
    return POOLS / f"hugepages-{page_bytes // 1024}kB"


def _read(path: Path) -> int:
    return int(path.read_text())


def free_pages(page_bytes: int) -> int:
    """Pages of this size that are free and not promised to anyone; 0 where the host has no such pages."""
    pool = _pool(page_bytes)
    try:
        return _read(pool / "free_hugepages") - _read(pool / "resv_hugepages")
    except OSError:
        return 0


@contextlib.contextmanager
def huge_pages(size_bytes: int, page_bytes: int) -> Iterator[None]:
    """Make sure that ``size_bytes`` can be reserved in pages of this size.  PoolError when they cannot be had."""
    needed = -(-size_bytes // page_bytes)
    lacking = needed - free_pages(page_bytes)
    if lacking <= 0:
        yield
        return
    path = _pool(page_bytes) / "nr_hugepages"
    try:
        before = _read(path)
        path.write_text(str(before + lacking))
    except OSError as error:
        raise PoolError(
            f"{needed} free pages of {page_bytes >> 20} MiB are needed, {needed - lacking} are there, "
            f"and {path} cannot be changed: {error.strerror}",
            code="no-huge-pages",
            hint=f"as root: echo {lacking} more than now > {path}",
        ) from error
    try:
        if free_pages(page_bytes) < needed:
            raise PoolError(
                f"the kernel found only {_read(path) - before} of {lacking} more pages of {page_bytes >> 20} MiB",
                code="no-huge-pages",
                hint="memory is short or fragmented: reserve huge pages at boot (hugepages=N)",
            )
        yield
    finally:
        # Others may have raised the pool meanwhile: take back our part only.
        path.write_text(str(max(0, _read(path) - lacking)))
