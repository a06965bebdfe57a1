"""When to ask, and when to give up."""

from __future__ import annotations

import pytest

from migrated.protocol.heartbeat import Heartbeat


def test_it_asks_once_an_interval() -> None:
    heartbeat = Heartbeat(2, 10, now=100)
    assert not heartbeat.due(101.9)
    assert heartbeat.due(102)
    assert not heartbeat.due(102)
    assert heartbeat.due(104)


def test_a_silent_peer_expires_and_any_byte_keeps_it_alive() -> None:
    heartbeat = Heartbeat(2, 10, now=100)
    assert not heartbeat.expired(110)
    assert heartbeat.expired(110.1)
    heartbeat.heard(105)
    assert not heartbeat.expired(115)
    heartbeat.heard(103)  # a late report does not shorten it
    assert not heartbeat.expired(115)
    assert heartbeat.expired(115.1)


def test_it_says_when_to_look_again() -> None:
    heartbeat = Heartbeat(4, 10, now=0)
    assert heartbeat.next_at() == 4
    assert heartbeat.due(8)
    assert heartbeat.next_at() == 10
    heartbeat.heard(9)
    assert heartbeat.next_at() == 12


@pytest.mark.parametrize(("interval", "limit"), [(0, 1), (-1, 1), (2, 2), (3, 2)])
def test_times_that_make_no_sense_are_refused(interval: float, limit: float) -> None:
    with pytest.raises(ValueError, match="heartbeat"):
        Heartbeat(interval, limit, now=0)
