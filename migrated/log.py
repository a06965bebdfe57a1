"""Set up logging: structlog on top of the standard library's handlers, one line per event.

On a terminal the lines are formatted for people; elsewhere (the journal, a file) each line is one JSON object.  Library
messages logged through the standard library take the same form.  Bind ``migration`` to a logger to put the migration's
id on each of its lines.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO, get_args

import structlog
from structlog.stdlib import ProcessorFormatter

from migrated.errors import ConfigError
from migrated.log_lines import keep

if TYPE_CHECKING:
    from collections.abc import MutableMapping

Format = Literal["auto", "console", "json"]
FORMATS: Final = get_args(Format)
LEVELS: Final = ("debug", "info", "warning", "error")

#: Values under these keys never reach a log.
SECRET_KEYS: Final = frozenset({"token", "secret", "block_secret", "password", "private_key"})
_REDACTED: Final = "(secret)"


def configure(*, level: str = "info", fmt: str = "auto", stream: TextIO | None = None) -> bool:
    """Configure logging, also repeatedly; return True if the lines are for people.  Raises ConfigError."""
    if level not in LEVELS:
        message = f"{level!r} is not a log level"
        raise ConfigError(message, hint=f"give one of {', '.join(LEVELS)}")
    if fmt not in FORMATS:
        message = f"{fmt!r} is not a log format"
        raise ConfigError(message, hint=f"give one of {', '.join(FORMATS)}")
    output = stream if stream is not None else sys.stderr
    people = fmt == "console" or (fmt == "auto" and output.isatty())

    # Applied to our own events and to those of libraries.
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        redact,
        keep,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if people else "iso", utc=not people),
        structlog.processors.StackInfoRenderer(),
    ]
    final: list[structlog.typing.Processor] = [ProcessorFormatter.remove_processors_meta]
    if people:
        final.append(structlog.dev.ConsoleRenderer(colors=output.isatty()))
    else:
        final += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]

    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # loggers made before this call must not keep the old configuration
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    root = logging.getLogger()
    for former in list(root.handlers):
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # An access log would drown everything else.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    if level != "debug":
        logging.getLogger("qemu.qmp").setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    return people


class Sparing:
    """Log at most ``lines`` warnings in each ``seconds``, for events that strangers cause: they must not fill the disk.

    The first line of the next period says how many were left out.
    """

    def __init__(self, logger: Any, *, lines: int = 20, seconds: float = 10.0) -> None:
        self._logger = logger
        self._limit = lines
        self._seconds = seconds
        self._begun_at = -math.inf
        self._lines = 0
        self._left_out = 0

    def warning(self, event: str, **fields: Any) -> None:
        """Log, or count as left out."""
        now = time.monotonic()
        if now - self._begun_at >= self._seconds:
            self._begun_at, self._lines = now, 0
        if self._lines == self._limit:
            self._left_out += 1
            return
        self._lines += 1
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        self._logger.warning(event, **fields)


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the values of `SECRET_KEYS`, also in nested tables (a structlog processor)."""
    for key, value in event.items():
        if key in SECRET_KEYS:
            event[key] = _REDACTED
        elif isinstance(value, dict):
            event[key] = redact(None, "", dict(value))
    return event
