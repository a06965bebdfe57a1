"""Rates from counters that are looked at now and then."""

from __future__ import annotations

import pytest

from migrated.agent.rates import WINDOW_SECONDS, Rates


def test_throughput_is_that_of_the_last_moments() -> None:
    rates = Rates()
    for tick in range(10):
        rates.sent(1000 * tick, tick * 0.5)
    assert rates.throughput == pytest.approx(2000)
    for tick in range(10, 20):
        rates.sent(9000, tick * 0.5)
    assert rates.throughput == 0


def test_two_looks_at_once_are_no_rate() -> None:
    rates = Rates()
    rates.sent(0, 5.0)
    rates.sent(1 << 30, 5.0)
    assert rates.throughput == 0
    rates.sent(1 << 30, 5.0 + WINDOW_SECONDS / 2)
    assert rates.throughput == pytest.approx((1 << 30) / (WINDOW_SECONDS / 2))


def test_the_first_scan_has_no_rate_yet() -> None:
    rates = Rates()
    rates.dirty(1 << 30, 1.0)
    assert rates.dirty_rate == 0
    rates.dirty(1000, 1.5)
    assert rates.dirty_rate == pytest.approx(2000)
    rates.dirty(5, 1.5)  # no time has passed: no division by it
    assert rates.dirty_rate == pytest.approx(2000)
