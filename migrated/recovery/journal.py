"""The journal records each migration on disk, so that the next agent can recover it after a crash.

It is one small file per migration in the state directory.  The agent replaces it as a whole (write, fsync, rename)
before each step that the next agent must know of: the target before it sends Loaded and when it obeys COMMIT, the
source before it touches the guest and before it sends COMMIT.  An entry is trusted only if its checksum matches, it is
from this boot, and the process it names exists.  A damaged file is reported and set aside as ``NAME.refused``.  An
agent that cannot read a file, or does not know its version, does not start: the file may be all that can save a guest.

The files contain the session's token: they have mode 0600, in a directory of mode 0700.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import structlog

from migrated.errors import ConfigError, HostError
from migrated.protocol.messages import Hello
from migrated.protocol.transitions import TAKEN_UP, Position, Role

log = structlog.get_logger("migrated.recovery.journal")

VERSION = 2
SUFFIX = ".journal"
SCRATCH = ".new"
REFUSED = ".refused"
CLOSED = ".done"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MOUNTS = Path("/proc/self/mountinfo")


class TargetEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An incoming migration.

    ``stage``: ``setup`` (nothing to save: end what was started), ``loaded`` (only the source knows whether it
    committed), ``committed`` (the guest is ours), ``running`` (and was resumed here).
    """

    hello: Hello
    stage: str
    peer: str
    page_bytes: tuple[int, ...] = ()
    guest: dict[str, int | str | bool] = msgspec.field(default_factory=dict)  # the driver's memento
    pid: int = 0  # 0 in ``setup``: a process may exist, and uses the memory of `memory_inodes`
    pid_started: int = 0  # start time in clock ticks since boot: tells the process from a later one
    memory_inodes: tuple[int, ...] = ()
    started_at: float = 0.0

    @property
    def position(self) -> Position:
        """Where the migration stands for an agent that takes it up."""
        return Position(TAKEN_UP[Role.TARGET][self.stage])


