"""Try the kernel's dirty tracking on throw-away memory: ``python -m migrated.memory.defect_probe PROBE``.

`migrated.memory.defects` runs this as a process of its own, because some kernels hang or crash in what it tries.  It
prints one JSON object of facts, or ``{"untested": reason}``.  It takes huge pages from the pool only if free ones
exist.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable

from migrated.errors import MigratedError
from migrated.memory import memfd
from migrated.memory.native import uffd_api, uffd_open, uffd_register
from migrated.memory.regions import Mapping, Region, SourceMemory
from migrated.memory.tracker import Tracker

_PAGEMAP_SCAN = 0xC0606610
_UFFDIO_WRITEPROTECT = 0xC018AA06
_WP_MATCHING, _CHECK_WPASYNC = 1, 2
_WPALLOWED, _WRITTEN, _PRESENT = 1, 2, 8
_MADV_DONTNEED_LOCKED = 24
_MAP_FIXED = 0x10
_MIB = 1 << 20
#: Page size and number of pages of each kind of memory that is tried.
_KINDS = {
    "anonymous": (4096, 8),
    "transparent": (4096, 1024),
    "shmem": (4096, 8),
    "2M": (2 * _MIB, 4),
    "1G": (1 << 30, 1),
}

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

Facts = dict[str, bool | str]


class Untested(Exception):  # noqa: N818 - an answer, not an error
    """This host lacks what the probe needs."""


class Memory:
    """Pages of our own with a userfaultfd.  ``kind``: one of `_KINDS`."""

    def __init__(self, kind: str) -> None:
        self.page_bytes, self.pages = _KINDS[kind]
        self.size_bytes = self.page_bytes * self.pages
        self.is_file = kind not in {"anonymous", "transparent"}
        if self.is_file:
            try:
                self.fd = memfd.allocate(self.size_bytes, self.page_bytes, "probe")
            except MigratedError as error:
                raise Untested(f"no free {kind} pages") from error
            self._map = mmap.mmap(self.fd, self.size_bytes)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        else:
            self.fd = -1
            self._map = mmap.mmap(-1, self.size_bytes + 2 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
            self.address = -(-start // (2 * _MIB)) * 2 * _MIB
            self._advise(mmap.MADV_HUGEPAGE if kind == "transparent" else mmap.MADV_NOHUGEPAGE, 0, self.pages)
        try:
            self.uffd = uffd_open()
        except MigratedError:
            self.uffd = uffd_open(user_mode_only=True)  # enough: no other process touches this memory
        uffd_api(self.uffd, faults=False, tracking=True)
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def free(self) -> None:
        """Release the memory: the host may have only one huge page."""
        os.close(self.uffd)
        self._map.close()
        if self.is_file:
            os.close(self.fd)

    def write(self, page: int, pages: int = 1) -> None:
        """Write one byte to each page."""
        for number in range(page, page + pages):
            ctypes.memset(self.address + number * self.page_bytes + 5, number + 1, 1)

    def _advise(self, advice: int, page: int, pages: int) -> None:
        if _LIBC.madvise(self.address + page * self.page_bytes, pages * self.page_bytes, advice):
            code = ctypes.get_errno()
            raise Untested(f"madvise({advice}): {os.strerror(code)}")

    def drop(self, page: int, *, punch: bool) -> None:
        """Remove one page from the page table, and with ``punch`` from the file as well."""
        self._advise(mmap.MADV_REMOVE if punch else mmap.MADV_DONTNEED, page, 1)

    def drop_locked(self) -> bool:
        """Lock all of it, then empty the page table.  Return False if this kernel cannot."""
        if _LIBC.mlock(self.address, self.size_bytes):
            raise Untested(f"mlock: {os.strerror(ctypes.get_errno())}")
        return not _LIBC.madvise(self.address, self.size_bytes, _MADV_DONTNEED_LOCKED)

    def map_over(self, page: int) -> None:
        """Map a new anonymous page over this page."""
        flags = _MAP_FIXED | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        at = self.address + page * self.page_bytes
        if _LIBC.mmap(at, self.page_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != at:
            raise Untested(f"mmap: {os.strerror(ctypes.get_errno())}")

    def register(self) -> None:
        """Register the memory for asynchronous write-protection."""
        uffd_register(self.uffd, self.address, self.size_bytes, missing=False, minor=False, tracking=True)

    def protect(self) -> None:
        """Arm all of it, including pages that are not populated."""
        fcntl.ioctl(self.uffd, _UFFDIO_WRITEPROTECT, bytearray(struct.pack("QQQ", self.address, self.size_bytes, 1)))

    def scan(self, *, mask: int = 0, any_of: int = 0, rearm: bool = True) -> set[int]:
        """Return the pages that match, by PAGEMAP_SCAN."""
        found = (ctypes.c_uint64 * (3 * 64))()
        flags = _WP_MATCHING | _CHECK_WPASYNC if rearm else 0
        end = self.address + self.size_bytes
        vector = ctypes.addressof(found)
        argument = struct.pack("12Q", 96, flags, self.address, end, 0, vector, 64, 0, 0, mask, any_of, mask | any_of)
        count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, bytearray(argument))
        pages: set[int] = set()
        for number in range(count):
            first, last = found[3 * number] - self.address, found[3 * number + 1] - self.address - 1
            pages |= set(range(first // self.page_bytes, last // self.page_bytes + 1))
        return pages

    def tracker(self) -> Tracker:
        """Return the engine's own tracker for this memory."""
        region = Region("probe", self.size_bytes, self.page_bytes)
        mapping = Mapping(0, self.address, 0, self.size_bytes)
        private = (not self.is_file,)
        return Tracker(SourceMemory(os.getpid(), (region,), (mapping,), (self.fd,), (0,), private), self.uffd)


