"""What both sides hold of one QEMU: its process, its monitor, and a userfaultfd made in it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from migrated.errors import GuestError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.qemu.qmp import Monitor
from migrated.waiting import in_thread

#: Under which names QEMU is handed a descriptor (getfd): its migration stream, and /dev/userfaultfd for a moment.
STATE_STREAM = "migrated-state"
_DEVICE = "migrated-userfaultfd"


class QemuProcess:
    """Empty until `connect`, or `adopt` in a restarted agent."""

    def __init__(self, guest: str, qmp: Path, *, command_seconds: float) -> None:
        self.uffd: injection.InjectedUffd | None = None
        self._guest = guest
        self._qmp = qmp
        self._command_seconds = command_seconds
        self._handle: PidHandle | None = None
        self._monitor: Monitor | None = None

    @property
    def handle(self) -> PidHandle:
        """The process; GuestError ``guest-not-open`` where there is none yet."""
        if self._handle is None:
            raise GuestError(f"guest {self._guest}: QEMU is not known yet", code="guest-not-open")
        return self._handle

    async def connect(self, child: PidHandle | None = None, *, greeting_seconds: float | None = None) -> Monitor:
        """The first session with whoever listens; its process is ``child``, unless that is a wrapper that forked."""
        self._monitor = await Monitor.connect(
            self._guest, self._qmp, command_seconds=self._command_seconds, greeting_seconds=greeting_seconds
        )
        pid = await in_thread(self._monitor.peer_pid)  # may look at every process of the host
        self._handle = child if child is not None and child.pid == pid else PidHandle.attach(pid)
        return self._monitor

    def adopt(self, process: PidHandle, uffd: injection.InjectedUffd | None = None) -> None:
        """Take over a process known from the journal, and a userfaultfd of it; asks it nothing."""
        self._handle = process
        self.uffd = uffd

    async def monitor(self) -> Monitor:
        """The session; a new one if the old one was lost and QEMU still runs.  GuestError ``guest-gone`` if it does not."""
        if self._monitor is not None and self._monitor.alive:
            return self._monitor
        if (end := self.handle.poll()) is not None:
            raise GuestError(f"guest {self._guest}: QEMU {end}", code="guest-gone")
        if self._monitor is not None:
            await self._monitor.close()
        self._monitor = await Monitor.connect(self._guest, self._qmp, command_seconds=self._command_seconds)
        return self._monitor

    async def open_uffd(self, monitor: Monitor, *, faults: bool) -> injection.InjectedUffd:
        """A userfaultfd of QEMU that reports ``faults``, or else tracks writes.  Raises as `injection.open_uffd`."""
        self.uffd = await injection.open_uffd(
            self.handle, faults=faults, tracking=not faults, send_descriptor=_send_descriptor(monitor)
        )
        return self.uffd

    async def close_uffd(self) -> None:
        """Close it here and in QEMU.  Idempotent; works on a dead QEMU."""
        uffd, self.uffd = self.uffd, None
        if uffd is not None:
            await injection.close_uffd(uffd)

    async def kill(self, limit_seconds: float) -> None:
        """End it, if there is one, and wait until it is gone."""
        if self._handle is not None:
            await self._handle.kill(limit_seconds)

    async def close(self) -> None:
        """Let go; QEMU keeps its end of the userfaultfd.  Idempotent."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()
        uffd, self.uffd = self.uffd, None
        if uffd is not None:
            os.close(uffd.fd)
        if self._handle is not None:
            self._handle.close()


def _send_descriptor(monitor: Monitor) -> injection.SendDescriptor:
    """How QEMU is given a descriptor and made to close it again."""

    async def give(fd: int) -> Callable[[], Awaitable[None]]:
        await monitor.give_fd(_DEVICE, fd)

        async def take_back() -> None:
            await monitor.execute("closefd", {"fdname": _DEVICE})

        return take_back

    return give
