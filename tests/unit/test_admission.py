from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.admission import Admission, client_at


def test_whoever_has_the_most_loses_the_oldest() -> None:
    admission: Admission[int] = Admission(4)
    assert [admission.enter("a", one) for one in range(4)] == [None] * 4
    assert [admission.enter("b", one) for one in (10, 11)] == [0, 1]
    assert admission.enter("a", 4) == 2
    assert len(admission) == 4


def test_thousands_of_one_host_leave_another_host_alone() -> None:
    admission: Admission[int] = Admission(8)
    assert admission.enter("honest", -1) is None
    assert -1 not in [admission.enter("hostile", one) for one in range(10_000)]
    admission.leave(-1)
    assert len(admission) == 7


def test_even_with_every_place_taken_a_newcomer_has_its_turn() -> None:
    admission: Admission[int] = Admission(8)
    for stranger in range(100):
        admission.enter(f"host {stranger}", stranger)
    assert admission.enter("honest", -1) is not None
    assert -1 not in [admission.enter(f"other {stranger}", 1000 + stranger) for stranger in range(7)]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=200))
def test_never_more_than_the_limit(steps: list[tuple[int, bool]]) -> None:
    admission: Admission[int] = Admission(5)
    inside: set[int] = set()
    for number, (client, enters) in enumerate(steps):
        if enters:
            inside.add(number)
            inside.discard(-1 if (dropped := admission.enter(client, number)) is None else dropped)
        elif inside:
            admission.leave(inside.pop())
        admission.leave(-5)  # nobody
        assert len(admission) == len(inside) <= 5


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_client_is_its_network(host: str, client: str) -> None:
    assert client_at(host) == client
