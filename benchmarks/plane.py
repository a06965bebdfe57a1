"""Measure and profile the data plane alone: both engines in one process over loopback, no guest, no agents."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rig import Rig
from tests.rig.authority import Authority


def first_round(
    *, size_bytes: int, page_bytes: int, streams: int, populated: bool, authority: Authority | None = None
) -> dict[str, Any]:
    """Send memory that is all non-zero; measure from the start of the round to the barrier on the target.

    ``populated``: the target's pages exist before; otherwise the time includes zeroing them.  ``authority``: over
    TLS, with its certificates.
    """
    with contextlib.ExitStack() as stack:
        rig = Rig(stack, size_bytes=size_bytes, page_bytes=page_bytes, streams=streams, authority=authority)
        rig.fill()
        if populated:
            with mmap.mmap(rig.copy, size_bytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)) as memory:
                memory[0] = 0
        rig.tracker.arm()
        rig.source.mark_populated(rig.tracker)
        cpu, started = time.process_time(), time.monotonic()
        rig.round(1)
        rig.barrier(1)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        wire = rig.source.stats().wire_bytes
        verified = rig.same()
    return {
        "streams": streams,
        "populated": populated,
        "seconds": seconds,
        "bytes_per_second": wire / seconds,
        "cpu_seconds_per_gigabyte": cpu / wire * 1e9,
        "verified": verified,
    }


def main() -> None:
    """Run under a profiler: ``perf record -g python -m benchmarks.plane``."""
    from benchmarks.pool import warm_pages

    size = int(os.environ.get("PLANE_BYTES", str(1 << 30)))
    with warm_pages(2 * size, 2 << 20), tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory)) if os.environ.get("PLANE_TLS") else None
        for _ in range(int(os.environ.get("PLANE_RUNS", "3"))):
            for streams in (1, 2):
                for populated in (True, False):
                    result = first_round(
                        size_bytes=size,
                        page_bytes=2 << 20,
                        streams=streams,
                        populated=populated,
                        authority=authority,
                    )
                    print(result)


if __name__ == "__main__":
    main()
