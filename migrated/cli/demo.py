"""``migrated demo``."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(*, as_json: bool) -> int:
    """Both agents, a guest and a migration on this machine, watched and verified."""
    from migrated.demo import run  # boots guests: nothing to load for any other verb

    return run(json=as_json)
