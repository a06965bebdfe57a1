"""Make the memory of an incoming guest: memfds on huge pages.

All pages are reserved before the guest starts, unless the configuration says otherwise.

A mapping of a hugetlbfs file reserves its pages in the pool, and the reservation belongs to the file: it survives the
mapping.  So `allocate` maps once, and from then on neither the engine's alias nor the guest can run out of pages,
except for those that the guest punches out itself (a balloon): their reservation is lost with them.  Nothing is zeroed
before it is needed.  Shmem (4 KiB pages) has no reservation.  There we can only compare the host's free memory with the
need.

Unreserved memory is for guests that are larger than the host and use little of it.  Pages are then taken as they are
needed. If none are left, the migration fails in pre-copy; after pre-copy the guest waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import re
from pathlib import Path

import structlog

from migrated.errors import ConfigError, HostError, PoolError
from migrated.units import format_size

BASE_PAGE_BYTES = 4096
DEFAULT_PAGE_BYTES = 2 << 20
POOLS = Path("/sys/kernel/mm/hugepages")
MEMINFO = Path("/proc/meminfo")

#: Prefix of the names of guests' memfds, as /proc shows them.
NAME_PREFIX = "migrated-"

#: memfd_create(2): the flags contain the binary logarithm of the page size from this bit on.
_MFD_HUGE_SHIFT = 26

_log = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """The host's huge pages of one size: ``total``, ``free`` of them, ``reserved`` (promised) of the free ones."""

    page_bytes: int
    total: int
    free: int
    reserved: int
    overcommit: int
    surplus: int

    @property
    def available(self) -> int:
        """Pages that a new reservation can have, including those that the kernel may still add by overcommit."""
        return self.free - self.reserved + max(0, self.overcommit - self.surplus)

    def raise_command(self, needed: int) -> str:
        """Return the command that makes ``needed`` pages available."""
        total = self.total + max(0, needed - self.available)
        if self.page_bytes == DEFAULT_PAGE_BYTES and _meminfo_bytes("Hugepagesize", otherwise=0) == DEFAULT_PAGE_BYTES:
            return f"sysctl vm.nr_hugepages={total}"
        return f"echo {total} > {POOLS}/hugepages-{self.page_bytes >> 10}kB/nr_hugepages"


