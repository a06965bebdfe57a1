"""Which guest goes where: never more than there is room for, never where it is refused, and nobody is left out who fits."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.agent.record import ErrorInfo
from migrated.options import Order
from migrated.protocol.messages import Capacity, PagePool, Refusal, Verdict
from migrated.source.placement import Load, Place, Room, plan

MIB = 1 << 20
SMALL, LARGE = 4096, 2 * MIB


def room(
    name: str,
    memory_mib: int = 0,
    huge_mib: int = 0,
    *,
    slots: int = 4,
    verdict: Verdict | None = None,
    **verdicts: Verdict,
) -> Room:
    """A target; ``verdicts`` by guest, for all others ``verdict``."""
    guests = [f"g{number}" for number in range(8)]
    return Room(
        name,
        {SMALL: memory_mib * MIB, LARGE: huge_mib * MIB},
        {guest: verdicts.get(guest, verdict or Verdict(SMALL)) for guest in guests},
        slots,
    )


def where(places: list[Place]) -> dict[str, str]:
    return {place.guest: place.target for place in places}


def test_the_target_with_most_room_is_taken_and_what_is_taken_counts() -> None:
    loads = [Load("g0", 100 * MIB), Load("g1", 100 * MIB), Load("g2", 100 * MIB)]
    places = plan(loads, [room("b", 250), room("c", 330)], "smallest")
    assert where(places) == {"g0": "c", "g1": "b", "g2": "c"}
    assert [place.page_bytes for place in places] == [SMALL] * 3


@pytest.mark.parametrize(
    ("order", "names"),
    [("smallest", ["g1", "g2", "g0"]), ("largest", ["g0", "g2", "g1"]), ("priority", ["g2", "g1", "g0"])],
)
def test_guests_go_in_the_order_that_was_asked_for(order: Order, names: list[str]) -> None:
    loads = [Load("g0", 3 * MIB), Load("g1", MIB), Load("g2", 2 * MIB, priority=7)]
    assert [place.guest for place in plan(loads, [room("b", 100)], order)] == names


def test_small_guests_go_first_and_leave_room_for_the_large_one() -> None:
    loads = [Load("g0", 30 * MIB), Load("g1", 30 * MIB), Load("g2", 100 * MIB)]
    places = plan(loads, [room("b", 105), room("c", 104)], "smallest")
    assert where(places) == {"g0": "c", "g1": "c", "g2": "b"}


def test_with_priorities_the_room_goes_to_those_that_go_first() -> None:
    loads = [Load("g0", 90 * MIB), Load("g1", 20 * MIB, priority=1)]
    assert where(plan(loads, [room("b", 100)], "priority")) == {"g1": "b", "g0": ""}
    assert where(plan(loads, [room("b", 100)], "smallest")) == {"g1": "", "g0": "b"}


def test_a_target_that_failed_is_the_last_choice() -> None:
    rooms = [room("b", 1000), room("c", 100)]
    assert where(plan([Load("g0", MIB, tried={"b": 1})], rooms, "smallest")) == {"g0": "c"}
    assert where(plan([Load("g0", MIB, tried={"b": 1, "c": 2})], rooms, "smallest")) == {"g0": "b"}
    assert where(plan([Load("g0", 500 * MIB, tried={"b": 1})], rooms, "smallest")) == {"g0": "b"}


def test_a_busy_target_is_taken_only_if_no_other_has_room() -> None:
    rooms = [room("b", 1000, slots=0), room("c", 100)]
    assert where(plan([Load("g0", 60 * MIB), Load("g1", 60 * MIB)], rooms, "smallest")) == {"g0": "c", "g1": "b"}


def test_huge_pages_are_preferred_and_never_replaced_if_the_target_wants_them() -> None:
    either, huge = Verdict(0), Verdict(LARGE)
    rooms = [room("b", 1000, verdict=either), room("c", 0, 100, verdict=either)]
    (place,) = plan([Load("g0", 99 * MIB)], rooms, "smallest")
    assert (place.target, place.page_bytes) == ("c", LARGE)
    (place,) = plan([Load("g0", 99 * MIB)], rooms, "smallest")
    assert (place.target, place.page_bytes) == ("b", SMALL)
    (place,) = plan([Load("g0", 101 * MIB)], [room("b", 1000, 101, verdict=huge)], "smallest")
    assert place.error is not None  # 101 MiB are 51 pages of 2 MiB, and 50.5 are there
    assert place.error.code == "no-room"
    assert "101 MiB in pages of 2 MiB left" in place.error.message


def test_memory_that_is_not_reserved_always_fits() -> None:
    thin = Verdict(SMALL, reserve=False)
    (place,) = plan([Load("g0", 100 * MIB)], [room("b", 10, verdict=thin)], "smallest")
    assert (place.target, place.reserved) == ("b", False)


def test_every_target_says_why_not() -> None:
    refused = Verdict(refusal=Refusal("unknown-guest", "no guest 'g0' is configured", "add it"))
    silent = ErrorInfo(code="target-unreachable", message="d:7440 cannot be reached", hint="is it up?")
    (place,) = plan([Load("g0", 100 * MIB)], [room("b", 10), room("c", 500, g0=refused)], "smallest", silent=[silent])
    assert place.target == ""
    assert place.error is not None
    assert place.error.code == "no-target"
    for part in ("b has no room for g0, which needs 100 MiB", "c: no guest 'g0'", "d:7440 cannot be reached"):
        assert part in place.error.message
    assert "add it" in place.error.hint
    (place,) = plan([Load("g0", 100 * MIB)], [room("b", g0=refused), room("c", g0=refused)], "smallest")
    assert place.error is not None
    assert (place.error.code, place.error.hint) == ("unknown-guest", "add it")


def test_a_room_is_what_the_target_has_answered() -> None:
    pools = (PagePool(LARGE, 10), PagePool(1 << 30, 2))
    answer = Capacity("migrated", 64 * MIB, pools, 3, 8, (Verdict(LARGE), Verdict(SMALL)))
    made = Room.of("b", answer, ["g0", "g1"])
    assert made.bytes_left == {SMALL: 64 * MIB, LARGE: 20 * MIB, 1 << 30: 2 << 30}
    assert made.slots == 5
    assert made.verdicts["g1"].page_bytes == SMALL


verdicts = st.one_of(
    st.builds(Verdict, st.sampled_from((0, SMALL, LARGE))), st.just(Verdict(refusal=Refusal("unknown-guest", "no")))
)
rooms_drawn = st.lists(
    st.builds(
        lambda memory, huge, slots, judged: room("", memory, huge, slots=slots, **judged),
        st.integers(0, 300),
        st.integers(0, 300),
        st.integers(0, 2),
        st.dictionaries(st.sampled_from([f"g{number}" for number in range(8)]), verdicts),
    ),
    max_size=4,
)
loads_drawn = st.lists(
    st.builds(
        Load,
        st.sampled_from([f"g{number}" for number in range(8)]),
        st.integers(1, 200 * MIB),
        st.integers(-3, 3),
        st.dictionaries(st.sampled_from(["t0", "t1", "t2"]), st.integers(1, 3)),
    ),
    max_size=8,
    unique_by=lambda load: load.guest,
)


@given(loads_drawn, rooms_drawn, st.sampled_from(("smallest", "largest", "priority")))
def test_any_plan_fits_and_leaves_out_only_whom_nobody_can_take(
    loads: list[Load], rooms: list[Room], order: Order
) -> None:
    for number, one in enumerate(rooms):
        one.target = f"t{number}"
    at_first = {one.target: copy.deepcopy(one) for one in rooms}
    silent = [ErrorInfo(code="target-unreachable", message="z", hint="")]
    places = plan(loads, rooms, order, silent=silent)
    by_name = {load.guest: load for load in loads}
    assert sorted(place.guest for place in places) == sorted(by_name)
    for place in places:
        if place.target:
            assert at_first[place.target].verdicts[place.guest].refusal is None
            at_first[place.target].take(place.page_bytes, by_name[place.guest].size_bytes)
        else:
            assert place.error is not None
            assert all(isinstance(one.choose(by_name[place.guest]), ErrorInfo) for one in rooms)
    for one in rooms:
        assert min(one.bytes_left.values()) >= 0
        assert one.bytes_left == at_first[one.target].bytes_left
    turns = [by_name[place.guest] for place in places]
    for before, after in itertools.pairwise(turns):
        match order:
            case "smallest":
                assert before.size_bytes <= after.size_bytes
            case "largest":
                assert before.size_bytes >= after.size_bytes
            case "priority":
                assert before.priority >= after.priority
