"""End a command: exit codes, and errors as people and programs read them.

People get ``error:`` and ``hint:`` lines, programs an object in JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import click

from migrated.client import Record, RemoteError, State
from migrated.errors import AbortedError, ConfigError, TimeoutExceededError, UsageError, error_fields

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
ABORTED: Final = 3
TIMED_OUT: Final = 124  # as timeout(1)
INTERRUPTED: Final = 130  # as shells count: 128 + SIGINT


class WaitTimedOutError(TimeoutExceededError):
    """The migration has not ended in the time that the user gave.  It continues."""


def exit_code_of_error(error: BaseException) -> int:
    """Return 2 if what the user typed or asked for does not fit, 3 for aborted, 124 for a wait that timed out, else 1."""
    if isinstance(error, RemoteError):
        return USAGE if error.status in (400, 403, 404, 405, 409) else FAILED
    if isinstance(error, WaitTimedOutError):
        return TIMED_OUT
    if isinstance(error, AbortedError):
        return ABORTED
    return USAGE if isinstance(error, ConfigError | UsageError | click.UsageError) else FAILED


def exit_code_of_record(record: Record) -> int:
    """Return 0 for completed (or still going well), 1 for failed, 3 for aborted."""
    return {State.FAILED: FAILED, State.ABORTED: ABORTED}.get(record.state, DONE)


def printable(text: str) -> str:
    """Escape what a terminal would obey: error messages quote QEMU and guests."""
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode() for sign in text
    )


def tell(error: BaseException, *, as_json: bool) -> None:
    """Write ``error: …`` and its hint to stderr, and the error object to stdout if the output is JSON."""
    if isinstance(error, click.ClickException):
        info: dict[str, Any] = {"code": "usage", "message": error.format_message(), "hint": _usage_hint(error)}
    else:
        info = error_fields(error)
    print(f"error: {printable(info['message'])}", file=sys.stderr)
    if info.get("hint"):
        print(f"  hint: {printable(info['hint'])}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {key: value for key, value in info.items() if key != "state" or value}}))


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help says more" if context is not None else "migrated --help says more"
