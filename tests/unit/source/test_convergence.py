"""When pre-copy ends: a table of cases, and that it always does."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.source.convergence import (
    EXAMINE_SECONDS_PER_BYTE,
    STALL_RULES,
    SWITCHOVER_SECONDS,
    Convergence,
    RoundResult,
    Verdict,
)

GIB = 1 << 30
MIB = 1 << 20
MODES = ["hybrid", "precopy"]
#: What writes faster than it can be sent leads to.
LIMIT_LEAVING_30_MS = {"hybrid": 0.15, "precopy": 0.05}
HOPELESS = {"hybrid": Verdict.POSTCOPY, "precopy": Verdict.GIVE_UP}


def policy(mode: str = "hybrid", downtime: float = 0.05, rounds: int = 8) -> Convergence:
    return Convergence(mode, downtime_limit_seconds=downtime, max_rounds=rounds)


def small(number: int, sent: int, seconds: float, left: int) -> RoundResult:
    """Of 4 KiB pages: what is reported has changed, nearly always."""
    return RoundResult(number, seconds, examined_bytes=sent, sent_bytes=sent, marked_bytes=left, changed_bytes=left)


def huge(number: int, sent: int, seconds: float, left: int) -> RoundResult:
    """Of 2 MiB pages, and a guest that writes all over the place: all of 1 GiB is reported every time."""
    return RoundResult(number, seconds, examined_bytes=GIB, sent_bytes=sent, marked_bytes=GIB, changed_bytes=left)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([(1, GIB, 1.0, 0)], Verdict.FINISH),  # nothing was written
        (
            [(1, GIB, 1.0, 23 * MIB)],
            Verdict.FINISH,
        ),  # 22 ms of 1 GiB/s, and 6 to examine it, of 30
        ([(1, GIB, 1.0, 31 * MIB)], Verdict.ROUND),
        ([(1, GIB, 10.0, 15 * MIB)], Verdict.ROUND),  # the same on a slow link
        ([(1, GIB, 10.0, GIB // 3), (2, GIB // 2, 5.0, GIB // 6)], Verdict.ROUND),
        ([(8, GIB, 10.0, GIB // 4)], "hopeless"),  # the limit of rounds
        ([(8, GIB, 1.0, MIB)], Verdict.FINISH),  # reached, but it fits
    ],
)
def test_after_these_rounds(mode: str, rounds: list[tuple[int, int, float, int]], expected: Verdict | str) -> None:
    one = policy(mode, LIMIT_LEAVING_30_MS[mode])
    verdicts = [one.after(small(*each)) for each in rounds]
    assert verdicts[-1] is (HOPELESS[mode] if expected == "hopeless" else expected)
    assert set(verdicts[:-1]) <= {Verdict.ROUND}


@pytest.mark.parametrize("mode", MODES)
def test_no_progress_ends_precopy_after_as_many_rounds_as_the_mode_has_patience_for(mode: str) -> None:
    one = policy(mode, rounds=1000)
    number = 1
    while (verdict := one.after(small(number, GIB, 1.0, GIB))) is Verdict.ROUND:
        number += 1
    assert verdict is HOPELESS[mode]
    assert number == STALL_RULES[mode].stalled_rounds


def test_a_round_of_progress_makes_it_patient_again() -> None:
    one = policy("precopy")
    left = [GIB, GIB // 2, GIB // 2, GIB // 4]
    assert {
        one.after(small(n, s, s / GIB, r)) for n, (s, r) in enumerate(zip([GIB, *left], left, strict=False), 1)
    } == {Verdict.ROUND}


def test_on_huge_pages_what_counts_is_what_really_changes() -> None:
    """Every page is reported after every round, and still each round has less to send."""
    one = policy()
    rounds = [(1, GIB, 9.0, 290 * MIB), (2, 410 * MIB, 3.5, 113 * MIB), (3, 180 * MIB, 1.6, 55 * MIB)]
    assert {one.after(huge(*each)) for each in rounds} == {Verdict.ROUND}


def test_looking_at_memory_takes_time_too() -> None:
    """A link so fast that next to nothing is left to send: reading and hashing 1 GiB is too much for a paused guest."""
    one = policy()
    assert one.after(huge(1, GIB, 1.0, MIB)) is not Verdict.FINISH
    assert one.next_seconds(huge(1, GIB, 1.0, 0)) == pytest.approx(GIB * EXAMINE_SECONDS_PER_BYTE)
    one.after(huge(2, MIB, 0.1, MIB))  # this much faster it was
    assert one.next_seconds(huge(2, MIB, 0.1, 0)) == pytest.approx(0.1, rel=0.05)


def test_precopy_goes_on_while_a_round_costs_little() -> None:
    """Measured: 4 000 blocks a second over 512 MiB of 2 MiB pages, beside other load; the last round was lucky."""
    rounds = [(536, 0.74, 8, 512), (8, 0.139, 3, 446), (4, 0.151, 2, 470), (4, 0.149, 2, 470), (4, 0.04, 1, 100)]
    one = policy("precopy")
    verdicts = [
        one.after(
            RoundResult(
                number, seconds, 512 * MIB, sent_bytes=sent * MIB, marked_bytes=marked * MIB, changed_bytes=left * MIB
            )
        )
        for number, (sent, seconds, left, marked) in enumerate(rounds, 1)
    ]
    assert verdicts == [*[Verdict.ROUND] * 4, Verdict.FINISH]


class SparseGuest:
    """4 000 random blocks a second over 512 MiB of 2 MiB pages, examined at some nanoseconds a byte, sent at 1 GB/s."""

    PAGES = 256
    BLOCKS_A_SECOND = 4000

    def __init__(self, examine_ns: float) -> None:
        self.examine = examine_ns * 1e-9

    def marked(self, seconds: float) -> int:
        return round(self.PAGES * (1 - math.exp(-self.BLOCKS_A_SECOND * seconds / self.PAGES))) * 2 * MIB

    def changed(self, seconds: float) -> int:
        return int(self.BLOCKS_A_SECOND * seconds) * 4096

    def rest(self, seconds: float) -> float:
        """Return how long a paused guest waits for what it wrote in so many seconds."""
        return self.marked(seconds) * self.examine + self.changed(seconds) * 1e-9

    def migrate(self, downtime: float, between: float = 0.005) -> tuple[Verdict, float]:
        """Return the verdict, and the downtime that follows; so much time passes from a round to the next scan."""
        one = policy("precopy", downtime)
        examined, sent, took = self.PAGES * 2 * MIB, self.PAGES * 2 * MIB, self.PAGES * 2 * MIB * 1e-9
        for number in range(1, one.max_rounds + 1):
            wrote = took + between
            result = RoundResult(number, took, examined, sent, self.marked(wrote), self.changed(wrote))
            verdict = one.after(result)
            if verdict is not Verdict.ROUND:
                break
            examined, sent, took = self.marked(wrote), self.changed(wrote), self.rest(wrote)
        return verdict, SWITCHOVER_SECONDS + self.rest(wrote)


@pytest.mark.parametrize("examine_ns", [0.03, 0.06, 0.1, 0.12])
def test_precopy_of_a_guest_that_writes_here_and_there_fits_50_ms(examine_ns: float) -> None:
    verdict, downtime = SparseGuest(examine_ns).migrate(0.05)
    assert verdict is Verdict.FINISH
    assert downtime <= 0.05


@pytest.mark.parametrize("examine_ns", [0.03, 0.1, 0.2, 0.4])
def test_precopy_of_a_guest_that_writes_here_and_there_fits_300_ms(examine_ns: float) -> None:
    verdict, downtime = SparseGuest(examine_ns).migrate(0.3)
    assert verdict is Verdict.FINISH
    assert downtime <= 0.3


def test_a_host_that_is_too_slow_to_examine_what_is_marked_is_no_reason_to_exceed_the_limit() -> None:
    verdict, downtime = SparseGuest(0.4).migrate(0.05)
    assert verdict is Verdict.GIVE_UP
    assert downtime > 0.05


@pytest.mark.parametrize(("mode", "last"), [("hybrid", 2), ("precopy", 8)])
def test_rounds_that_only_examine_end_with_the_limit_of_rounds(mode: str, last: int) -> None:
    one = policy(mode)
    assert one.after(huge(1, GIB, 1.0, 100 * MIB)) is Verdict.ROUND
    verdicts = [one.after(huge(number, MIB, 0.3, MIB)) for number in range(2, last + 1)]
    assert verdicts == [*[Verdict.ROUND] * (last - 2), HOPELESS[mode]]


def test_a_round_that_had_nothing_to_send_says_nothing_of_the_speed() -> None:
    one = policy()
    assert one.after(small(1, 0, 0.001, GIB)) is Verdict.ROUND
    assert one.after(small(2, GIB, 1.0, 0)) is Verdict.FINISH


def test_a_guest_that_never_wrote_is_done() -> None:
    assert policy("precopy").after(small(1, 0, 0.001, 0)) is Verdict.FINISH


def test_limits_may_change_meanwhile() -> None:
    one = policy(downtime=0.05, rounds=8)
    assert one.after(small(1, GIB, 1.0, 100 * MIB)) is Verdict.ROUND
    one.downtime_limit_seconds = 1.0
    assert one.after(small(2, 100 * MIB, 0.1, 90 * MIB)) is Verdict.FINISH
    one.downtime_limit_seconds = 0.05
    one.max_rounds = 3
    assert one.after(small(3, 90 * MIB, 0.1, 40 * MIB)) is Verdict.POSTCOPY


def test_a_tiny_downtime_limit_still_leaves_something_to_spend() -> None:
    one = policy(downtime=SWITCHOVER_SECONDS / 2)
    assert one.after(small(1, GIB, 1.0, MIB)) is Verdict.FINISH


bytes_of_memory = st.integers(0, 1 << 50)
parts = st.floats(0, 1)


@given(
    mode=st.sampled_from(MODES),
    downtime=st.floats(1e-6, 60),
    limit=st.integers(1, 40),
    rounds=st.lists(st.tuples(st.floats(0, 1e6), bytes_of_memory, parts, parts), min_size=40, max_size=40),
    first=bytes_of_memory,
)
def test_it_always_ends_within_the_limit_of_rounds(
    mode: str, downtime: float, limit: int, rounds: list[tuple[float, int, float, float]], first: int
) -> None:
    one = policy(mode, downtime, limit)
    examined = first
    for number, (took, marked, sent, changed) in enumerate(rounds, 1):
        result = RoundResult(number, took, examined, int(examined * sent), marked, int(marked * changed))
        verdict = one.after(result)
        assert one.next_seconds(result) >= 0
        examined = marked
        if verdict is not Verdict.ROUND:
            break
    assert verdict is not Verdict.ROUND
    assert number <= limit
    assert verdict in {Verdict.FINISH, HOPELESS[mode]}


@given(downtime=st.floats(0.04, 10), speed=st.floats(1e6, 1e9), first=st.integers(MIB, 1 << 44), part=st.floats(0, 0.5))
def test_a_guest_that_writes_less_than_is_sent_always_finishes(
    downtime: float, speed: float, first: int, part: float
) -> None:
    one = policy("precopy", downtime, 1000)
    sent, number = first, 0
    verdict = Verdict.ROUND
    while verdict is Verdict.ROUND:
        number += 1
        left = int(sent * part)
        verdict = one.after(small(number, sent, sent / speed, left))
        sent = left
    assert verdict is Verdict.FINISH