def _meminfo_bytes(name: str, *, otherwise: int) -> int:
    match = re.search(rf"^{name}: +(\d+) kB", MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    return int(match[1]) << 10 if match else otherwise


def available_bytes() -> int:
    """Return how much memory new 4 KiB pages can take, as far as the kernel can tell."""
    return _meminfo_bytes("MemAvailable", otherwise=1 << 62)


def pools() -> list[Pool]:
    """Return the pool of every huge page size of the kernel, smallest first; empty if it has none."""
    found: list[Pool] = []
    with contextlib.suppress(OSError):
        found.extend(
            _pool(folder, int(match[1]) << 10)
            for folder in POOLS.iterdir()
            if (match := re.fullmatch(r"hugepages-(\d+)kB", folder.name))
        )
    return sorted(found, key=lambda pool: pool.page_bytes)


def _pool(folder: Path, page_bytes: int) -> Pool:
    def figure(name: str) -> int:
        return int((folder / name).read_text(encoding="ascii"))

    return Pool(
        page_bytes=page_bytes,
        total=figure("nr_hugepages"),
        free=figure("free_hugepages"),
        reserved=figure("resv_hugepages"),
        overcommit=figure("nr_overcommit_hugepages"),
        surplus=figure("surplus_hugepages"),
    )


def page_sizes() -> tuple[int, ...]:
    """Return all page sizes of this host in bytes: 4 KiB and every huge page size, even with an empty pool."""
    return (BASE_PAGE_BYTES, *(pool.page_bytes for pool in pools()))


def require_page_size(page_bytes: int) -> None:
    """Raise ConfigError if this host has no pages of this size."""
    if page_bytes not in page_sizes():
        offered = ", ".join(format_size(size) for size in page_sizes())
        raise ConfigError(f"{format_size(page_bytes)} is not a page size of this host", hint=f"it offers {offered}")


def allocate(size_bytes: int, page_bytes: int, name: str, *, reserved: bool = True) -> int:
    """Return a memfd of ``size_bytes``, with all pages reserved if ``reserved``, and none populated.

    The caller closes it.  Raises PoolError ``no-huge-pages`` (or ``no-memory``, for 4 KiB pages), HostError
    ``page-size-unsupported`` (the size is not one of `page_sizes`, or ``size_bytes`` is not a multiple of it).
    """
    if size_bytes <= 0 or size_bytes % page_bytes:
        raise HostError(
            f"region {name} of {size_bytes} bytes does not consist of whole {format_size(page_bytes)} pages",
            code="page-size-unsupported",
            hint="choose a smaller page size for this guest",
        )
    huge = page_bytes != BASE_PAGE_BYTES
    flags = os.MFD_CLOEXEC
    if huge:
        flags |= os.MFD_HUGETLB | (page_bytes.bit_length() - 1) << _MFD_HUGE_SHIFT
        if page_bytes not in page_sizes():
            raise HostError(
                f"this host has no {format_size(page_bytes)} pages",
                code="page-size-unsupported",
                hint="it offers " + ", ".join(format_size(size) for size in page_sizes()),
            )
    elif reserved and size_bytes > (available := available_bytes()):
        raise PoolError(
            f"region {name} needs {format_size(size_bytes)} of memory, but only {format_size(available)} is available",
            code="no-memory",
            hint="free memory on this host, or move the guest to another one",
        )
    fd = -1
    try:
        fd = os.memfd_create(f"{NAME_PREFIX}{name}", flags)
        os.ftruncate(fd, size_bytes)
        if huge and reserved:
            mmap.mmap(fd, size_bytes, mmap.MAP_SHARED).close()
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if huge and error.errno in {errno.ENOMEM, errno.ENOSPC}:
            raise _exhausted(page_bytes, size_bytes // page_bytes, name) from error
        raise HostError(
            f"memfd of {format_size(size_bytes)} on {format_size(page_bytes)} pages: {error.strerror}"
        ) from error
    return fd


def _exhausted(page_bytes: int, needed: int, name: str) -> PoolError:
    pool = next(pool for pool in pools() if pool.page_bytes == page_bytes)
    return PoolError(
        f"region {name} needs {needed} pages of {format_size(page_bytes)}, but only {max(0, pool.available)} are available "
        f"({pool.total} in the pool, {pool.free} free, {pool.reserved} of them reserved)",
        code="no-huge-pages",
        hint=f"{pool.raise_command(needed)}  (1 GiB pages are best set aside when the host boots)"
        if page_bytes > DEFAULT_PAGE_BYTES
        else pool.raise_command(needed),
    )


def reserve(size_bytes: int, page_bytes: int | None, *, name: str, reserved: bool = True) -> tuple[int, int]:
    """Allocate with a choice of page size; return ``(fd, page_bytes)``.

    ``page_bytes`` None: 2 MiB pages, or 4 KiB pages with a warning if there are none: the guest then runs slower.  A
    page size that was asked for is never replaced.
    """
    if page_bytes is not None:
        return allocate(size_bytes, page_bytes, name, reserved=reserved), page_bytes
    try:
        return allocate(size_bytes, DEFAULT_PAGE_BYTES, name, reserved=reserved), DEFAULT_PAGE_BYTES
    except HostError as error:
        fd = allocate(size_bytes, BASE_PAGE_BYTES, name, reserved=reserved)
        _log.warning("no huge pages: the guest gets 4 KiB pages", region=name, reason=error.message, hint=error.hint)
        return fd, BASE_PAGE_BYTES
