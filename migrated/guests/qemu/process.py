"""Hold what both sides have of one QEMU: its process, its monitor, and a userfaultfd made in it.

`ManagedQemu` works whoever carries the monitor commands; `QemuProcess` is a QEMU with a QMP socket for us.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

from migrated.errors import GuestError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.qemu.qmp import Monitor, MonitorCommands
from migrated.waiting import in_thread

#: The names under which QEMU is given a descriptor (getfd): its migration stream, and briefly /dev/userfaultfd.
STATE_STREAM = "migrated-state"
_DEVICE = "migrated-userfaultfd"

M = TypeVar("M", bound=MonitorCommands)


class ManagedQemu(abc.ABC, Generic[M]):
    """A QEMU, whoever carries the commands to it.  Empty until `connect`, or until `adopt` in a restarted agent."""

    def __init__(self, guest: str) -> None:
        self.uffd: injection.InjectedUffd | None = None
        self._guest = guest
        self._handle: PidHandle | None = None
        self._monitor: M | None = None

    @abc.abstractmethod
    async def _session(self, greeting_seconds: float | None = None) -> M:
        """Open a session with QEMU's monitor."""

    @abc.abstractmethod
    async def _pid(self, monitor: M) -> int:
        """Return the process behind the monitor."""

    @property
    def handle(self) -> PidHandle:
        """Return the process.  Raises GuestError ``guest-not-open`` if there is none yet."""
        if self._handle is None:
            raise GuestError(f"guest {self._guest}: QEMU is not known yet", code="guest-not-open")
        return self._handle

    async def connect(self, child: PidHandle | None = None, *, greeting_seconds: float | None = None) -> M:
        """Open the first session.  Its process is ``child``, unless ``child`` is a wrapper that forked QEMU."""
        self._monitor = await self._session(greeting_seconds)
        pid = await self._pid(self._monitor)
        self._handle = child if child is not None and child.pid == pid else PidHandle.attach(pid)
        return self._monitor

    def adopt(self, process: PidHandle, uffd: injection.InjectedUffd | None = None) -> None:
        """Take over a process known from the journal, and a userfaultfd of it, without asking QEMU anything."""
        self._handle = process
        self.uffd = uffd

    async def monitor(self) -> M:
        """Return the session, or a new one if it was lost.  Raises GuestError ``guest-gone`` if QEMU has exited."""
        if self._monitor is not None and self._monitor.alive:
            return self._monitor
        if (end := self.handle.poll()) is not None:
            raise GuestError(f"guest {self._guest}: QEMU {end}", code="guest-gone")
        if self._monitor is not None:
            await self._monitor.close()
        self._monitor = await self._session()
        return self._monitor

    def _send_descriptor(self) -> injection.SendDescriptor:
        """Return how to give QEMU a descriptor and make it close it again."""
        return injection.by_injection(self.handle)

    async def open_uffd(self, *, faults: bool) -> injection.InjectedUffd:
        """Make a userfaultfd in QEMU that reports ``faults``, or tracks writes.  Raises as `injection.open_uffd`."""
        self.uffd = await injection.open_uffd(
            self.handle, faults=faults, tracking=not faults, send_descriptor=self._send_descriptor()
        )
        return self.uffd

    async def close_uffd(self) -> None:
        """Close the userfaultfd here and in QEMU.  Idempotent; works on a dead QEMU."""
        uffd, self.uffd = self.uffd, None
        if uffd is not None:
            await injection.close_uffd(uffd)

    async def kill(self, limit_seconds: float) -> None:
        """Kill QEMU, if there is one, and wait until it has exited."""
        if self._handle is not None:
            await self._handle.kill(limit_seconds)

    async def close(self) -> None:
        """Close our ends; QEMU keeps its end of the userfaultfd.  Idempotent."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()
        uffd, self.uffd = self.uffd, None
        if uffd is not None:
            os.close(uffd.fd)
        if self._handle is not None:
            self._handle.close()


class QemuProcess(ManagedQemu[Monitor]):
    """A QEMU that is reached by its QMP socket."""

    def __init__(self, guest: str, qmp: Path, *, command_seconds: float) -> None:
        super().__init__(guest)
        self._qmp = qmp
        self._command_seconds = command_seconds

    async def _session(self, greeting_seconds: float | None = None) -> Monitor:
        return await Monitor.connect(
            self._guest, self._qmp, command_seconds=self._command_seconds, greeting_seconds=greeting_seconds
        )

    async def _pid(self, monitor: Monitor) -> int:
        return await in_thread(monitor.peer_pid)  # may look at every process of the host

    def _send_descriptor(self) -> injection.SendDescriptor:
        async def give(fd: int) -> Callable[[], Awaitable[None]]:
            monitor = await self.monitor()
            await monitor.give_fd(_DEVICE, fd)

            async def take_back() -> None:
                await monitor.execute("closefd", {"fdname": _DEVICE})

            return take_back

        return give
