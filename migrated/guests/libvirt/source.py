"""A running domain of libvirt's that is migrated away.

All that is asked of its QEMU goes through libvirt's monitor; the rest is as with any running QEMU (RunningQemu).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import structlog

from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests.access.injection import InjectedUffd
from migrated.guests.driver import Description as PlainDescription
from migrated.guests.driver import Memento, StateChannel
from migrated.guests.libvirt import confinement
from migrated.guests.libvirt.config import Description, LibvirtSourceConfig, pack_xml
from migrated.guests.libvirt.connection import Connection, insist
from migrated.guests.libvirt.monitor import LibvirtMonitor
from migrated.guests.qemu.process import ManagedQemu
from migrated.guests.qemu.source import RunningQemu
from migrated.memory.regions import SourceMemory
from migrated.options import DomainOptions
from migrated.privileged import open_inodes
from migrated.settings import Timeouts
from migrated.waiting import in_thread

log = structlog.get_logger("migrated.libvirt")

#: Devices whose state is not in what QEMU saves of its devices, or whose writes nobody sees, by path in the domain's XML.
_UNMOVABLE = {
    "devices/hostdev": "a host device",
    "devices/interface[@type='hostdev']": "a host network device",
    "devices/interface[@type='vhostuser']": "a vhost-user network device",
    "devices/interface[@type='vdpa']": "a vDPA network device",
    "devices/disk[@type='vhostuser']": "a vhost-user disk",
    "devices/disk[@type='vhostvdpa']": "a vDPA disk",
    "devices/disk/mirror": "a block job (mirror)",
    "devices/filesystem/driver[@type='virtiofs']": "a virtiofs file system",
    "devices/tpm/backend[@type='emulator']": "an emulated TPM, whose state is in another process",
    "devices/tpm/backend[@type='passthrough']": "a TPM of the host",
    "devices/video/driver[@name='vhostuser']": "a vhost-user video device",
    "devices/shmem": "memory shared with others",
    "launchSecurity": "encrypted memory",
}


def refuse_devices(guest: str, xml: str) -> None:
    """Raise GuestRefusedError ``unsupported-device`` if a running domain has a device that would not arrive whole."""
    domain = ET.fromstring(xml)  # noqa: S314 - libvirt's own
    found = [what for path, what in _UNMOVABLE.items() if domain.find(path) is not None]
    if found:
        raise GuestRefusedError(
            f"guest {guest} has {', '.join(found)}",
            code="unsupported-device",
            hint="detach it for the time of the migration (virsh detach-device)",
        )


class LibvirtQemu(ManagedQemu[LibvirtMonitor]):
    """The QEMU of a domain."""

    def __init__(self, guest: str, uri: str, domain: str, *, command_seconds: float) -> None:
        super().__init__(guest)
        self._uri = uri
        self._domain = domain
        self._command_seconds = command_seconds

    async def _session(self, greeting_seconds: float | None = None) -> LibvirtMonitor:
        del greeting_seconds
        limit = self._command_seconds
        connection = await Connection.connect(self._guest, self._uri, limit_seconds=limit)
        try:
            domain = await connection.domain(self._domain, limit_seconds=limit)
            if domain is None or not await connection.call(
                "asking for its state", domain.isActive, limit_seconds=limit
            ):
                raise GuestRefusedError(
                    f"guest {self._guest}: no domain {self._domain} runs here ({self._uri})",
                    code="guest-gone" if self._handle is not None else "no-domain",
                    hint="`virsh list` shows those that do",
                )
            monitor = LibvirtMonitor(connection, domain, lambda: self.handle, command_seconds=limit)
            await monitor.listen()
        except BaseException:
            await connection.close()
            raise
        return monitor

    async def open_uffd(self, *, faults: bool) -> InjectedUffd:
        """See ManagedQemu."""
        with confinement.named(self.handle.pid):
            return await super().open_uffd(faults=faults)

    async def _pid(self, monitor: LibvirtMonitor) -> int:
        """Libvirt does not tell it: QEMU is the process that gets a file from us through libvirt.

        An old libvirt passes no files.  Then it must be the only process of this host that was started for the domain.
        """
        uuid = await monitor.connection.call(
            "asking for its UUID", monitor.domain.UUIDString, limit_seconds=self._command_seconds
        )
        found = await in_thread(_started_for, str(uuid))
        if monitor.passes_files:
            fd = os.memfd_create("migrated-who-are-you", os.MFD_CLOEXEC)
            try:
                await monitor.add_fd(fd)
                found = await in_thread(_holders, fd, found)
            finally:
                os.close(fd)
            with contextlib.suppress(GuestError):  # one descriptor left over does no harm
                await monitor.remove_fds()
        if len(found) != 1:
            raise GuestRefusedError(
                f"guest {self._guest}: cannot tell which process of this host is its QEMU: {len(found)} could be",
                code="no-process",
                hint="the agent must run on the host of libvirt's QEMUs, as root, and see their processes",
            )
        return found[0]


def _started_for(uuid: str) -> list[int]:
    """The QEMUs of this host that were started for the domain with this UUID."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if (b"-uuid", uuid.encode()) in itertools.pairwise(words):
                    found.append(int(process.name))
    return found


def _holders(fd: int, pids: list[int]) -> list[int]:
    """Those of the processes that have our file open."""
    ours = os.fstat(fd)
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if (ours.st_dev, ours.st_ino) in open_inodes(pid, "/memfd:").values():
                found.append(pid)
    return found


