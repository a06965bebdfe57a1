"""Run ten thousand schedules of failures and commands: the guest runs in at most one place, and in the end it runs."""

from __future__ import annotations

import os

import pytest

from tests.simulation.run import attempt, explain, run_many
from tests.simulation.schedule import Schedule, draw_schedule

SCHEDULES = 10_000
#: A run must visit more states than this; both sessions have 50 in total.
MANY_STATES = 30


@pytest.mark.timeout(900)
def test_no_schedule_breaks_a_rule() -> None:
    total = run_many(0, SCHEDULES, min(2, os.cpu_count() or 1))
    failing = [seed for seed, _ in total["failing"]]
    assert not failing, "\n".join(explain(seed) for seed in failing[:3])
    assert total["figures"]["schedules"] == SCHEDULES
    assert len(total["states"]) > MANY_STATES, "the schedules do not come far"


def test_a_seed_gives_the_same_run_twice() -> None:
    for seed in range(20):
        first, second = (attempt(draw_schedule(seed), trace=True)[1] for _ in range(2))
        assert first.lines == second.lines


def test_a_guest_moves_where_nothing_fails() -> None:
    for seed in range(20):
        problem, world = attempt(Schedule(seed, ()))
        assert problem is None
        assert world.committed