def _bits(bitmaps: list[bytes]) -> set[int]:
    value = int.from_bytes(bitmaps[0], "little")
    return {bit for bit in range(value.bit_length()) if value >> bit & 1}


def tracking(kind: str) -> Facts:
    """Check that exactly the written pages are reported and re-armed, even if they were zapped after the write."""
    facts: Facts = {}
    with_masks = (("category_mask", _WRITTEN, 0), ("category_anyof_mask", 0, _WRITTEN))
    memory = Memory(kind)
    last = memory.pages - 1
    memory.write(0, max(1, memory.pages // 2))  # half of it is populated before arming
    memory.register()
    memory.protect()
    unwritten = memory.scan(mask=_WRITTEN)
    memory.write(last)
    written = memory.scan(mask=_WRITTEN)
    facts["exact"] = (unwritten, written) == (set(), {last})
    facts["rearmed"] = not memory.scan(mask=_WRITTEN)
    memory.write(last)
    facts["written_again"] = last in memory.scan(mask=_WRITTEN)
    for name, mask, any_of in with_masks:
        for punch in (False, True) if memory.is_file else (False,):
            memory.protect()
            memory.write(0)
            memory.drop(0, punch=punch)
            zap = "punched" if punch else "zapped"
            facts[f"{zap}_{name}"] = 0 in memory.scan(mask=mask, any_of=any_of)
    memory.free()
    facts["engine"] = _engine_finds(kind)
    return facts


def _engine_finds(kind: str) -> bool:
    """Whether the tracker reports every page that was written, also one that was zapped afterwards."""
    memory = Memory(kind)
    memory.write(0, memory.pages)
    tracker = memory.tracker()
    tracker.arm()
    found = []
    for zap in (None, "zap", "punch") if memory.is_file else (None, "zap"):
        tracker.scan()
        memory.write(0)
        if zap is not None:
            memory.drop(0, punch=zap == "punch")
        found.append(0 in _bits(tracker.scan()))
    tracker.disarm()
    tracker.close()
    return all(found)


def locked() -> Facts:
    """Check that page tables of locked memory can be emptied while the pages stay in the file."""
    memory = Memory("shmem")
    memory.write(0, memory.pages)
    if not memory.drop_locked():
        return {"emptied": False, "kept": True}
    empty = not memory.scan(mask=_PRESENT, rearm=False)
    kept = all(os.pread(memory.fd, 1, page * 4096 + 5) == bytes((page + 1,)) for page in range(memory.pages))
    return {"emptied": empty, "kept": kept}


def mapped_over() -> Facts:
    """Check that scanning a range that is partly no longer tracked fails: it must not report "nothing written"."""
    memory = Memory("anonymous")
    memory.write(0, memory.pages)
    tracker = memory.tracker()
    tracker.arm()
    memory.map_over(3)
    memory.write(3)
    try:
        return {"noticed": 3 in _bits(tracker.scan())}
    except MigratedError as error:
        return {"noticed": True, "said": error.message}


def rearming_a_hole() -> Facts:
    """Re-arm a hugetlb range without page tables: before 14a2508b1bf6 the caller hangs, and no signal kills it."""
    memory = Memory("2M")
    memory.register()
    memory.scan(mask=_WPALLOWED)
    return {"hangs": False}


PROBES: dict[str, Callable[[], Facts]] = {
    **{f"tracking-{kind}": functools.partial(tracking, kind) for kind in _KINDS},
    "locked": locked,
    "mapped-over": mapped_over,
    "rearming-a-hole": rearming_a_hole,
}


def main(name: str) -> None:
    """Run the probe named on the command line."""
    try:
        answer = PROBES[name]()
    except Untested as reason:
        answer = {"untested": str(reason)}
    except MigratedError as error:
        answer = {"untested": error.message}
    except OSError as error:
        answer = {"untested": error.strerror or str(error)}
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer
    os._exit(0)  # the kernel frees the remaining memory and registrations at exit


if __name__ == "__main__":
    main(sys.argv[1])
