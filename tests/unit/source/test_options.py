"""What a migration is asked to be: ranges, defaults, and changes that are taken whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.address import parse_address
from migrated.agent.requests import SetRequest, StartRequest
from migrated.errors import ConfigError
from migrated.options import MigrationOptions
from migrated.settings import read
from migrated.source.options import Options

HERE = {"guest": "vm1", "to": "host-b:7440"}


def options(**request: Any) -> Options:
    return Options.of(read(StartRequest, {**HERE, **request}, "request"), MigrationOptions())


def changes(**request: Any) -> SetRequest:
    return read(SetRequest, request, "request")


def test_what_is_not_said_is_the_configurations() -> None:
    table = {
        "mode": "precopy",
        "downtime_limit_ms": 75,
        "max_rounds": 3,
        "streams": 5,
        "max_bandwidth": "8Mbit",
        "drain_bandwidth": "1MB",
    }
    defaults = read(MigrationOptions, table, "defaults")
    one = Options.of(read(StartRequest, {**HERE, "streams": None}, "request"), defaults)
    assert one.target == parse_address("host-b:7440")
    assert {name: getattr(one, name) for name in MigrationOptions.model_fields} == dict(defaults)
    assert (one.downtime_limit_seconds, one.max_bandwidth) == (0.075, 1_000_000)


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
    assert one.model_dump() == {
        "target": parse_address("host-b:7440"),
        "mode": "postcopy",
        "downtime_limit_ms": 1,
        "max_rounds": 1,
        "streams": 16,
        "max_bandwidth": 1_250_000_000,
        "drain_bandwidth": 5_000_000,
        "compression": "zstd",
    }


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
    one.apply(changes(max_bandwidth="1GB", drain_bandwidth="2GB", downtime_limit_ms=10, max_rounds=99))
    assert (one.max_bandwidth, one.drain_bandwidth, one.downtime_limit_seconds, one.max_rounds) == (
        1_000_000_000,
        2_000_000_000,
        0.01,
        99,
    )
    one.apply(changes(max_bandwidth="0"))
    assert (one.max_bandwidth, one.drain_bandwidth) == (0, 2_000_000_000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_bandwidth": "never"},
        {"drain_bandwidth": "x"},
        {"downtime_limit_ms": 0.0},
        {"max_rounds": 0},
        {"streams": 3},
    ],
    ids=str,
)
def test_a_change_is_taken_whole_or_not_at_all(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "max_bandwidth": "1GB",
        "drain_bandwidth": "1GB",
        "downtime_limit_ms": 9.0,
        "max_rounds": 9,
    }
    with pytest.raises(ConfigError) as caught:
        changes(**{**right, **wrong})
    assert next(iter(wrong)) in caught.value.message


def test_a_change_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to set") as caught:
        changes(max_rounds=None)
    assert "max_bandwidth" in caught.value.hint


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_bandwidth": st.none() | st.text(max_size=12),
            "downtime_limit_ms": st.none() | st.floats(),
            "max_rounds": st.none() | st.integers(),
        },
    )
)
def test_no_change_leaves_what_would_be_refused(request: dict[str, Any]) -> None:
    one = options()
    before = one.model_copy()
    try:
        one.apply(changes(**request))
    except ConfigError:
        assert one == before
    assert 0 < one.downtime_limit_ms <= 60_000
    assert 1 <= one.max_rounds <= 1000
    assert 0 <= one.max_bandwidth < 1 << 64
