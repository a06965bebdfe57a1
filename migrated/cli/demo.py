"""Define the command ``migrated demo``.

`migrated.demo.run` has the demo itself.
"""

from __future__ import annotations

import click

from migrated.cli.migrations import options
from migrated.options import MigrationOptions


@click.command()
@options(MigrationOptions, "mode")
@click.option(
    "--guest",
    type=click.Choice(["auto", "linux", "process"]),
    default="auto",
    show_default=True,
    help="linux: a real one in QEMU; process: a co-operative one, without root; auto: the best that can be had here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(*, mode: str | None, guest: str, as_json: bool) -> int:
    """Both agents, a guest and a migration on this machine, watched and verified."""
    from migrated.demo.run import run  # boots guests: nothing to load for any other verb

    return run(json=as_json, mode=mode or MigrationOptions().mode, guest=guest)
