from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated import units
from migrated.address import parse_address
from migrated.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4096", 4096), ("4K", 4096), ("2M", 2 << 20), ("1G", 1 << 30), ("1.5GiB", 3 << 29), ("2MB", 2_000_000), ("0", 0)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        *(("0", 0), ("0Gbit", 0), ("10Gbit", 1_250_000_000), ("10Gbps", None), ("1Gbitps", 125_000_000)),
        *(("500MB", 500_000_000), ("500MB/s", 500_000_000), ("200MiB/s", 200 << 20), ("8bit", 1), ("1B", 1)),
        *(("500M", None), ("500", None), ("-1MB", None), ("1bit", None), ("", None), ("MB", None), ("1e3MB", None)),
        ("9999999999TB", None),
    ],
)
def test_rates_always_carry_a_unit(text: str, bytes_per_second: int | None) -> None:
    if bytes_per_second is None:
        with pytest.raises(ConfigError) as caught:
            units.parse_rate(text)
        assert "10Gbit" in caught.value.hint
    else:
        assert units.parse_rate(text) == bytes_per_second


@given(st.text(max_size=20))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    for parse in (units.parse_size, units.parse_rate, parse_address):
        try:
            parse(text)
        except ConfigError as error:
            assert error.hint  # noqa: PT017 - most texts raise, some do not


@given(st.floats(min_value=0, max_value=9e14))
def test_shown_figures_are_short(value: float) -> None:
    assert len(units.format_size(value)) <= 8
    assert len(units.format_rate(value)) <= 9
    assert "1000 " not in units.format_rate(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (5e-5, "50 µs"), (0.0009996, "1 ms"), (0.0485, "48.5 ms"), (0.9996, "1 s"), (59.96, "1 m 00 s")],
)
def test_shown_durations_never_reach_the_next_unit(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("a.example:1", "a.example", 1), ("[::1]:7440", "::1", 7440), ("192.0.2.7:65535", "192.0.2.7", 65535)],
)
def test_addresses_come_back_as_they_were_written(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    ["a", ":1", "a:", "a:x", "a:0", "a:70000", "::1:1", "[::1", "[x]:1", "a b:1", "-a:1", "a:²", "a:00000099999"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)
