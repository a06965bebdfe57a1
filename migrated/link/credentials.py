"""What an agent proves itself with, and whom it accepts: its certificate, its authorities, the names of its peers.

The files are read again when they change: each new connection looks at them first, and so do SIGHUP, ``status`` and
`Credentials.watch`.  A change that cannot be used leaves the former certificate in use until the files change again: a
certificate and its key are replaced one after the other, and do not fit in between.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import fnmatch
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from migrated.errors import ConfigError, RemoteProtocolError, TlsError
from migrated.memory.channel import Tls
from migrated.settings import TlsFiles

log = structlog.get_logger("migrated.tls")

#: A certificate that expires within this time is a problem.
EXPIRES_SOON_SECONDS: Final = 30 * 86400
_REPORT_AGAIN_SECONDS: Final = 86400
#: How often the files are looked at while nobody connects.
_WATCH_SECONDS: Final = 600
_MISSING: Final = (
    "`migrated certificates --help` makes certificates for hosts that have none; "
    "`[tls] insecure = true` does without, on loopback"
)

_Stamp = tuple[tuple[int, ...], ...]


class Credentials:
    """The files of ``[tls]`` as they are now.  Creating it raises ConfigError, which names the key, the file and why."""

    def __init__(self, files: TlsFiles, *, role: str, peers: Sequence[str] = (), where: str = "[tls]") -> None:
        """``peers``: patterns of which a name of the peer must match one; ``where`` begins the messages."""
        self._files = files
        self._server = role == "target"
        self._peers = [pattern.lower() for pattern in peers]
        self._where = where
        self._stamp = self._look()  # of the files that were read last, used or not
        self._key_mode = 0
        self._tls = self._load()
        self._reported_at = 0.0

    # ------------------------------------------------------------ the files

    def current(self) -> Tls:
        """Return what new connections use."""
        stamp = self._look()
        if stamp == self._stamp:
            return self._tls
        self._stamp = stamp  # from before reading: what changes meanwhile is read next time
        try:
            self._tls = self._load()
        except ConfigError as error:
            log.warning(
                "cannot use the changed certificate: the former one stays in use", error=error.message, hint=error.hint
            )
        else:
            log.info("certificate read again", file=str(self._files.cert), expires=_date(self.expires_at))
            self._report()
        return self._tls

    def _look(self) -> _Stamp:
        """Return what changes when a file does."""
        return tuple(_stamp(file) for file in self._files)

    def _load(self) -> Tls:
        for key, file in self._files._asdict().items():
            try:
                file.read_bytes()
                mode = file.stat().st_mode
            except OSError as error:
                raise self._unusable(key, file, error) from error
        try:
            tls = Tls(server=self._server, ca=self._files.ca, certificate=self._files.cert, key=self._files.key)
        except TlsError as error:
            key = next((key for key, file in self._files._asdict().items() if str(file) in error.message), "cert")
            raise ConfigError(
                f"{self._where}: tls.{key}: {error.message}",
                code="tls-files",
                hint="ca and cert are PEM files with certificates, key is the unencrypted key of the one in cert",
            ) from error
        self._key_mode = stat.S_IMODE(mode)  # the last file's
        return tls

    def _unusable(self, key: str, file: Path, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._where}: tls.{key}: {file}: {error.strerror}",
            code="tls-files",
            hint=_MISSING if isinstance(error, FileNotFoundError) else "it must be a file that this agent may read",
        )

    # ------------------------------------------------------------ validity

    @property
    def expires_at(self) -> float:
        """When the certificate in use expires, in seconds since the epoch."""
        return float(self._tls.validity()[1])

    @property
    def valid(self) -> bool:
        """Whether the certificate in use is valid now, by this host's clock."""
        since, until = self._tls.validity()
        return since <= time.time() < until

    def problems(self) -> list[str]:
        """Return what is wrong with the files in use now, or will be soon."""
        now, found = time.time(), []
        since, until = self._tls.validity()
        if now < since:
            found.append(f"{self._files.cert} is not valid before {_date(since)}: is this host's clock right?")
        elif now >= until:
            found.append(f"{self._files.cert} expired on {_date(until)}: no peer accepts it")
        elif now >= until - EXPIRES_SOON_SECONDS:
            found.append(f"{self._files.cert} expires on {_date(until)}")
        if self._key_mode & stat.S_IRWXO:
            found.append(f"every user of this host may use {self._files.key}, whose mode is {self._key_mode:04o}")
        return found

    def _report(self) -> None:
        for problem in self.problems():
            log.warning("certificate", problem=problem, hint="replace the files: the agent reads them again by itself")
        self._reported_at = time.time()

    async def watch(self) -> None:
        """Read changed files and report their problems once a day, until cancelled."""
        while True:
            self.current()
            if time.time() >= self._reported_at + _REPORT_AGAIN_SECONDS:
                self._report()
            await asyncio.sleep(_WATCH_SECONDS)

    # ------------------------------------------------------------ peers

    def check_peer(self, names: Sequence[str]) -> None:
        """Check the names in a peer's certificate, which an authority of ours has signed.  Raises RemoteProtocolError."""
        if not self._peers:
            return
        for name in names:
            if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in self._peers):
                return
        raise RemoteProtocolError(
            f"the certificate is for {', '.join(names) or 'nobody'}, which `peers` does not allow",
            code="tls-peer-refused",
            hint="add the name to peers in [tls] of the agent that refuses, if that host may migrate guests",
        )


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError as error:
        return (error.errno or 0,)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _date(seconds: float) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M} UTC"
