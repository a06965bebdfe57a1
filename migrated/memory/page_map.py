"""The states of a guest's memory as an overview of fixed size."""

from __future__ import annotations

import dataclasses

#: States of memory in a page map, in the order of MGD_MAP_*.
MAP_STATES = ("absent", "received", "stale", "requested", "current", "mapped", "poisoned", "sent", "dirty")


@dataclasses.dataclass(frozen=True, slots=True)
class PageMap:
    """The states of all memory in cells of equal size; see ``struct mgd_page_map``.

    ``cells`` has a byte for each cell, by state: the share of the cell, 0 to 255.  States that do not occur are left
    out, there and in ``bytes_by_state``.  ``at`` is Unix time.
    """

    at: float
    cell_bytes: int
    bytes_by_state: dict[str, int]
    cells: dict[str, bytes]
