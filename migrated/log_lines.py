"""The last lines of the log that name a migration, kept in memory for as long as somebody holds them.

`keep` is the processor of `migrated.log` that adds them.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import MutableMapping

#: Lines that are kept of each migration; of more, the first ones are dropped.
MAX_LINES: Final = 500


class Line(msgspec.Struct):
    """A line of a migration's log; ``at`` is Unix time."""

    at: float
    level: str
    event: str
    fields: dict[str, str] = {}


class Lines(deque[Line]):
    """The last lines of one migration."""


_lines: weakref.WeakValueDictionary[str, Lines] = weakref.WeakValueDictionary()


def lines_of(migration_id: str) -> Lines:
    """Return the lines of a migration.  They are kept from now on, for as long as somebody holds them."""
    lines = _lines.get(migration_id)
    if lines is None:
        lines = _lines[migration_id] = Lines(maxlen=MAX_LINES)
    return lines


def keep(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add a line that names a migration to those that are kept of it (a structlog processor)."""
    lines = _lines.get(str(event.get("migration")))
    if lines is not None:
        known = {"migration", "guest", "event", "level", "exc_info"}
        fields = {key: str(value) for key, value in event.items() if key not in known and not key.startswith("_")}
        lines.append(Line(time.time(), str(event.get("level", "")), str(event.get("event", "")), fields))
    return event
