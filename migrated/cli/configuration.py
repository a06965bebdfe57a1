"""``migrated config check``: whether an agent could start with a configuration file, without starting one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrated.cli import failure

if TYPE_CHECKING:
    from migrated.config import Role


@click.group()
def config() -> None:
    """Check configuration files."""


@config.command("check")
@click.argument("role", required=False, type=click.Choice(("source", "target")))
@click.option("--config", "path", metavar="FILE", help="File to check (default: /etc/migrated/ROLE.toml).")
def check_files(role: Role | None, path: str | None) -> int:
    """Read a configuration file as the agent of ROLE would, and say what is wrong with it.

    Without ROLE: every default file that exists.  What the file names (sockets, programs, libvirt's domains) is not
    looked at, except for the files of [tls]; `migrated guests` does that.
    """
    from migrated import config
    from migrated.link.credentials import Credentials  # loads the C core

    if role is None and path is not None:
        raise click.UsageError("--config needs the role of the agent that reads it: source or target")
    roles = [role] if role is not None else [one for one in config.KINDS if config.default_path(one).exists()]
    if not roles:
        files = " or ".join(str(config.default_path(one)) for one in config.KINDS)
        raise click.UsageError(f"there is no {files}: give a role and --config")
    for one in roles:
        found = config.load(path, one)
        if found.tls_files is not None:
            Credentials(found.tls_files, role=one, peers=found.tls.peers, where=found.path)
        count = len(found.guests)
        print(f"{found.path}: correct, {count} {'guest' if count == 1 else 'guests'}")
    return failure.DONE
