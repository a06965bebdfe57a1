"""QEMU's monitor, as libvirt shares it: libvirt sends our commands over its own connection and hears of all that follows.

Stopping and running go through libvirt's own calls, so that its locks, its records and its events are right.

Since 8.2 libvirt passes descriptors on to QEMU.  With an older one QEMU gets them by injection, and opens them by their names
in /proc: memfds, which the kernel lets every user open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from migrated.errors import GuestError, GuestRefusedError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.libvirt.connection import Connection
from migrated.guests.qemu.qmp import FDS_OF_OURS, MonitorCommands
from migrated.waiting import in_thread

#: virDomainQemuMonitorCommandWithFiles, as virConnectGetLibVersion counts.
_PASSES_FILES_SINCE = 8_002_000
_SYS_CLOSE = 3


class LibvirtMonitor(MonitorCommands):
    """A session with one domain.  Owns its connection.  ``process``: QEMU, once it is known."""

    def __init__(
        self, connection: Connection, domain: Any, process: Callable[[], PidHandle], *, command_seconds: float
    ) -> None:
        self.guest = connection.guest
        self.connection = connection
        self.domain = domain
        self.passes_files = False  # until `listen` has asked
        self._process = process
        self._injected: list[int] = []  # descriptors of ours in QEMU
        self._command_seconds = command_seconds
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._callback: int | None = None

    async def listen(self) -> None:
        """Hear of the domain's life from here on, and learn what this libvirt can do."""
        libvirt = self.connection.libvirt
        names = {libvirt.VIR_DOMAIN_EVENT_RESUMED: "RESUME", libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "STOP"}

        def tell(connection: Any, domain: Any, event: int, detail: int, opaque: Any) -> None:
            del connection, domain, detail, opaque
            if event in names:
                with self._lock:
                    self._seen.add(names[event])
                self._loop.call_soon_threadsafe(self._arrived.set)

        register = self.connection.handle.domainEventRegisterAny
        self._callback = await self.connection.call(
            "listening to the domain's events",
            register,
            *(self.domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, tell, None),
            limit_seconds=self._command_seconds,
        )

        self.passes_files = (
            hasattr(self.connection.qemu, "qemuMonitorCommandWithFiles")
            and await self._call("asking for its version", self.connection.handle.getLibVersion) >= _PASSES_FILES_SINCE
        )

    @property
    def alive(self) -> bool:
        return self.connection.alive

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, limit: float | None = None
    ) -> Any:
        if command == "stop":
            return await self._call("suspending the domain", self.domain.suspend, limit=limit)
        if command == "cont":
            return await self._call("resuming the domain", self.domain.resume, limit=limit)
        text = json.dumps({"execute": command, "arguments": arguments or {}})
        answer = await self._call(
            f"QEMU's {command}", self.connection.qemu.qemuMonitorCommand, self.domain, text, 0, limit=limit
        )
        return self._result(command, answer)

    async def _call(self, what: str, function: Any, *arguments: Any, limit: float | None = None) -> Any:
        limit = self._command_seconds if limit is None else limit
        return await self.connection.call(what, function, *arguments, limit_seconds=limit)

    def _result(self, command: str, answer: str) -> Any:
        reply = json.loads(answer)
        if "error" in reply:
            said = reply["error"].get("desc", reply["error"])
            raise GuestError(f"guest {self.guest}: QEMU refused {command}: {said}", code="qmp-failed")
        return reply["return"]

    async def add_fd(self, fd: int) -> int:
        text = json.dumps({"execute": "add-fd", "arguments": {"opaque": FDS_OF_OURS}})
        send = self.connection.qemu.qemuMonitorCommandWithFiles
        answer, files = await self._call("QEMU's add-fd", send, self.domain, text, [fd], 0)
        for file in files:
            os.close(file if isinstance(file, int) else file.fileno())
        return int(self._result("add-fd", answer)["fdset-id"])

    async def share(self, fd: int) -> str:
        if self.passes_files:
            return await super().share(fd)
        (number,) = await in_thread(injection.give_fds, self._process(), [fd])
        self._injected.append(number)
        return f"/proc/self/fd/{number}"

    async def remove_fds(self) -> None:
        while self._injected:
            with contextlib.suppress(GuestRefusedError):  # of a QEMU that has ended
                await in_thread(injection.remote_syscall, self._process(), _SYS_CLOSE, self._injected.pop())
        if self.passes_files:
            await super().remove_fds()

    async def event(self, seconds: float) -> None:
        self._arrived.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._arrived.wait()

    def saw(self, name: str) -> bool:
        with self._lock:
            seen, self._seen = self._seen, set()
        return name in seen

    def forget_events(self) -> None:
        with self._lock:
            self._seen.clear()

    async def close(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None and self.connection.alive:
            with contextlib.suppress(GuestError):  # a connection is closed when nothing refers to it any more
                await self._call("closing", self.connection.handle.domainEventDeregisterAny, callback)
        await self.connection.close()
