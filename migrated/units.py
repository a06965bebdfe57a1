"""Parse and format sizes and rates, and format durations, for people.

Sizes are in bytes.  ``K M G T`` and ``KiB MiB GiB TiB`` are powers of 1024, as is usual for page sizes; ``KB MB GB TB``
are powers of 1000.  Rates are in bytes per second and always need a unit, since ``500M`` could mean bits, bytes or
mebibytes: ``10Gbit``, ``500MB``, ``200MiB``, each with or without ``/s``; ``0`` means "no limit".
"""

from __future__ import annotations

import re
from typing import Final

from migrated.errors import ConfigError

_NUMBER: Final = r"(?P<number>\d{1,19}(?:\.\d{1,9})?)"
_QUANTITY: Final = re.compile(rf"{_NUMBER}\s*(?P<unit>[A-Za-z]*)", re.ASCII)

_SIZE_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{letter: 1 << 10 * power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1 << 10 * power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}
# bits per second are decimal, as in link speeds
_BIT_UNITS: Final[dict[str, int]] = {
    "bit": 1,
    **{f"{letter}bit": 1000**power for power, letter in enumerate("kmgt", 1)},
}

_MAX_BYTES: Final = 1 << 62

SIZE_EXAMPLES: Final = "a size such as 4K, 2M, 1G or 1.5GiB"
RATE_EXAMPLES: Final = "a rate such as 10Gbit, 500MB or 200MiB (a second), or 0 for no limit"


def parse_size(text: str) -> int:
    """Parse a size such as ``"2M"``, ``"1.5GiB"`` or ``"4096"``; return bytes.  Raises ConfigError."""
    number, unit = _split(text, "size", SIZE_EXAMPLES)
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        message = f"{text!r} is not a size: unknown unit {unit!r}"
        raise ConfigError(message, hint=f"give {SIZE_EXAMPLES}")
    return _bounded(_scaled(number, factor), text, SIZE_EXAMPLES)


def parse_rate(text: str) -> int:
    """Parse a rate (``"10Gbit"``, ``"200MiB/s"``); return bytes per second, 0 for "no limit".  Raises ConfigError."""
    number, unit = _split(text.removesuffix("/s"), "rate", RATE_EXAMPLES)
    key = unit.lower().removesuffix("ps") if unit.lower().endswith("bitps") else unit.lower()
    if float(number) == 0.0:
        return 0
    if key in _BIT_UNITS:
        value = _scaled(number, _BIT_UNITS[key]) // 8
    elif key.endswith("b") and key in _SIZE_UNITS:
        value = _scaled(number, _SIZE_UNITS[key])
    else:
        problem = f"unknown unit {unit!r}" if unit else "the unit is missing"
        message = f"{text!r} is not a rate: {problem}"
        raise ConfigError(message, hint=f"give {RATE_EXAMPLES}")
    if value == 0:  # would silently become "no limit"
        message = f"{text!r} is less than one byte a second"
        raise ConfigError(message, hint=f"give {RATE_EXAMPLES}")
    return _bounded(value, text, RATE_EXAMPLES)


def format_size(size_bytes: float) -> str:
    """Format bytes as ``"1.5 GiB"``: at most three digits, exact below 1 KiB."""
    return _format(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_rate(bytes_per_second: float) -> str:
    """Format bytes per second as ``"1.2 GB/s"``: decimal, as in link speeds."""
    return _format(bytes_per_second, 1000, ("B", "KB", "MB", "GB", "TB")) + "/s"


def format_duration(seconds: float) -> str:
    """Format seconds as ``"85 µs"``, ``"48 ms"``, ``"3.4 s"``, ``"2 m 05 s"`` or ``"1 h 10 m"``."""
    # Rounding reaches the next unit at these bounds: no "1000 ms", no "60.0 s".
    if seconds < 0.0009995:
        return f"{_three_figures(seconds * 1e6)} µs" if seconds else "0 s"
    if seconds < 0.9995:
        return f"{_three_figures(seconds * 1e3)} ms"
    if seconds < 59.95:
        return f"{_three_figures(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def _split(text: str, noun: str, examples: str) -> tuple[str, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        message = f"{text!r} is not a {noun}"
        raise ConfigError(message, hint=f"give {examples}")
    return match["number"], match["unit"]


def _scaled(number: str, factor: int) -> int:
    """Multiply exactly: a float would lose bytes above 2^53."""
    whole, _, fraction = number.partition(".")
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def _bounded(value: int, text: str, examples: str) -> int:
    if value > _MAX_BYTES:
        message = f"{text!r} is too large"
        raise ConfigError(message, hint=f"give {examples}")
    return value


def _three_figures(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return (f"{value:.1f}" if value >= 9.995 else f"{value:.2f}").rstrip("0").rstrip(".")


def _format(value: float, base: int, units: tuple[str, ...]) -> str:
    scaled = value
    index = 0
    while scaled >= base - 0.5 and index < len(units) - 1:  # no "1000 KB": that is 1 MB
        scaled /= base
        index += 1
    return f"{_three_figures(scaled) if index else round(scaled)} {units[index]}"
