"""Provide huge pages for as long as they are needed.

The pool is raised first and lowered by the same amount at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from migrated.errors import PoolError
from migrated.memory import memfd


def _pool(page_bytes: int) -> memfd.Pool:
    for pool in memfd.pools():
        if pool.page_bytes == page_bytes:
            return pool
    raise PoolError(f"this kernel has no pages of {page_bytes >> 20} MiB", code="no-huge-pages")


def _write(path: Path, total: int) -> None:
    path.write_text(str(total))


@contextlib.contextmanager
def huge_pages(size_bytes: int, page_bytes: int) -> Iterator[None]:
    """Make sure that ``size_bytes`` of pages of this size can be reserved.  PoolError if they cannot."""
    needed = -(-size_bytes // page_bytes)
    before = _pool(page_bytes)
    lacking = needed - (before.free - before.reserved)
    if lacking <= 0:
        yield
        return
    path = memfd.POOLS / f"hugepages-{page_bytes >> 10}kB" / "nr_hugepages"
    try:
        _write(path, before.total + lacking)
    except OSError as error:
        raise PoolError(
            f"{needed} free pages of {page_bytes >> 20} MiB are needed, {needed - lacking} are available, "
            f"and {path} cannot be changed: {error.strerror}",
            code="no-huge-pages",
            hint=f"as root: {before.raise_command(needed)}",
        ) from error
    added = _pool(page_bytes).total - before.total  # the kernel adds what it finds, which may be less
    try:
        if added < lacking:
            raise PoolError(
                f"the kernel found only {added} of {lacking} more pages of {page_bytes >> 20} MiB",
                code="no-huge-pages",
                hint="memory is short or fragmented: reserve huge pages at boot (hugepages=N)",
            )
        yield
    finally:
        # Others may have raised the pool meanwhile: remove only our part.
        _write(path, max(0, _pool(page_bytes).total - max(0, added)))
