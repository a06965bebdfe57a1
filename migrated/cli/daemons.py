"""Run an agent in the foreground: ``migrated source`` and ``migrated target``.

The service manager starts them the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from migrated.log import FORMATS, LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from migrated.config import Role

F = TypeVar("F", bound="Callable[..., Any]")


def _daemon_options(function: F) -> F:
    for option in (
        click.option("--log-format", type=click.Choice(FORMATS), default="auto", help="auto: console on a terminal."),
        click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True),
        click.option("--config", "path", metavar="FILE", help="Configuration (default: /etc/migrated/ROLE.toml)."),
    ):
        function = option(function)
    return function


def _run(role: Role, path: str | None, log_level: str, log_format: str) -> int:
    from migrated import daemon  # what the daemon needs is not loaded for the other verbs

    return daemon.run(role, path, log_level=log_level, log_format=log_format)


@click.command()
@_daemon_options
def source(path: str | None, log_level: str, log_format: str) -> int:
    """Run the agent of a host that guests leave."""
    return _run("source", path, log_level, log_format)


@click.command()
@_daemon_options
def target(path: str | None, log_level: str, log_format: str) -> int:
    """Run the agent of a host that guests come to."""
    return _run("target", path, log_level, log_format)


@click.command(hidden=True)
def helper() -> int:
    """Perform operations on guests that need privileges, for agents without (migrated-helper.socket starts this)."""
    from migrated import log
    from migrated.guests.access.helper import serve, take_listener

    log.configure(level="info", fmt="auto")
    serve(take_listener())
    return 0
