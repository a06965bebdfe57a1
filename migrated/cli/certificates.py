"""``migrated certificates``: a small certificate authority for operators who have none.

The agents do not need it: they take the certificates of any authority.
"""

from __future__ import annotations

import datetime as dt
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrated.cli import failure
from migrated.cli.migrations import json_flag, print_json
from migrated.paths import TLS_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Sequence

_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.group()
def certificates() -> None:
    """Make the certificates that the agents of your hosts show each other."""


@certificates.command("new-ca")
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@json_flag
def new_ca(*, directory: Path, as_json: bool) -> int:
    """Make a certificate authority in DIR.  Whoever has its ca-key.pem can make certificates that your agents accept."""
    from migrated import certificates as making

    files = making.make_authority(directory, now=dt.datetime.now(dt.UTC))
    if as_json:
        print_json({"files": [str(file) for file in files]})
        return failure.DONE
    print(f"The authority is in {directory}. Keep {files[-1].name} there, and offline if you can: no host needs it.")
    print(f"Next, for each host:  migrated certificates new HOST --ca {shlex.quote(str(directory))}")
    return failure.DONE


@certificates.command()
@click.argument("host")
@click.option("--ca", "ca", type=_DIRECTORY, default=Path(), help="Directory of the authority (default: this one).")
@click.option("--name", "names", multiple=True, help="A further name of the host; can be repeated.")
@click.option("--ip", "ips", multiple=True, help="An address by which others reach it; can be repeated.")
@click.option("--out", type=_DIRECTORY, help="Where to write the files (default: HOST in the authority's directory).")
@click.option("--days", type=click.IntRange(1, 3650), help="How long they are valid (default: two years).")
@json_flag
def new(
    *, host: str, ca: Path, names: Sequence[str], ips: Sequence[str], out: Path | None, days: int | None, as_json: bool
) -> int:
    """Make the certificates and keys of HOST, for its source and its target agent."""
    from migrated import certificates as making

    wanted = [making.check_name(name) for name in dict.fromkeys((host, *names, *ips))]
    directory = ca / host if out is None else out
    made = making.make_host(
        making.Authority.load(ca),
        directory,
        wanted,
        now=dt.datetime.now(dt.UTC),
        days=making.HOST_DAYS if days is None else days,
    )
    if as_json:
        print_json({"names": wanted, "files": [str(file) for file in made]})
        return failure.DONE
    print(f"The files of {host} are in {directory}, for the names {', '.join(wanted)}.")
    print(f"Copy them to {TLS_DIRECTORY} on {host}; the keys must be readable by root only:")
    print(f"  ssh root@{host} mkdir -p -m 700 {TLS_DIRECTORY}")
    print(f"  scp -p {shlex.quote(str(directory))}/*.pem root@{host}:{TLS_DIRECTORY}/")
    return failure.DONE
