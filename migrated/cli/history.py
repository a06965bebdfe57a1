"""``migrated report`` and ``migrated logs``: what the agent has kept of a migration, for people who were not there."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrated.cli import failure
from migrated.cli.failure import printable
from migrated.cli.migrations import agent_verb, json_flag, print_json
from migrated.errors import HostError

if TYPE_CHECKING:
    from migrated.client import Client


@click.command()
@click.argument("id")
@click.option(
    "--output", "-o", metavar="FILE", help="Where to write it; `-`: standard output (default: GUEST-ID.html here)."
)
@agent_verb
async def report(client: Client, *, id: str, output: str | None) -> int:
    """Write a page with the plots of a migration: one HTML file that needs nothing else."""
    from migrated.http.dashboard import report as page

    record = await client.migration(id)
    about = await client.about()
    text = page.make(
        record, await client.series(record), await client.page_map(record), agent=about.name, version=about.version
    )
    if output == "-":
        print(text, end="")
        return failure.DONE
    path = Path(output or f"{record.guest}-{record.id[:12]}.html")
    _write(path, text)
    print(path)
    return failure.DONE


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}"
        raise HostError(message, code="output-file", hint="give another file with --output") from error


@click.command()
@click.argument("id")
@json_flag
@agent_verb
async def logs(client: Client, *, id: str, as_json: bool) -> int:
    """Print what the agent has logged about a migration: its last 500 lines."""
    lines = await client.log(id)
    if as_json:
        print_json({"log": lines})
        return failure.DONE
    for line in lines:
        at = dt.datetime.fromtimestamp(line.at, tz=dt.UTC).astimezone()
        fields = " ".join(f"{key}={value}" for key, value in line.fields.items() if key not in ("logger", "timestamp"))
        print(printable(f"{at:%Y-%m-%d %H:%M:%S.%f} {line.level:7} {line.event}  {fields}".rstrip()))
    return failure.DONE
