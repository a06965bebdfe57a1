"""When pre-copy ends: a table of cases, and that it always does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.source.convergence import STALLED_ROUNDS, SWITCHOVER_SECONDS, Convergence, RoundResult, Verdict

GIB = 1 << 30
MIB = 1 << 20
MODES = ["hybrid", "precopy"]
#: What writes faster than it can be sent leads to.
HOPELESS = {"hybrid": Verdict.POSTCOPY, "precopy": Verdict.GIVE_UP}


def policy(mode: str = "hybrid", downtime: float = 0.05, rounds: int = 8) -> Convergence:
    return Convergence(mode, downtime_limit_seconds=downtime, max_rounds=rounds)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([(1, GIB, 1.0, 0)], Verdict.FINISH),  # nothing was written
        ([(1, GIB, 1.0, 20 * MIB)], Verdict.FINISH),  # 20 ms of 1 GiB/s: what 50 ms leave beside the switch-over
        ([(1, GIB, 1.0, 21 * MIB)], Verdict.ROUND),
        ([(1, GIB, 10.0, 20 * MIB)], Verdict.ROUND),  # the same on a slow link
        ([(1, GIB, 1.0, GIB)], Verdict.ROUND),  # the first round is never called hopeless
        ([(1, GIB, 1.0, GIB), (2, GIB, 1.0, GIB)], Verdict.ROUND),  # once may be chance
        ([(1, GIB, 1.0, GIB), (2, GIB, 1.0, GIB), (3, GIB, 1.0, GIB)], "hopeless"),
        (
            [(1, GIB, 1.0, GIB), (2, GIB, 1.0, GIB), (3, GIB, 1.0, GIB // 2), (4, GIB // 2, 0.5, GIB // 2)],
            Verdict.ROUND,
        ),
        ([(8, GIB, 1.0, GIB // 2)], "hopeless"),  # the limit of rounds
        ([(8, GIB, 1.0, MIB)], Verdict.FINISH),  # reached, but it fits
    ],
)
def test_after_these_rounds(mode: str, rounds: list[tuple[int, int, float, int]], expected: Verdict | str) -> None:
    one = policy(mode)
    verdicts = [one.after(RoundResult(*each)) for each in rounds]
    assert verdicts[-1] is (HOPELESS[mode] if expected == "hopeless" else expected)
    assert set(verdicts[:-1]) <= {Verdict.ROUND}


def test_a_round_that_had_nothing_to_send_says_nothing_of_the_speed() -> None:
    one = policy()
    assert one.after(RoundResult(1, 0, 0.001, GIB)) is Verdict.ROUND
    assert one.after(RoundResult(2, GIB, 1.0, 0)) is Verdict.FINISH


def test_a_guest_that_never_wrote_is_done() -> None:
    assert policy("precopy").after(RoundResult(1, 0, 0.001, 0)) is Verdict.FINISH


def test_limits_may_change_meanwhile() -> None:
    one = policy(downtime=0.05, rounds=8)
    assert one.after(RoundResult(1, GIB, 1.0, 100 * MIB)) is Verdict.ROUND
    one.downtime_limit_seconds = 1.0
    assert one.after(RoundResult(2, 100 * MIB, 0.1, 90 * MIB)) is Verdict.FINISH
    one.downtime_limit_seconds = 0.05
    one.max_rounds = 3
    assert one.after(RoundResult(3, 90 * MIB, 0.1, 80 * MIB)) is Verdict.POSTCOPY


def test_a_tiny_downtime_limit_still_leaves_something_to_spend() -> None:
    one = policy(downtime=SWITCHOVER_SECONDS / 2)
    assert one.after(RoundResult(1, GIB, 1.0, MIB)) is Verdict.FINISH


dirty = st.integers(0, 1 << 50)
seconds = st.floats(0, 1e6, allow_nan=False)


@given(
    mode=st.sampled_from(MODES),
    downtime=st.floats(1e-6, 60),
    limit=st.integers(1, 40),
    rounds=st.lists(st.tuples(seconds, dirty), min_size=40, max_size=40),
    first=dirty,
)
def test_it_always_ends_within_the_limit_of_rounds(
    mode: str, downtime: float, limit: int, rounds: list[tuple[float, int]], first: int
) -> None:
    one = policy(mode, downtime, limit)
    sent = first
    for number, (took, left) in enumerate(rounds, 1):
        verdict = one.after(RoundResult(number, sent, took, left))
        assert one.estimate_seconds(left) >= 0
        sent = left
        if verdict is not Verdict.ROUND:
            break
    assert verdict is not Verdict.ROUND
    assert number <= limit
    assert verdict in {Verdict.FINISH, HOPELESS[mode]}


@given(
    downtime=st.floats(0.04, 10), speed=st.floats(1e6, 1e10), first=st.integers(MIB, 1 << 44), part=st.floats(0, 0.5)
)
def test_a_guest_that_writes_less_than_is_sent_always_finishes(
    downtime: float, speed: float, first: int, part: float
) -> None:
    one = policy("precopy", downtime, 1000)
    sent, number = first, 0
    verdict = Verdict.ROUND
    while verdict is Verdict.ROUND:
        number += 1
        left = int(sent * part)
        verdict = one.after(RoundResult(number, sent, sent / speed, left))
        sent = left
    assert verdict is Verdict.FINISH


def test_no_progress_is_called_hopeless_at_once_it_lasts() -> None:
    one = policy(rounds=1000)
    number = 1
    while one.after(RoundResult(number, GIB, 1.0, GIB)) is Verdict.ROUND:
        number += 1
    assert number == 1 + STALLED_ROUNDS
