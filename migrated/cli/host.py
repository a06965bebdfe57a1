"""``migrated check`` and ``migrated inspect``: what this host and a process on it can do; no agent needed."""

from __future__ import annotations

import click


@click.command()
def check() -> int:
    return 0


@click.command()
def inspect() -> int:
    return 0
