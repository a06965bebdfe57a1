"""A simulated host: its disk, its descriptor store, its processes, and the part of ``os`` that the code under test uses."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from pathlib import PurePosixPath
from typing import Any, Self

from migrated.errors import GuestError, HostError
from tests.simulation.loop import KilledError, current


class Host:
    """A host.  It outlives the agents that are started on it."""

    def __init__(self, world: Any, name: str, role: str) -> None:
        self.world = world
        self.name = name
        self.role = role
        self.disk: dict[str, bytes] = {}
        self.kept: dict[str, list[Any]] = {}
        self.processes: dict[int, Any] = {}
        self.life: Any = None
        self.agent: Any = None
        self.stop: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None
        self.disk_error = 0
        self.disk_error_until = 0.0
        self.no_descriptors_until = 0.0
        self.store_fails_until = 0.0
        self.commands_fail_until = 0.0
        self.commands_hang_until = 0.0
        self.failing_command = ""
        self.burned = False
        self.versions = world.versions  # of what is installed here
        self.versions_until = 0.0

    def __repr__(self) -> str:
        return self.name

    def out_of_descriptors(self) -> bool:
        return bool(self.world.loop.now < self.no_descriptors_until)

    def heal(self) -> None:
        """End all faults of this host."""
        self.disk_error_until = self.no_descriptors_until = self.store_fails_until = 0.0
        self.commands_fail_until = self.commands_hang_until = self.versions_until = 0.0

    def disk_operation(self, what: str) -> None:
        """Begin a system call on a file.  It may fail here, or kill the agent."""
        life = current()
        self.world.note(f"{self.name} disk {what}")
        if life.doomed and self.world.loop.in_thread:
            raise KilledError
        full = self.disk_error == errno.ENOSPC and what not in {"open", "write", "fsync"}
        if self.world.loop.now < self.disk_error_until and not full:
            raise OSError(self.disk_error, os.strerror(self.disk_error))
        if what in {"open", "read"} and self.out_of_descriptors():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def command(self, what: str) -> None:
        """Simulate a request to a guest.  It takes a moment, and may fail or be answered too late."""
        self.world.note(f"{self.name} guest {what}")
        await asyncio.sleep(self.world.command_seconds())
        chosen = self.failing_command in {"", what}
        fails = chosen and self.world.loop.now < self.commands_fail_until
        hangs = chosen and self.world.loop.now < self.commands_hang_until
        if (fails or hangs) and what == "release":
            self.world.release_failed = True
        if hangs:
            await asyncio.sleep(self.world.timeouts.guest_command)
            raise GuestError(f"{what} was not answered", code="guest-timeout")
        if fails:
            raise GuestError(f"{what} was refused", code="guest-failed")


class SimPath:
    """A path on a host's disk, with the part of ``Path`` that the code under test uses."""

    def __init__(self, host: Host, path: str) -> None:
        self.host = host
        self.path = path

    def __truediv__(self, name: str) -> SimPath:
        return SimPath(self.host, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path

    def __lt__(self, other: SimPath) -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def with_suffix(self, suffix: str) -> SimPath:
        return SimPath(self.host, str(PurePosixPath(self.path).with_suffix(suffix)))

    def mkdir(self, **_: Any) -> None: ...

    def glob(self, pattern: str) -> list[SimPath]:
        prefix, suffix = f"{self.path}/", pattern.removeprefix("*")
        return [
            SimPath(self.host, known) for known in self.host.disk if known.startswith(prefix) and known.endswith(suffix)
        ]

    def exists(self) -> bool:
        return self.path in self.host.disk

    def read_bytes(self) -> bytes:
        self.host.disk_operation("read")
        if self.path not in self.host.disk:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        return self.host.disk[self.path]

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def replace(self, target: SimPath) -> None:
        self.host.disk_operation("rename")
        self.host.disk[target.path] = self.host.disk.pop(self.path)

    def unlink(self, *, missing_ok: bool = False) -> None:
        del missing_ok
        self.host.disk_operation("unlink")
        self.host.disk.pop(self.path, None)


class _File:
    def __init__(self, path: SimPath) -> None:
        self.path = path


class _Stream:
    """The result of ``os.fdopen``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        current().close(self._fd)

    def write(self, data: bytes) -> None:
        OS.write(self._fd, data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            OS.write(self._fd, line)


class OsModule:
    """Replaces the ``os`` module for the process that is executing."""

    def open(self, path: SimPath, flags: int, mode: int = 0) -> int:
        del mode
        path.host.disk_operation("open")
        if not flags & os.O_DIRECTORY:
            if flags & os.O_TRUNC:
                path.host.disk[path.path] = b""
            path.host.disk.setdefault(path.path, b"")
        return current().open(_File(path))

    def write(self, fd: int, data: bytes) -> int:
        path = current().fds[fd].path
        path.host.disk_operation("write")
        path.host.disk[path.path] += data
        return len(data)

    def fsync(self, fd: int) -> None:
        current().fds[fd].path.host.disk_operation("fsync")

    def fdopen(self, fd: int, mode: str) -> _Stream:
        del mode
        return _Stream(fd)

    def close(self, fd: int) -> None:
        current().close(fd)

    def fstat(self, fd: int) -> Any:
        return current().fds[fd]

    def memfd_create(self, name: str, flags: int) -> int:
        del name, flags
        return current().open(current().host.world.new_ledger())

    def ftruncate(self, fd: int, size: int) -> None:
        del fd, size

    def urandom(self, count: int) -> bytes:
        return bytes(current().host.world.randbytes(count))

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


OS = OsModule()


class SimStore:
    """Model of the service manager's descriptor store."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def _ask(self, what: str) -> None:
        self._host.world.note(f"{self._host.name} store {what}")
        await asyncio.sleep(self._host.world.command_seconds())
        if self._host.world.loop.now < self._host.store_fails_until:
            raise HostError("the descriptor store does not answer", code="holder")

    async def taken(self) -> dict[str, list[int]]:
        life = current()
        return {name: [life.install(thing) for thing in things] for name, things in self._host.kept.items()}

    async def keep(self, name: str, fds: Any) -> None:
        life = current()
        things = [life.fds[fd] for fd in fds]
        await self._ask("keep")
        self._host.kept[name] = things

    async def forget(self, name: str) -> None:
        try:
            await self._ask("forget")
        except HostError:
            return
        self._host.kept.pop(name, None)