class SourceEntry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An outgoing migration.

    ``stage``: ``active`` (COMMIT was never sent), ``committed`` (it may have been), ``released`` (the target needs nothing
    more: end what is left of the guest here).
    """

    hello: Hello
    stage: str
    target: str  # HOST:PORT
    page_bytes: tuple[int, ...] = ()  # the target's
    region_page_bytes: tuple[int, ...] = ()  # ours
    file_offsets: tuple[int, ...] = ()
    private: tuple[bool, ...] = ()  # as in `SourceMemory`
    file_behind: tuple[bool, ...] = ()
    guest: dict[str, int | str | bool] = msgspec.field(default_factory=dict)
    pid: int = 0
    pid_started: int = 0
    started_at: float = 0.0
    max_bandwidth: int = 0
    drain_bandwidth: int = 0
    compression: str = "off"
    superseded: bool = False  # a later migration has the guest: this one must never run it
    traceparent: str = ""  # the trace of who started it

    @property
    def position(self) -> Position:
        """Where the migration stands for an agent that takes it up."""
        return Position(TAKEN_UP[Role.SOURCE][self.stage])


E = TypeVar("E", bound=msgspec.Struct)


class JournalError(HostError):
    """An entry could not be written durably.  ``replaced``: the next agent of this boot would still find it."""

    default_code = "journal"

    def __init__(self, message: str, *, replaced: bool, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.replaced = replaced


class _FormerBootError(ValueError):
    """The entry is from before the last boot."""


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    version: int
    boot_id: str
    entry: msgspec.Raw


class Journal(Generic[E]):
    """The journal entries of one agent."""

    def __init__(self, directory: Path, kind: type[E]) -> None:
        self.directory = directory
        self._kind: type[E] = kind

    @functools.cached_property
    def in_memory(self) -> bool:
        """Whether the directory is on a tmpfs, as /run is: no write there waits for a device."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return _on_tmpfs(self.directory)
        except OSError:
            return False

    def _path(self, migration_id: str) -> Path:
        return self.directory / f"{migration_id}{SUFFIX}"

    def write(self, migration_id: str, entry: E) -> None:
        """Write the entry and fsync it.  Raises HostError; the step that the entry protects must then not be taken."""
        path = self._path(migration_id)
        file = _File(version=VERSION, boot_id=_boot_id(), entry=msgspec.Raw(msgspec.json.encode(entry)))
        body = msgspec.json.encode(file)
        data = hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"
        scratch = path.with_suffix(SCRATCH)
        replaced = False
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                written = 0
                while written < len(data):
                    written += os.write(fd, data[written:])
                os.fsync(fd)
            finally:
                os.close(fd)
            scratch.replace(path)
            replaced = True
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise JournalError(
                f"the journal {path} cannot be written: {error.strerror}",
                replaced=replaced,
                hint="free some space in agent.state_dir; without the journal a crash of the agent cannot be recovered",
            ) from error

    def remove(self, migration_id: str) -> None:
        """Remove the entry of a finished migration.  Raises OSError."""
        path = self._path(migration_id)
        path.unlink(missing_ok=True)
        path.with_suffix(CLOSED).unlink(missing_ok=True)

    def close(self, migration_id: str) -> None:
        """Close an entry: nothing is left to recover, but it still answers a source that asks late.  Raises OSError."""
        path = self._path(migration_id)
        path.replace(path.with_suffix(CLOSED))

    def closed(self, migration_id: str) -> E | None:
        """Return the entry that `close` kept, if any."""
        return self._find(self._path(migration_id).with_suffix(CLOSED))

    def load(self) -> dict[str, E]:
        """Return every valid entry by migration id; report damaged files and set them aside.

        Raises HostError if a file cannot be read, ConfigError if another version wrote it: both can be corrected.
        """
        found: dict[str, E] = {}
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            try:
                found[path.name.removesuffix(SUFFIX)] = self._read_surely(path)
            except FileNotFoundError:
                continue  # removed meanwhile
            except ValueError as error:
                log.error("invalid journal set aside", path=str(path), problem=str(error))  # noqa: TRY400 - expected: no traceback
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(REFUSED))
        return found

    def find(self, migration_id: str) -> E | None:
        """Return one entry, if it exists and is valid."""
        return self._find(self._path(migration_id))

    def _find(self, path: Path) -> E | None:
        with contextlib.suppress(OSError, ValueError, ConfigError):
            return self._read(path)
        return None

    def refused(self) -> set[str]:
        """Return the ids of migrations whose entry was set aside, now or by a previous agent."""
        return {path.name.removesuffix(REFUSED) for path in self.directory.glob(f"*{REFUSED}")}

    def remove_leftovers(self) -> None:
        """Remove half-written files of an agent that died, and closed entries from before the last boot.

        Raises as `load` does: a file that cannot be read now, or by this version, may be all that can tell a source
        that its guest runs here.
        """
        for path in self.directory.glob(f"*{SCRATCH}"):
            with contextlib.suppress(OSError):
                path.unlink()
        for path in self.directory.glob(f"*{CLOSED}"):
            try:
                self._read_surely(path)
            except (FileNotFoundError, ValueError):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _read_surely(self, path: Path) -> E:
        """Read a file, with HostError for failures that the operator can correct."""
        try:
            return self._read(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise HostError(
                f"the journal {path} cannot be read: {error.strerror}",
                code="journal",
                hint="a guest may depend on what it says; fix this and start the agent again",
            ) from error

    def _read(self, path: Path) -> E:
        digest, _, body = path.read_bytes().partition(b"\n")
        body = body.removesuffix(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match: it is corrupt")
        try:
            file = msgspec.json.decode(body, type=_File)
            if file.boot_id != _boot_id():  # the file's own fields are the same in every version
                raise _FormerBootError("it is from before the last boot: its process and memory are gone")
            if file.version != VERSION:
                raise ValueError(f"it is of version {file.version}, this agent reads {VERSION}")
            entry: E = msgspec.json.decode(file.entry, type=self._kind)
        except _FormerBootError:
            raise
        except ValueError as error:  # the checksum matches, so another version wrote it this way
            raise ConfigError(
                f"the journal {path} was written by another version of migrated: {error}",
                code="journal-version",
                hint="start the version that wrote it until its migration is over; a guest may depend on it",
            ) from error
        return entry


def _on_tmpfs(directory: Path) -> bool:
    device = directory.stat().st_dev
    for line in MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.startswith("tmpfs ")
    return False


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()
