"""Compare the bytes sent after the switchover with the blocks that really changed: both engines, no guest.

The benchmark writes the memory itself, so it knows exactly which blocks changed since they were last sent.
"""

from __future__ import annotations

import contextlib
import mmap
import random
from typing import Any

from benchmarks.rig import BLOCK_BYTES, Rig
from migrated.memory.engine import EventKind


def bytes_after_switchover(
    *, pages: int, page_bytes: int, blocks_per_page: int, touched_per_page: int
) -> dict[str, Any]:
    """Transfer ``pages``; before the freeze change some blocks of each, and rewrite some with their own contents.

    Returns wire bytes after the switchover, bytes of the changed blocks, and whether the copy is equal.
    """
    with contextlib.ExitStack() as stack:
        rig = Rig(stack, size_bytes=pages * page_bytes, page_bytes=page_bytes, streams=1)
        rig.fill()
        rig.tracker.arm()
        rig.source.mark_populated(rig.tracker)
        rig.round(1)
        rig.source.scan(rig.tracker, quiesced=True)
        rig.round(2)
        changed = _write(rig.guest, pages, page_bytes, blocks_per_page, touched_per_page)
        rig.source.scan(rig.tracker, quiesced=True)
        rig.barrier(1)
        before = rig.source.stats()
        stale = rig.source.freeze()
        for piece in rig.source.stale_maps():
            rig.target.stale_map(*piece)
        rig.target.switchover()
        rig.source.serve(drain=True)
        rig.wait(rig.source, EventKind.ALL_SENT)
        rig.wait(rig.target, EventKind.ALL_CURRENT)
        wire = rig.source.stats().wire_bytes - before.wire_bytes
        verified = rig.same()
    return {
        "page_bytes": page_bytes,
        "stale_pages": stale,
        "changed_blocks": changed,
        "changed_bytes": changed * BLOCK_BYTES,
        "wire_bytes": wire,
        "ratio": wire / (changed * BLOCK_BYTES),
        "verified": verified,
    }


def _write(guest: mmap.mmap, pages: int, page_bytes: int, changed: int, touched: int) -> int:
    """Change ``changed`` random blocks of every page and touch ``touched`` more; return the number of changed blocks."""
    rng = random.Random(1)
    for page in range(pages):
        for number, block in enumerate(rng.sample(range(page_bytes // BLOCK_BYTES), changed + touched)):
            at = page * page_bytes + block * BLOCK_BYTES
            value = guest[at + 64]
            guest[at + 64] = value ^ 0xFF if number < changed else value
    return pages * changed
