"""What a migration is asked to be: ranges, defaults, and changes that are taken whole or not at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.address import parse_address
from migrated.agent.requests import SetRequest, StartRequest
from migrated.config import MigrationSection
from migrated.errors import ConfigError
from migrated.source.options import Options


def options(**request: Any) -> Options:
    return Options.of(StartRequest(**{"guest": "vm1", "to": "host-b:7440", **request}), MigrationSection())


def test_what_is_not_said_is_the_configurations() -> None:
    defaults = MigrationSection(
        mode="precopy", downtime_limit_ms=75, max_rounds=3, streams=5, max_bandwidth="8Mbit", drain_bandwidth="1MB"
    )
    assert Options.of(StartRequest(guest="vm1", to="host-b:7440"), defaults) == Options(
        target=parse_address("host-b:7440"),
        mode="precopy",
        downtime_limit_seconds=0.075,
        max_rounds=3,
        streams=5,
        max_bandwidth=1_000_000,
        drain_bandwidth=1_000_000,
    )


def test_what_is_said_counts() -> None:
    one = options(
        mode="postcopy",
        downtime_limit_ms=1,
        max_rounds=1,
        streams=16,
        max_bandwidth="10Gbit",
        drain_bandwidth="5MB",
        compression="zstd",
    )
    assert one == Options(
        target=parse_address("host-b:7440"),
        mode="postcopy",
        downtime_limit_seconds=0.001,
        max_rounds=1,
        streams=16,
        max_bandwidth=1_250_000_000,
        drain_bandwidth=5_000_000,
        compression="zstd",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "live"},
        {"mode": ""},
        {"downtime_limit_ms": 0},
        {"downtime_limit_ms": -1},
        {"downtime_limit_ms": 60_001},
        {"downtime_limit_ms": float("nan")},
        {"downtime_limit_ms": float("inf")},
        {"max_rounds": 0},
        {"max_rounds": 1001},
        {"streams": 0},
        {"streams": 17},
        {"compression": "gzip"},
        {"max_bandwidth": "fast"},
        {"max_bandwidth": "10"},
        {"drain_bandwidth": "-1MB"},
        {"max_bandwidth": "99999999999Gbit"},
        {"to": "host-b"},
        {"to": ""},
        {"to": "host-b:0"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_what_is_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        options(**wrong)
    assert caught.value.hint


def test_limits_change() -> None:
    one = options()
    one.apply(SetRequest(max_bandwidth="1GB", drain_bandwidth="2GB", downtime_limit_ms=10, max_rounds=99))
    assert (one.max_bandwidth, one.drain_bandwidth, one.downtime_limit_seconds, one.max_rounds) == (
        1_000_000_000,
        2_000_000_000,
        0.01,
        99,
    )
    one.apply(SetRequest(max_bandwidth="0"))
    assert (one.max_bandwidth, one.drain_bandwidth) == (0, 2_000_000_000)


@pytest.mark.parametrize(
    "wrong",
    [{"max_bandwidth": "never"}, {"drain_bandwidth": "x"}, {"downtime_limit_ms": 0.0}, {"max_rounds": 0}],
    ids=str,
)
def test_a_change_is_taken_whole_or_not_at_all(wrong: dict[str, Any]) -> None:
    one = options()
    before = dataclasses.replace(one)
    right: dict[str, Any] = {
        "max_bandwidth": "1GB",
        "drain_bandwidth": "1GB",
        "downtime_limit_ms": 9.0,
        "max_rounds": 9,
    }
    with pytest.raises(ConfigError):
        one.apply(SetRequest(**{**right, **wrong}))
    assert one == before


@given(
    st.builds(
        SetRequest,
        max_bandwidth=st.none() | st.text(max_size=12),
        downtime_limit_ms=st.none() | st.floats(),
        max_rounds=st.none() | st.integers(),
    )
)
def test_no_change_leaves_what_would_be_refused(request: SetRequest) -> None:
    one = options()
    before = dataclasses.replace(one)
    try:
        one.apply(request)
    except ConfigError:
        assert one == before
    one.check()
    assert 0 <= one.max_bandwidth < 1 << 64
