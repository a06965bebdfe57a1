"""Certificates of a test: an authority and the files of both agents, valid or wrong in one way."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from migrated import certificates
from migrated.certificates import Authority
from migrated.settings import TlsFiles

DAY = dt.timedelta(days=1)
#: By what the agents of a test reach each other, and the names of their certificates beside it.
LOOPBACK = "127.0.0.1"
NAMES = {"source": ("host-a.example", LOOPBACK), "target": ("host-b.example", LOOPBACK)}


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Pki:
    """An authority, and below ``directory`` the files of agents that it has signed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.make("a test's authority", now=now())

    def write(
        self,
        role: str,
        names: Sequence[str] = (),
        *,
        place: str = "",
        signer: Authority | None = None,
        as_role: str = "",
        valid: tuple[int, int] = (-1, 365),
    ) -> TlsFiles:
        """Write the files of a role's agent, in place of former ones.

        ``place``: of another agent than the role's usual one; ``valid``: from when until when, in days from now.
        """
        files = TlsFiles.conventional(role, self.directory / (place or role))
        files.cert.parent.mkdir(parents=True, exist_ok=True)
        since, until = (now() + days * DAY for days in valid)
        certificate, key = (signer or self.authority).issue(
            names or NAMES[role], role=as_role or role, not_before=since, not_after=until
        )
        for file, data in zip(
            files,
            (certificates.pem(self.authority.certificate), certificates.pem(certificate), certificates.pem(key)),
            strict=True,
        ):
            new = file.with_suffix(".new")
            new.write_bytes(data)
            new.chmod(0o600)
            new.replace(file)
        return files

    def tables(self) -> dict[str, dict[str, Any]]:
        """The tables [tls] of both agents, whose files are written."""
        return {role: table(self.write(role)) for role in NAMES}


def table(files: TlsFiles) -> dict[str, Any]:
    """The files as a table [tls]."""
    return {key: str(path) for key, path in files._asdict().items()}