class LibvirtSource(RunningQemu):
    """See `SourceGuest`."""

    def __init__(
        self, name: str, config: LibvirtSourceConfig, timeouts: Timeouts, requested: DomainOptions | None = None
    ) -> None:
        self._uri, self._domain = config.uri, config.domain or name
        asked = requested.requested() if requested is not None else {}
        super().__init__(
            name, LibvirtQemu(name, self._uri, self._domain, command_seconds=timeouts.guest_command), timeouts
        )
        self._undefine = bool(asked.get("undefine_source", config.undefine_source))
        self._persistent = asked.get("persistent", "")  # on the target
        self._described: Description | None = None
        self._autostart = False  # whether libvirt starts the domain by itself, as its owner wants it

    async def open(self) -> SourceMemory:
        memory = await super().open()
        plain = super().describe()
        self._described = Description(
            machine=plain["machine"],
            version=tuple(plain["version"]),
            backends=tuple(plain["backends"]),
            ids=tuple(block.id for block in self.blocks),
            used_bytes=tuple(block.used_bytes for block in self.blocks),
            persistent=self._persistent,
            **await self._domain_description(),
        )
        self._autostart = self._described.autostart
        return memory

    async def pause(self, channel: StateChannel) -> None:
        if self._autostart:  # after COMMIT a reboot of this host must not start it here
            await self._set_autostart(on=False)
        await super().pause(channel)

    async def resume(self) -> None:
        limit = self._timeouts.release
        await insist(super().resume, limit_seconds=limit)
        if self._autostart:
            try:
                await insist(functools.partial(self._set_autostart, on=True), limit_seconds=limit)
            except GuestError as error:
                log.error("autostart is off", guest=self.name, error=str(error))  # noqa: TRY400 - expected: no traceback

    async def _set_autostart(self, *, on: bool) -> None:
        monitor: LibvirtMonitor = await self.qemu.monitor()
        await self._ask(monitor, f"turning autostart {'on' if on else 'off'}", monitor.domain.setAutostart, int(on))

    def memento(self) -> Memento:
        return {**super().memento(), "autostart": self._autostart, "undefine": self._undefine}

    async def reclaim(self, memento: Memento) -> None:
        self._autostart = bool(memento.get("autostart", False))
        await super().reclaim(memento)

    async def _reopen(self) -> None:
        await insist(super()._reopen, limit_seconds=self._timeouts.release)

    async def adopt(self, pid: int, memento: Memento) -> None:
        self._undefine = bool(memento.get("undefine", self._undefine))
        await super().adopt(pid, memento)

    async def _refuse_unmovable(self, monitor: Any) -> None:
        await self._refuse_devices(monitor)
        await super()._refuse_unmovable(monitor)

    async def _refuse_devices(self, monitor: LibvirtMonitor) -> None:
        refuse_devices(self.name, await self._ask(monitor, "reading its XML", monitor.domain.XMLDesc, 0))

    async def _domain_description(self) -> dict[str, Any]:
        monitor: LibvirtMonitor = await self.qemu.monitor()
        libvirt, domain = monitor.connection.libvirt, monitor.domain
        flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
        xml = await self._ask(monitor, "reading its XML", domain.XMLDesc, flags)
        persistent = await self._ask(monitor, "asking whether it is persistent", domain.isPersistent)
        definition, autostart = "", False
        if persistent:
            flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE
            definition = await self._ask(monitor, "reading its definition", domain.XMLDesc, flags)
            autostart = bool(await self._ask(monitor, "asking whether it starts by itself", domain.autostart))
        return {
            "xml": pack_xml(self.name, xml),
            "definition": pack_xml(self.name, definition),
            "autostart": autostart,
        }

    async def _ask(self, monitor: LibvirtMonitor, what: str, function: Any, *arguments: Any) -> Any:
        limit = self._timeouts.guest_command
        return await monitor.connection.call(what, function, *arguments, limit_seconds=limit)

    def describe(self) -> PlainDescription:
        if self._described is None:
            raise GuestError(f"guest {self.name} is not open", code="guest-not-open")
        return self._described.encode()

    async def release(self) -> None:
        process = self.qemu.handle
        if process.poll() is None:
            try:
                await insist(self._give_up, limit_seconds=self._timeouts.release)
                await process.wait(self._timeouts.release)
            except (MigratedError, TimeoutExceededError) as error:
                log.warning("libvirt did not end the domain; its QEMU is ended", guest=self.name, error=str(error))
                # The guest runs elsewhere: what is left here must not.
                await process.kill(self._timeouts.release)

    async def _give_up(self) -> None:
        """Have libvirt end the domain; it must not start again by itself, and is not kept if so requested."""
        limit = self._timeouts.guest_command
        connection = await Connection.connect(self.name, self._uri, limit_seconds=limit)
        try:
            domain = await connection.domain(self._domain, limit_seconds=limit)
            if domain is not None:
                await connection.call(
                    "ending the domain", self._end, connection.libvirt, domain, limit_seconds=self._timeouts.release
                )
        finally:
            await connection.close()

    def _end(self, libvirt: Any, domain: Any) -> None:
        """Blocks.  May be done again, wherever the first time was interrupted: the QEMU, which tells that, ends last."""
        if domain.isPersistent():
            domain.setAutostart(0)
            if self._undefine:  # of a domain that still runs: destroying it takes the rest away
                flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                flags |= libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
                domain.undefineFlags(flags)
        if self.qemu.handle.poll() is None and _is_active(libvirt, domain):
            try:
                domain.destroy()
            except libvirt.libvirtError:  # a libvirtd that finds its domains again may end this one before us
                if _is_active(libvirt, domain):
                    raise


def _is_active(libvirt: Any, domain: Any) -> bool:
    """Whether libvirt runs it.  One that is not defined is forgotten when it ends."""
    try:
        return bool(domain.isActive())
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return False
