"""Manage dirty tracking of a guest process from outside.

This module handles the life cycle only; the source engine makes the scans in C.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from migrated import privileged
from migrated.errors import GuestError, MigratedError
from migrated.memory.native import call, ffi, lib
from migrated.memory.regions import SourceMemory


class Tracker:
    """Sees which pages the guest process writes.

    Make it on a userfaultfd of the guest process (UFFDIO_API done with tracking); it keeps a duplicate.  Call `arm`
    with the guest quiesced, then give `handle` to the source engine's scans.  `disarm` leaves nothing of ours in the
    guest's page tables; `close` frees our side only.
    """

    def __init__(self, memory: SourceMemory, uffd: int) -> None:
        self._handle: Any | None = None
        mappings = ffi.new("struct mgd_mapping[]", [dataclasses.asdict(mapping) for mapping in memory.mappings])
        for raw in mappings:
            if memory.private[raw.region] and not memory.file_behind[raw.region]:
                raw.flags = lib.MGD_MAPPING_SPARSE
        page_bytes = ffi.new("uint64_t[]", [region.page_bytes for region in memory.regions])
        page_counts = [region.size_bytes // region.page_bytes for region in memory.regions]
        self.page_count = sum(page_counts)
        self._word_counts = [(count + 63) // 64 for count in page_counts]
        out = ffi.new("struct mgd_tracker **")
        path = f"/proc/{memory.pid}/pagemap"
        try:
            pagemap = privileged.open_file(memory.pid, "pagemap")
        except OSError as error:
            raise GuestError(
                f"cannot open {path}: {error.strerror}",
                code="guest-gone" if isinstance(error, FileNotFoundError | ProcessLookupError) else "no-rights",
                hint="the agent needs CAP_SYS_PTRACE, or the guest's user and a guest that may be traced",
            ) from error
        try:
            call(
                lib.mgd_tracker_create,
                pagemap,
                uffd,
                mappings,
                len(memory.mappings),
                page_bytes,
                len(memory.regions),
                out,
            )
        finally:
            os.close(pagemap)
        self._handle = out[0]

    @property
    def handle(self) -> Any:
        """The C object, for the engine.  Raises an error once closed."""
        if self._handle is None:
            raise MigratedError("the dirty tracker is already closed")
        return self._handle

    def arm(self) -> None:
        """Register and write-protect all of it; the guest must be quiesced.  Blocks.  A failure leaves no trace."""
        call(lib.mgd_tracker_arm, self.handle)

    def disarm(self) -> None:
        """Remove everything of ours from the guest's page tables.  Blocks.  Idempotent; works on a dead guest."""
        call(lib.mgd_tracker_disarm, self.handle)

    def scan(self) -> list[bytes]:
        """Return bitmaps of the pages written since the last scan, one per region, little-endian (tests and tools)."""
        return self._bitmaps(lib.mgd_tracker_scan)

    def present(self) -> list[bytes]:
        """Return bitmaps of the pages that the guest process has mapped now, or on swap (tests and tools)."""
        return self._bitmaps(lib.mgd_tracker_present)

    def _bitmaps(self, function: Any) -> list[bytes]:
        words = [ffi.new("uint64_t[]", count) for count in self._word_counts]
        pointers = ffi.new("uint64_t *[]", words)
        call(function, self.handle, pointers, ffi.new("uint64_t *"))
        return [bytes(ffi.buffer(array)) for array in words]

    def close(self) -> None:
        """Free our side.  Idempotent; does not touch the guest: `disarm` first."""
        handle, self._handle = self._handle, None
        if handle is not None:
            lib.mgd_tracker_destroy(handle)
