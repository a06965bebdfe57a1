"""``migrated demo``."""

from __future__ import annotations

import click

from migrated.config import MODES


@click.command()
@click.option("--mode", type=click.Choice(MODES), default="hybrid", show_default=True)
@click.option(
    "--guest",
    type=click.Choice(["auto", "linux", "process"]),
    default="auto",
    show_default=True,
    help="linux: a real one in QEMU; process: a co-operative one, without root; auto: the best that can be had here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(*, mode: str, guest: str, as_json: bool) -> int:
    """Both agents, a guest and a migration on this machine, watched and verified."""
    from migrated.demo.run import run  # boots guests: nothing to load for any other verb

    return run(json=as_json, mode=mode, guest=guest)
