"""Parse QEMU's command line: options, and the properties in an option's value.

A value is either *keyed* or one JSON object.  A keyed value (``memory-backend-ram,id=m,size=1G``) is separated by
commas; a comma in a value is doubled, and the key of the first property may be implied.  `Properties` reads and changes
both forms and writes the form that it has read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import msgspec

#: Options without an argument, of every QEMU since 4.0; every other option takes one.
# fmt: off
_FLAGS = frozenset({
    "S", "alt-grab", "async-teardown", "audio-help", "ctrl-grab", "curses", "daemonize", "enable-fips",
    "enable-hax", "enable-kvm", "enable-sync-profile", "full-screen", "h", "help", "mem-prealloc", "no-acpi",
    "no-fd-bootchk", "no-frame", "no-hpet", "no-kvm", "no-kvm-irqchip", "no-kvm-pit", "no-kvm-pit-reinjection",
    "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nodefconfig", "nographic", "old-param",
    "only-migratable", "portrait", "preconfig", "rtc-td-hack", "s", "sdl", "semihosting", "singlestep", "snapshot",
    "usb", "version", "win2k-hack", "xen-attach", "xen-create", "xen-domid-restrict",
})
# fmt: on
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)
_SUFFIXES = "bkmgtpe"


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option.  ``flag`` as written (``-m``, ``--object``); empty for an argument without one: a disk image."""

    flag: str
    value: str | None = None

    @property
    def name(self) -> str:
        """The option's name without dashes."""
        return self.flag.lstrip("-")

    @property
    def words(self) -> tuple[str, ...]:
        """The option as arguments."""
        return tuple(word for word in (self.flag, self.value) if word)


def parse_options(arguments: Sequence[str]) -> list[Option]:
    """Return the options of a command line without its program."""
    found = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "-":
            found.append(Option("", word))
        elif word.lstrip("-") in _FLAGS:
            found.append(Option(word))
        else:
            found.append(Option(word, next(words, None)))
    return found


class Properties:
    """The properties of a value, in order.

    ``implied``: the key of a first property that has none (``-machine q35``).
    """

    def __init__(self, text: str, implied: str = "") -> None:
        self._implied = implied
        self._json: dict[str, Any] | None = None
        self._pairs: list[tuple[str, str | None]] = []
        if text.startswith("{"):
            with contextlib.suppress(msgspec.DecodeError, UnicodeEncodeError):
                decoded = msgspec.json.decode(text)
                self._json = decoded if isinstance(decoded, dict) else None
        if self._json is None:
            self._pairs = [self._pair(part, first=index == 0) for index, part in enumerate(_split(text))]

    def _pair(self, part: str, *, first: bool) -> tuple[str, str | None]:
        key, equals, value = part.partition("=")
        if not equals:
            return (self._implied, _unescape(part)) if first and self._implied else (_unescape(part), None)
        return key, _unescape(value)

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield every property as text, a JSON object's inner ones with dotted keys; a key alone means ``on``."""
        if self._json is not None:
            yield from _flatten("", self._json)
            return
        for key, value in self._pairs:
            yield key, "on" if value is None else value

    def get(self, key: str, default: str = "") -> str:
        """Return the value in force, which is the last one."""
        return dict(self.items()).get(key, default)

    def __contains__(self, key: str) -> bool:
        return any(key == other for other, _ in self.items())

    def set(self, key: str, value: str | bool) -> None:
        """Replace the value in place, or append the property."""
        if self._json is not None:
            self._json[key] = value
            return
        text = ("on" if value else "off") if isinstance(value, bool) else value
        places = [index for index, (other, _) in enumerate(self._pairs) if other == key]
        if places:
            self._pairs[places[0]] = (key, text)
            for index in reversed(places[1:]):
                del self._pairs[index]
        else:
            self._pairs.append((key, text))

    def remove(self, key: str) -> None:
        """Remove a property with all its values."""
        if self._json is not None:
            self._json.pop(key, None)
        self._pairs = [pair for pair in self._pairs if pair[0] != key]

    def __str__(self) -> str:
        if self._json is not None:
            return msgspec.json.encode(self._json).decode()
        return ",".join(self._written(index, *pair) for index, pair in enumerate(self._pairs))

    def _written(self, index: int, key: str, value: str | None) -> str:
        if value is None:
            return _escape(key)
        if index == 0 and key == self._implied and "=" not in value:
            return _escape(value)
        return f"{key}={_escape(value)}"


def _split(text: str) -> list[str]:
    """Return the parts between single commas; doubled ones stay doubled."""
    parts, start = [], 0
    position = 0
    while position < len(text):
        if text[position] == ",":
            if text[position : position + 2] == ",,":
                position += 2
                continue
            parts.append(text[start:position])
            start = position + 1
        position += 1
    parts.append(text[start:])
    return [part for part in parts if part]


def _unescape(text: str) -> str:
    return text.replace(",,", ",")


def _escape(text: str) -> str:
    return text.replace(",", ",,")


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flatten(f"{prefix}.{index}", inner)
    elif isinstance(value, bool):
        yield prefix, "on" if value else "off"
    else:
        yield prefix, "" if value is None else str(value)


def parse_size(text: str, unit: str = "b") -> int | None:
    """Return a size in bytes as QEMU parses it, or None if it is not a size.

    A suffix is a power of 1024; ``unit`` applies to a number without one.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    return int(Fraction(match[1]) * (1 << 10 * _SUFFIXES.index((match[2] or unit).lower())))


def format_size(size_bytes: int) -> str:
    """Return the shortest exact form that QEMU parses: ``256M``."""
    power = max(power for power in range(5) if size_bytes % (1 << 10 * power) == 0) if size_bytes else 0
    return f"{size_bytes >> 10 * power}{_SUFFIXES[power].upper() if power else ''}"
