"""Choose a target for each guest: a pure function from guests and rooms to places.  No I/O, no clock.

The guests are placed in another order than the one in which they go.  Large guests are placed first, whatever goes first:
small guests still fit between them, the other way round large ones may not.  Only with order ``priority`` may a small guest
take the room of a large one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from migrated.agent.record import ErrorInfo
from migrated.memory.memfd import BASE_PAGE_BYTES, DEFAULT_PAGE_BYTES
from migrated.options import Order
from migrated.protocol.messages import Capacity, Verdict
from migrated.units import format_size


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """A guest that needs a place.  ``tried``: how many of its migrations to each target have failed."""

    guest: str
    size_bytes: int
    priority: int = 0
    tried: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Room:
    """What a target can still take; `plan` takes from it.  ``slots``: migrations that it would take now."""

    target: str
    bytes_left: dict[int, int]  # by page size; base pages are memory outside the pools
    verdicts: Mapping[str, Verdict]  # by guest
    slots: int = 1

    @classmethod
    def of(cls, target: str, capacity: Capacity, guests: Sequence[str]) -> Room:
        """Return the room of a target as it has answered for these guests."""
        pools = {pool.page_bytes: pool.page_bytes * pool.pages for pool in capacity.pools}
        return cls(
            target=target,
            bytes_left={**pools, BASE_PAGE_BYTES: capacity.memory_bytes},
            verdicts=dict(zip(guests, capacity.guests, strict=True)),
            slots=capacity.max_migrations - capacity.migrations,
        )

    def take(self, page_bytes: int, size_bytes: int) -> None:
        """Count memory as taken."""
        self.bytes_left[page_bytes] = self.bytes_left.get(page_bytes, 0) - _whole_pages(page_bytes, size_bytes)

    def choose(self, load: Load) -> int | ErrorInfo:
        """Return the page size with which the guest fits, or why it does not."""
        verdict = self.verdicts[load.guest]
        if verdict.refusal is not None:
            refusal = verdict.refusal
            return ErrorInfo(code=refusal.code, message=f"{self.target}: {refusal.message}", hint=refusal.hint)
        sizes = (verdict.page_bytes,) if verdict.page_bytes else (DEFAULT_PAGE_BYTES, BASE_PAGE_BYTES)
        for page_bytes in sizes:
            if self.bytes_left.get(page_bytes, 0) >= _whole_pages(page_bytes, load.size_bytes):
                return page_bytes
        if not verdict.reserve:  # the target's configuration says that the guest needs less than its size
            return sizes[0]
        left = ", ".join(f"{format_size(max(0, self.bytes_left.get(size, 0)))} {_pages(size)}" for size in sizes)
        return ErrorInfo(
            code="no-room",
            message=f"{self.target} has no room for {load.guest}, which needs {format_size(load.size_bytes)}: it has {left} left",
            hint="free memory or raise the pool of huge pages there, or name another target",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a guest is to go.  ``error``: nowhere, and why."""

    guest: str
    target: str = ""
    page_bytes: int = 0
    reserved: bool = True
    error: ErrorInfo | None = None


def plan(
    loads: Iterable[Load], rooms: Sequence[Room], order: Order, *, silent: Sequence[ErrorInfo] = ()
) -> list[Place]:
    """Place the guests; return a place for each, in the order in which they are to go.

    ``silent``: why further targets have no room here: they did not answer.
    """
    loads = sorted(loads, key=lambda load: _turn(load, order))
    ranked = sorted(loads, key=lambda load: (_rank(load, order), -load.size_bytes, load.guest))
    places = {load.guest: _place(load, rooms, silent) for load in ranked}
    return [places[load.guest] for load in loads]


def _rank(load: Load, order: Order) -> int:
    return -load.priority if order == "priority" else 0


def _turn(load: Load, order: Order) -> tuple[int, int, str]:
    return (_rank(load, order), -load.size_bytes if order == "largest" else load.size_bytes, load.guest)


def _place(load: Load, rooms: Sequence[Room], silent: Sequence[ErrorInfo]) -> Place:
    """Take the best target: not tried, then not full, then with the pages it prefers, then the one with most left."""
    best: tuple[tuple[int, bool, bool, int], Room, int] | None = None
    errors: list[ErrorInfo] = []
    for room in rooms:
        chosen = room.choose(load)
        if isinstance(chosen, ErrorInfo):
            errors.append(chosen)
            continue
        second_best = not room.verdicts[load.guest].page_bytes and chosen == BASE_PAGE_BYTES
        rank = (load.tried.get(room.target, 0), room.slots <= 0, second_best, -room.bytes_left.get(chosen, 0))
        if best is None or rank < best[0]:
            best = (rank, room, chosen)
    if best is None:
        return Place(load.guest, error=_sum_up([*errors, *silent]))
    _, room, page_bytes = best
    room.take(page_bytes, load.size_bytes)
    return Place(load.guest, room.target, page_bytes, reserved=room.verdicts[load.guest].reserve)


def _sum_up(errors: Sequence[ErrorInfo]) -> ErrorInfo:
    """Join the reasons of all targets."""
    codes = {error.code for error in errors}
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    return ErrorInfo(
        code=errors[0].code if len(codes) == 1 else "no-target",
        message="; ".join(error.message for error in errors),
        hint="; ".join(hints),
    )


def _whole_pages(page_bytes: int, size_bytes: int) -> int:
    return -(-size_bytes // page_bytes) * page_bytes


def _pages(page_bytes: int) -> str:
    return "of memory" if page_bytes == BASE_PAGE_BYTES else f"in pages of {format_size(page_bytes)}"
