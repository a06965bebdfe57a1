"""A domain that libvirt restores here from an image that never ends until the guest's state has come.

    libvirt reads the image's head and starts QEMU, which reads its migration stream from us
    → its RAM blocks are found (landmarks.py), our memory is mapped over them, their faults are ours
    → pre-copy; meanwhile libvirt waits in its call, and QEMU for more of its stream
    → the devices' state is written, QEMU loads it, libvirt's call returns: the domain is paused
    → after COMMIT libvirt resumes it

libvirt knows the domain all the time, and shows it as paused until it runs.  A migration that is given up ends QEMU; libvirt's
call fails, and it forgets the domain.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import xml.etree.ElementTree as ET
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import structlog

from migrated.errors import GuestError, GuestRefusedError, MigratedError, RemoteProtocolError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.driver import (
    Description as PlainDescription,
)
from migrated.guests.driver import (
    FaultSource,
    Memento,
    StateChannel,
    TargetGuest,
)
from migrated.guests.libvirt import confinement
from migrated.guests.libvirt.config import Description, LibvirtTargetConfig, unpack_xml
from migrated.guests.libvirt.connection import Connection, begin, insist
from migrated.guests.libvirt.domain_xml import Domain, incoming
from migrated.guests.libvirt.landmarks import Landmarks
from migrated.guests.libvirt.save_image import SaveImage, abandon_left_over
from migrated.guests.libvirt.source import LibvirtQemu
from migrated.guests.libvirt.xml_hook import XmlHook
from migrated.guests.qemu import incoming as qemu_incoming
from migrated.guests.qemu.memory import Block
from migrated.guests.qemu.state import HeaderDecoder, ram_section, stream_begin
from migrated.memory.regions import Region, TargetMemory
from migrated.settings import Timeouts
from migrated.waiting import drop, in_thread

T = TypeVar("T")

log = structlog.get_logger("migrated.libvirt")

_POLL_SECONDS = 0.03


class LibvirtTarget(TargetGuest):
    """See `TargetGuest`."""

    def __init__(self, name: str, config: LibvirtTargetConfig, run_dir: Path, timeouts: Timeouts) -> None:
        self.name = name
        self._config = config
        self._timeouts = timeouts
        self._image_path = run_dir / f"{name}.image"
        self._image: SaveImage | None = None
        self._connection: Connection | None = None
        self._domain: Domain | None = None  # as the source has it
        self._changed: str | None = None  # its XML with what the configuration changes for this host
        self._description: Description | None = None
        self._restoring: asyncio.Future[Any] | None = None
        self._uuid = ""
        self._definition = ""  # XML to define here when it has arrived; empty: it stays transient
        self._autostart = False
        self.qemu = LibvirtQemu(name, config.uri, name, command_seconds=timeouts.guest_command)
        self.runs = True  # whether it is to run on arrival; told by the source's driver with the state

    # ------------------------------------------------------------ before the start

    async def check(self, regions: tuple[Region, ...], description: PlainDescription) -> None:
        theirs = self._description = Description.decode(description)
        if not len(theirs.ids) == len(theirs.used_bytes) == len(regions):
            raise RemoteProtocolError("the description of the libvirt guest does not fit its regions")
        domain = self._domain = incoming(unpack_xml(theirs.xml))
        if domain.name != (self._config.domain or self.name):
            raise GuestRefusedError(
                f"guest {self.name} is domain {domain.name} on the source, which the target does not let in by that name",
                code="domain-differs",
                hint=f'say domain = "{domain.name}" in [guests.{self.name}] of the target',
            )
        self._uuid = domain.uuid
        limit = self._timeouts.guest_command
        connection = await self._connected()
        same = await connection.domain_by_uuid(domain.uuid, limit_seconds=limit)
        named = await connection.domain(domain.name, limit_seconds=limit)
        for found, what in ((same, f"with UUID {domain.uuid}"), (named, domain.name)):
            if found is not None and await self._ask("asking for a domain's state", found.isActive):
                raise GuestRefusedError(
                    f"guest {self.name}: a domain {what} runs on the target already",
                    code="guest-exists",
                    hint="end it there first (virsh destroy)",
                )
        if named is not None and same is None:
            raise GuestRefusedError(
                f"guest {self.name}: the target has another domain {domain.name}, with another UUID",
                code="guest-exists",
                hint="undefine or rename it there first (virsh undefine, virsh domrename)",
            )
        await self._change_xml(theirs)

    async def _change_xml(self, theirs: Description) -> None:
        """Make the XML that libvirt restores and the one that it defines later."""
        changed = await self._change(unpack_xml(theirs.xml), "domain")
        self._changed = incoming(changed).xml
        persistent = theirs.persistent or self._config.persistent
        definition = unpack_xml(theirs.definition)
        if definition and persistent != "no":
            self._definition = await self._change(definition, "definition")
        elif persistent == "yes":
            self._definition = changed
        self._autostart = theirs.autostart and bool(self._definition)

    async def _change(self, text: str, kind: str) -> str:
        """The XML as this host is to have it."""
        config = self._config
        try:
            text, replaced = config.replace.apply(text)
        except ET.ParseError as error:
            raise RemoteProtocolError(f"the XML of the domain's {kind} is malformed: {error}") from error
        if replaced:
            log.info("replaced in the domain's XML", guest=self.name, kind=kind, replaced=replaced)
        if not config.xml_hook:
            return text
        limit = self._timeouts.guest_command
        return await XmlHook(self.name, config.xml_hook, config.xml_hook_user, limit_seconds=limit).change(text, kind)

    async def _connected(self) -> Connection:
        if self._connection is None or not self._connection.alive:
            if self._connection is not None:
                await self._connection.close()
            self._connection = await Connection.connect(
                self.name, self._config.uri, limit_seconds=self._timeouts.guest_command
            )
        return self._connection

    async def _ask(self, what: str, function: Any, *arguments: Any) -> Any:
        connection = await self._connected()
        return await connection.call(what, function, *arguments, limit_seconds=self._timeouts.guest_command)

    # ------------------------------------------------------------ start

    async def start(self, memory: tuple[TargetMemory, ...]) -> FaultSource:
        try:
            async with asyncio.timeout(self._timeouts.guest_start):
                return await self._start(memory)
        except TimeoutError as error:
            raise GuestError(
                f"guest {self.name}: libvirt had not started it within {self._timeouts.guest_start:g} s",
                code="guest-start",
                hint="the limit is timeouts.guest_start; see libvirt's log of the domain",
            ) from error

    async def _start(self, memory: tuple[TargetMemory, ...]) -> FaultSource:
        theirs, domain = self._description, self._domain
        if theirs is None or domain is None:
            raise GuestError(f"guest {self.name} was not checked", code="guest-not-open")
        connection = await self._connected()
        image = self._image = await in_thread(SaveImage.create, self._image_path, domain.xml)
        paused = connection.libvirt.VIR_DOMAIN_SAVE_PAUSED
        # libvirt compares our XML with the source's, and refuses one whose guest would see other hardware.
        changed = self._changed if self._changed != domain.xml else None
        self._restoring = begin(functools.partial(connection.handle.restoreFlags, str(image.path), changed, paused))
        process = await self._unless_failed(self._started(image))
        self.qemu.adopt(process)
        blocks = [
            Block(ident, item.region.page_bytes, used, item.region.size_bytes, None, rom=False)
            for ident, used, item in zip(theirs.ids, theirs.used_bytes, memory, strict=True)
        ]
        landmarks = Landmarks(self.name, blocks)
        used = {block.id: block.used_bytes for block in blocks}
        await self._unless_failed(image.write(stream_begin(theirs.machine) + ram_section(used) + landmarks.stream()))
        located = await self._unless_failed(landmarks.find(process.pid, limit_seconds=self._timeouts.guest_start))
        with confinement.named(process.pid):
            numbers = await in_thread(injection.give_fds, process, [item.memory_fd for item in memory])
            for block, item, number in zip(blocks, memory, numbers, strict=True):
                address = located[block.id].address
                await in_thread(injection.map_over, process, address, item.region.size_bytes, number)
        return await qemu_incoming.take_faults(self.name, process, memory, self._open_uffd)

    async def _open_uffd(self) -> int:
        return (await self.qemu.open_uffd(faults=True)).fd

    async def _started(self, image: SaveImage) -> PidHandle:
        """The QEMU that libvirt has started to read our image."""
        while (pid := await in_thread(_reader, image, self._uuid)) is None:
            await in_thread(image.write_head_again)
            await asyncio.sleep(_POLL_SECONDS)
        return PidHandle.attach(pid)

    async def _unless_failed(self, work: Awaitable[T]) -> T:
        """Wait for ``work``, or raise what libvirt says of a domain that it does not restore."""
        restoring = self._restoring
        if restoring is None:
            raise GuestError(f"guest {self.name} is not being restored", code="guest-not-open")
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, restoring}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise await self._restore_error()
        finally:
            await drop(task)

    async def _restore_error(self) -> MigratedError:
        """Why libvirt's call, which is over, did not restore the domain."""
        error = self._restoring.exception() if self._restoring is not None else None
        if error is None:
            return GuestError(f"guest {self.name}: libvirt restored it before its state had come", code="guest-start")
        if self._connection is None or not self._connection.alive:
            return GuestError(
                f"guest {self.name}: the connection to libvirt was lost: {error}",
                code="libvirt-lost",
                hint="was libvirtd restarted? Start the migration again",
            )
        return GuestError(
            f"guest {self.name}: libvirt did not restore the domain: {error}",
            code="guest-start",
            hint="libvirt's log of the domain (/var/log/libvirt/qemu) may say more",
        )

    # ------------------------------------------------------------ state, run, end

    async def load_state(self, channel: StateChannel) -> None:
        restoring, image = self._restoring, self._image
        if restoring is None or image is None:
            raise GuestError(f"guest {self.name} is not being restored", code="guest-not-open")
        feeding = asyncio.ensure_future(self._feed(channel, image))
        try:
            # libvirt may have restored it before the end of the channel is read here.
            await asyncio.wait({feeding, restoring}, return_when=asyncio.FIRST_COMPLETED)
            if not restoring.done() or restoring.exception() is None:
                await feeding
        finally:
            await drop(feeding)
        await asyncio.wait({restoring}, timeout=self._timeouts.guest_state)
        if not restoring.done():
            raise GuestError(
                f"guest {self.name}: libvirt had not restored it within {self._timeouts.guest_state:g} s",
                code="guest-state",
            )
        if restoring.exception() is not None:
            error = await self._restore_error()
            error.code = "guest-state" if error.code == "guest-start" else error.code
            raise error
        image.close()
        state = await self._state()
        if state != "paused":
            raise GuestError(f"guest {self.name}: after loading, the domain is {state}, not paused", code="guest-state")

    async def _feed(self, channel: StateChannel, image: SaveImage) -> None:
        """Pass the state on to QEMU."""
        decoder = HeaderDecoder()
        while not decoder.feed(data := await channel.read()):
            if not data:
                raise RemoteProtocolError("the guest state ended before it began")
        header, theirs = decoder.header, self._description
        if header is None or theirs is None or header.machine != theirs.machine:
            raise RemoteProtocolError("the guest state is of another machine type than the hello said")
        ids = {ident.removeprefix("/objects/"): ident for ident in theirs.ids}
        if unknown := header.used_bytes.keys() - ids.keys():
            raise RemoteProtocolError(f"the guest state names RAM blocks that the hello did not: {', '.join(unknown)}")
        self.runs = header.runs
        data = ram_section({ids[name]: size for name, size in header.used_bytes.items()}) + decoder.rest
        while data:
            await image.write(data)
            data = await channel.read()

    async def _state(self) -> str:
        """As `virsh domstate` says it."""
        connection = await self._connected()
        libvirt = connection.libvirt
        domain = await connection.domain_by_uuid(self._uuid, limit_seconds=self._timeouts.guest_command)
        if domain is None:
            return "gone"
        state, _ = await self._ask("asking for the domain's state", domain.state)
        names = {libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_PAUSED: "paused"}
        return names.get(state, "not running")

    async def resume(self) -> None:
        if not self.runs or await self._state() == "running":
            return
        connection = await self._connected()
        domain = await connection.domain_by_uuid(self._uuid, limit_seconds=self._timeouts.guest_command)
        if domain is not None:
            await self._ask("resuming the domain", domain.resume)
        state = await self._state()
        if state != "running":
            raise GuestError(f"guest {self.name}: the domain does not run, it is {state}", code="guest-not-resumed")

    async def release(self) -> None:
        await self.qemu.close_uffd()
        if not self._definition:
            return
        try:
            await insist(self._define, limit_seconds=self._timeouts.release)
        except MigratedError as error:  # it runs; that it is transient is told
            log.error(  # noqa: TRY400 - expected: no traceback
                "the domain runs here and could not be defined", guest=self.name, error=str(error)
            )

    async def _define(self) -> None:
        connection = await self._connected()
        define = connection.handle.defineXML
        limit = self._timeouts.release  # libvirt may have to find out first what its QEMU can do
        domain = await connection.call("defining the domain", define, self._definition, limit_seconds=limit)
        if self._autostart:
            await self._ask("turning autostart on", domain.setAutostart, 1)

    async def kill(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeouts.abort
        restoring, image = self._restoring, self._image
        while restoring is not None and not restoring.done():
            if image is not None:
                image.abandon()
                pid = await in_thread(_reader, image, self._uuid)
                if pid is not None:
                    with contextlib.suppress(GuestError):  # it has ended
                        process = PidHandle.attach(pid)
                        process.signal(signal.SIGKILL)
                        process.close()
            await asyncio.wait({restoring}, timeout=_POLL_SECONDS)
            if asyncio.get_running_loop().time() > deadline:
                break
        await self.qemu.kill(self._timeouts.abort)
        await self._await_end(deadline)
        if image is not None:
            image.close()

    async def _await_end(self, deadline: float) -> None:
        """Until libvirt has seen that QEMU is gone, too."""
        if not self._restoring:
            return
        with contextlib.suppress(GuestError):  # a libvirtd that has ended sees it when it is started again
            while asyncio.get_running_loop().time() < deadline and await self._state() in {"running", "paused"}:  # noqa: ASYNC110 - libvirt is asked
                await asyncio.sleep(_POLL_SECONDS)

    async def end_left_over(self) -> None:
        await in_thread(abandon_left_over, self._image_path)

    async def close(self) -> None:
        if self._image is not None:
            self._image.close()
        await self.qemu.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def died(self) -> str:
        return await self.qemu.handle.died()

    # ------------------------------------------------------------ a restarted agent

    def memento(self) -> Memento:
        return {
            "runs": self.runs,
            "uuid": self._uuid,
            "definition": self._definition,
            "autostart": self._autostart,
        }

    async def adopt(self, pid: int, uffd: int, memory: tuple[TargetMemory, ...], memento: Memento) -> FaultSource:
        faults = await qemu_incoming.adopt(self.name, self.qemu, pid, uffd, memory)
        self.runs = bool(memento.get("runs", True))
        self._uuid = str(memento.get("uuid", ""))
        self._definition = str(memento.get("definition", ""))
        self._autostart = bool(memento.get("autostart", False))
        return faults


def _reader(image: SaveImage, uuid: str) -> int | None:
    """The process that was started for the domain with this UUID and has the image open."""
    mark = uuid.encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (process / "cmdline").read_bytes() and image.open_in(int(process.name)):
                    return int(process.name)
    return None
