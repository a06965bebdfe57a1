"""Drive an incoming QEMU.

The driver starts it on our memory, takes over its faults before it touches a page, loads its state and runs it.

The memory backends of its command are memfds of ours.  All other RAM blocks (video memory, ROMs, ACPI tables) are
private to QEMU when it starts.  Injection maps a memfd of ours over each of them, so that device memory travels and
faults like RAM.

The process must outlive the agent: it has a session of its own, writes to a log file, and has no pipe and no death
signal. A restarted agent takes it back with `adopt`.  Before COMMIT `kill` ends it; nothing but `resume` ever runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import structlog

from migrated.errors import GuestError, GuestRefusedError, MigratedError, RemoteProtocolError
from migrated.guests import guest_log
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.driver import Description, FaultSource, Memento, StateChannel, TargetGuest
from migrated.guests.qemu import config as qemu_driver
from migrated.guests.qemu import incoming
from migrated.guests.qemu import memory as qemu_memory
from migrated.guests.qemu.command import check_command, command_line, regions_differ
from migrated.guests.qemu.config import QemuTargetConfig
from migrated.guests.qemu.memory import Block
from migrated.guests.qemu.process import STATE_STREAM, QemuProcess
from migrated.guests.qemu.qmp import Monitor
from migrated.guests.qemu.state import HeaderDecoder, ram_section, stream_begin
from migrated.guests.start.process import is_process_of, start, user_of
from migrated.memory import memfd
from migrated.memory.regions import Region, TargetMemory
from migrated.privileged import open_inodes
from migrated.settings import Timeouts
from migrated.waiting import in_thread, within

log = structlog.get_logger("migrated.qemu")

#: ``events``: QEMU announces the end of loading.  ``late-block-activate``: disks stay the source's until `cont`.
_CAPABILITIES = ("events", "late-block-activate")
_POLL_SECONDS = 0.02


class QemuTarget(TargetGuest):
    """The target side of a QEMU guest; see `TargetGuest`."""

    def __init__(self, name: str, config: QemuTargetConfig, run_dir: Path, timeouts: Timeouts) -> None:
        self.name = name
        self._config = config
        self._timeouts = timeouts
        self.qmp_path = run_dir / f"{name}.qmp"
        self.log_path = run_dir / f"{name}.log"
        self._owns_files = False  # the socket and log belong to the process that we started or adopted
        self._child: PidHandle | None = None  # what we started: QEMU, or a wrapper that forks it
        self.qemu = QemuProcess(name, self.qmp_path, command_seconds=timeouts.guest_command)
        self._description: qemu_driver.Description | None = None  # the source's
        self._ids: dict[str, str] = {}  # RAM block ids of the regions, as this QEMU names them
        self._incoming: socket.socket | None = None  # where QEMU reads its migration stream from
        self.runs = True  # whether it is to run on arrival; the source's driver says so with the state

    # ------------------------------------------------------------ before the start

    async def check(self, regions: tuple[Region, ...], description: Description) -> None:
        self._description = qemu_driver.Description.decode(description)
        ram = tuple(region for region in regions if not region.device)
        check_command(self.name, self._config.command, ram, reserve=self._config.reserve)
        user_of(self.name, self._config)
        if await self._somebody_listens():
            raise GuestRefusedError(
                f"guest {self.name} is on this host already: a QEMU answers on {self.qmp_path}",
                code="guest-exists",
                hint="end that QEMU first, or give the incoming guest another name",
            )

    async def _somebody_listens(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                _, writer = await asyncio.open_unix_connection(str(self.qmp_path))
        except TimeoutError:
            return True
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    # ------------------------------------------------------------ start

    async def start(self, memory: tuple[TargetMemory, ...]) -> FaultSource:
        self.qmp_path.unlink(missing_ok=True)
        self._owns_files = True
        self._child = await start(
            self.name,
            command_line(self._config.command, memory, self.qmp_path),
            self._config,
            pass_fds=[item.memory_fd for item in memory],
            output=self.log_path,
            limit_seconds=self._timeouts.guest_start,
        )
        try:
            async with asyncio.timeout(self._timeouts.guest_start):
                monitor = await self._first_contact(self._child)
                return await self._take_faults(monitor, memory)
        except TimeoutError as error:
            raise self._with_log(
                GuestError(
                    f"guest {self.name}: QEMU was not ready within {self._timeouts.guest_start:g} s",
                    code="guest-start",
                    hint="the limit is timeouts.guest_start",
                )
            ) from error
        except MigratedError as error:
            raise self._with_log(error) from error

    async def _first_contact(self, child: PidHandle) -> Monitor:
        """Wait until QEMU answers on its monitor."""
        while True:
            if (end := child.poll()) is not None:
                raise GuestError(
                    f"guest {self.name}: QEMU {end} during its start",
                    code="guest-start",
                    hint="try the command by hand; what QEMU said is in the message",
                )
            try:
                # QEMU listens long before it answers: it sends the greeting when the whole machine is built.
                monitor = await self.qemu.connect(child, greeting_seconds=self._timeouts.guest_start)
            except GuestError as error:
                if error.code != "qmp-unreachable":
                    raise
            else:
                self._refuse_stranger(self.qemu.handle.pid)
                return monitor
            await asyncio.sleep(_POLL_SECONDS)

    def _refuse_stranger(self, pid: int) -> None:
        if not is_process_of(pid, user_of(self.name, self._config)):
            raise GuestRefusedError(
                f"guest {self.name}: process {pid}, which answers on its monitor, does not run as {self._config.user}",
                code="guest-user",
                hint="look at what made the socket; the command must not change the user",
            )

    async def _take_faults(self, monitor: Monitor, memory: tuple[TargetMemory, ...]) -> FaultSource:
        blocks = await self._compare(monitor, tuple(item.region for item in memory))
        # Run commands first: after the registration QEMU's main thread may wait for a page until the switchover.
        await self._await_state(monitor)
        await self._map_device_memory(monitor, blocks, memory)
        return await incoming.take_faults(self.name, self.qemu.handle, memory, self._open_uffd)

    async def _open_uffd(self) -> int:
        return (await self.qemu.open_uffd(faults=True)).fd

    async def _compare(self, monitor: Monitor, regions: tuple[Region, ...]) -> dict[str, Block]:
        """Compare this QEMU with the source's; return its blocks by name."""
        status = await monitor.status()
        if status != "inmigrate":
            raise GuestError(
                f"guest {self.name}: the new QEMU is in run state {status}, not waiting for a migration",
                code="guest-start",
            )
        await self._compare_machine(monitor)
        found = {block.name: block for block in await qemu_memory.ram_blocks(monitor)}
        wanted = {region.name: region.size_bytes for region in regions}
        differing = [
            f"{name} has {size} bytes on the source and {f'{found[name].size_bytes} here' if name in found else 'is not here'}"
            for name, size in wanted.items()
            if name not in found or found[name].size_bytes != size
        ]
        differing += [
            f"{name} is here and not on the source"
            for name, block in found.items()
            if name not in wanted and not block.rom
        ]
        if differing:
            raise regions_differ(self.name, "; ".join(differing))
        backends = await qemu_memory.backends(monitor, found.values())
        if private := [backend.name for backend in backends if not backend.share]:
            raise GuestRefusedError(
                f"guest {self.name}: memory backend {', '.join(private)} of the incoming QEMU is private (share=off)",
                code="memory-not-shared",
                hint="use -object memory-backend-file,…,share=on,mem-path={memory:ID} in the command",
            )
        self._ids = {name: found[name].id for name in wanted}
        return found

    async def _compare_machine(self, monitor: Monitor) -> None:
        theirs = self._description
        if theirs is None:
            raise GuestError(f"guest {self.name} was not checked", code="guest-not-open")
        machine = await qemu_memory.machine_type(monitor)
        if machine != theirs.machine:
            raise GuestRefusedError(
                f"guest {self.name}: the source runs machine type {theirs.machine}, the command here makes a {machine}",
                code="machine-differs",
                hint=f"give -machine {theirs.machine} in the command: a name like pc or q35 means another type in each version",
            )
        version = await qemu_memory.version(monitor)
        if version[:2] != theirs.version[:2]:
            log.warning(
                "the QEMU versions differ",
                guest=self.name,
                source=".".join(map(str, theirs.version)),
                here=".".join(map(str, version)),
                downgrade=version < theirs.version,
            )

    async def _await_state(self, monitor: Monitor) -> None:
        """Have QEMU wait for its migration stream."""
        await _set_capabilities(monitor, on=True)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._incoming = ours
        with theirs:
            await monitor.give_fd(STATE_STREAM, theirs.fileno())
        await monitor.execute("migrate-incoming", {"uri": f"fd:{STATE_STREAM}"})

    async def _map_device_memory(
        self, monitor: Monitor, blocks: dict[str, Block], memory: tuple[TargetMemory, ...]
    ) -> None:
        """Map our memory over the RAM blocks that no backend provides."""
        process = self.qemu.handle
        items = {item.region.name: item for item in memory if item.region.device}
        if not items:
            return
        located = await qemu_memory.locate_blocks(monitor, process.pid, blocks.values())
        for place in located:
            item = items.pop(place.block.name, None)
            if item is None:
                continue
            self._refuse_descriptor_lost(process.pid, item.memory_fd)
            await in_thread(injection.map_over, process, place.address, item.region.size_bytes, item.memory_fd)
        if items:
            raise GuestRefusedError(
                f"guest {self.name}: this QEMU does not say where it keeps {', '.join(sorted(items))}",
                code="memory-not-found",
                hint="QEMU 8.0 and newer do: migrate to a host with the source's version or a newer one",
            )

    def _refuse_descriptor_lost(self, pid: int, fd: int) -> None:
        """Refuse a QEMU without our descriptor: a wrapper may have closed it before executing QEMU."""
        ours = os.fstat(fd)
        if open_inodes(pid, f"/memfd:{memfd.NAME_PREFIX}").get(fd) == (ours.st_dev, ours.st_ino):
            return
        raise GuestRefusedError(
            f"guest {self.name}: QEMU (process {pid}) has not inherited descriptor {fd} from the agent",
            code="guest-command",
            hint="the command must start QEMU directly, or through a wrapper that keeps open descriptors",
        )

    def _with_log(self, error: MigratedError) -> MigratedError:
        """Add the end of QEMU's log to the error's message, and return the error."""
        tail = self.log_tail()
        if tail and tail not in error.message:
            error.message = f"{error.message}; QEMU said: {tail}"
            error.args = (error.message,)
        return error

    def log_tail(self) -> str:
        """Return the end of QEMU's log."""
        return guest_log.tail(self.log_path)

    # ------------------------------------------------------------ a restarted agent

    def memento(self) -> Memento:
        return {"runs": self.runs}

    async def adopt(self, pid: int, uffd: int, memory: tuple[TargetMemory, ...], memento: Memento) -> FaultSource:
        faults = await incoming.adopt(self.name, self.qemu, pid, uffd, memory)
        self.runs = bool(memento.get("runs", True))
        self._owns_files = True
        return faults

    async def _monitor(self) -> Monitor:
        try:
            return await self.qemu.monitor()
        except GuestError as error:
            if error.code == "guest-gone":  # its log has the reason
                self._with_log(error)
            raise

    # ------------------------------------------------------------ state, run, end

    async def load_state(self, channel: StateChannel) -> None:
        if self._description is None:
            raise GuestError(f"guest {self.name} was not checked", code="guest-not-open")
        await self._feed(stream_begin(self._description.machine))  # QEMU prepares to load while the guest still runs
        decoder = HeaderDecoder()
        while not decoder.feed(data := await channel.read()):
            if not data:
                raise RemoteProtocolError("the guest state ended before it began")
        header = decoder.header
        if header is None or header.machine != self._description.machine:
            raise RemoteProtocolError("the guest state is of another machine type than the hello said")
        if unknown := header.used_bytes.keys() - self._ids.keys():
            raise RemoteProtocolError(f"the guest state names RAM blocks that the hello did not: {', '.join(unknown)}")
        self.runs = header.runs
        used = {self._ids[name]: size for name, size in header.used_bytes.items()}
        try:
            async with within(self._timeouts.guest_state, f"QEMU to read the state of guest {self.name}"):
                data = ram_section(used) + decoder.rest
                while data:
                    await self._feed(data)
                    data = await channel.read()
            self._close_incoming()
            await self._loaded(await self._monitor())
        except GuestError as error:
            raise await self._load_error(error) from error
        finally:
            self._close_incoming()

    async def _feed(self, data: bytes) -> None:
        """Pass a piece of the migration stream on to QEMU."""
        if self._incoming is None:
            raise GuestError(f"guest {self.name} does not wait for its state", code="guest-not-open")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # QEMU reports a better reason
            await asyncio.get_running_loop().sock_sendall(self._incoming, data)

    async def _loaded(self, monitor: Monitor) -> None:
        """Wait until QEMU has loaded the state."""
        limit = self._timeouts.guest_state
        status = await monitor.wait_loaded(limit=limit)
        if status != "paused":
            raise GuestError(
                f"guest {self.name}: after loading, QEMU is in run state {status}, not paused", code="guest-state"
            )

    def _close_incoming(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.close()

    async def _load_error(self, error: GuestError) -> MigratedError:
        """Return the error to report when loading fails.

        A QEMU that cannot load exits (7.2): the reason is in its log and not in the lost QMP session.
        """
        if error.code == "qmp-lost":
            with contextlib.suppress(MigratedError):
                end = await self.qemu.handle.wait(self._timeouts.guest_command)
                error = GuestError(
                    f"guest {self.name}: QEMU did not accept the guest's state and {end}",
                    code="guest-state",
                    hint="both hosts must run the guest with the same machine type, devices and CPU model",
                )
        return self._with_log(error)

    async def resume(self) -> None:
        if not self.runs:
            return
        monitor = await self._monitor()
        monitor.forget_events()
        await monitor.execute("cont", limit=self._timeouts.guest_command)  # no effect on a running guest
        if monitor.saw("RESUME"):  # it precedes the answer to cont and saves the source one more query
            return
        status = await monitor.wait_status(frozenset({"inmigrate"}), limit=self._timeouts.guest_command)
        if status != "running":
            raise GuestError(
                f"guest {self.name}: QEMU did not resume, its run state is {status}",
                code="guest-not-resumed",
                hint=f"see {self.log_path}",
            )

    async def release(self) -> None:
        with contextlib.suppress(MigratedError):  # they only matter to a later migration by QEMU itself
            await _set_capabilities(await self._monitor(), on=False)
        await self.qemu.close_uffd()

    async def kill(self) -> None:
        await self.qemu.kill(self._timeouts.abort)
        if self._child is not None:
            await self._child.kill(self._timeouts.abort)
        if self._owns_files:
            self.qmp_path.unlink(missing_ok=True)
            self.log_path.unlink(missing_ok=True)

    async def close(self) -> None:
        self._close_incoming()
        await self.qemu.close()
        if self._child is not None:
            self._child.close()

    async def died(self) -> str:
        return await self.qemu.handle.died()


async def _set_capabilities(monitor: Monitor, *, on: bool) -> None:
    states = [{"capability": name, "state": on} for name in _CAPABILITIES]
    await monitor.execute("migrate-set-capabilities", {"capabilities": states})
