"""An incoming QEMU: started on our memory, its faults taken from it before it touches a page, loaded, run.

The process must outlive the agent: own session, output to a log file, no pipe and no death signal; a restarted agent takes
it back with `adopt`.  Before COMMIT `kill` ends it; nothing but `resume` ever runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from migrated.config import Timeouts
from migrated.errors import GuestError, GuestRefusedError, MigratedError, RemoteProtocolError
from migrated.guests import injection, qemu_memory
from migrated.guests.driver import FaultSource, Mapping, Memento, Region, StateChannel, TargetGuest, TargetMemory
from migrated.guests.pidfd import PidHandle
from migrated.guests.qemu import (
    PREFACE_BYTES,
    TARGET_CAPABILITIES,
    MigrationSettings,
    QemuTargetConfig,
    parse_preface,
)
from migrated.guests.qemu_command import check_command, command_line, locked, preallocated, regions_differ
from migrated.guests.qemu_process import STATE_STREAM, QemuProcess
from migrated.guests.qemu_relay import StateRelay
from migrated.guests.qmp import Monitor
from migrated.guests.residence import residences
from migrated.memory.maps import Area, areas, file_key, mapped_elsewhere
from migrated.memory.native import uffd_register

_POLL_SECONDS = 0.02
_LOG_TAIL_BYTES = 2000


class QemuTarget(TargetGuest):
    """See `TargetGuest`."""

    def __init__(self, name: str, config: QemuTargetConfig, run_dir: Path, timeouts: Timeouts) -> None:
        self.name = name
        self._config = config
        self._timeouts = timeouts
        self.qmp_path = run_dir / f"{name}.qmp"
        self.log_path = run_dir / f"{name}.log"
        self._owns_files = False  # socket and log are of the process we started, or adopted
        self._child: PidHandle | None = None  # what we started: QEMU, or a wrapper that forks it
        self.qemu = QemuProcess(name, self.qmp_path)
        self._relay: StateRelay | None = None
        self._settings: MigrationSettings | None = None
        self.runs = True  # whether it is to run on arrival; told by the source's driver with the state

    # ------------------------------------------------------------ before the start

    async def check(self, regions: tuple[Region, ...]) -> None:
        check_command(self.name, self._config.command, regions, reserve=self._config.reserve)
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
        self._child = PidHandle.spawn(
            command_line(self._config.command, memory, self.qmp_path),
            pass_fds=[item.memory_fd for item in memory],
            log=self.log_path,
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
                    f"guest {self.name}: QEMU {end} at its start",
                    code="guest-start",
                    hint="try the command by hand; what QEMU said is in the message",
                )
            try:
                # QEMU listens long before it answers: the greeting comes when the whole machine is built.
                return await self.qemu.connect(child, greeting_seconds=self._timeouts.guest_start)
            except GuestError as error:
                if error.code != "qmp-unreachable":
                    raise
            await asyncio.sleep(_POLL_SECONDS)

    async def _take_faults(self, monitor: Monitor, memory: tuple[TargetMemory, ...]) -> FaultSource:
        await self._compare(monitor, tuple(item.region for item in memory))
        mappings = await self._mappings(self.qemu.handle.pid, memory)
        await self._refuse_present(memory)
        uffd = await self.qemu.open_uffd(monitor, faults=True)
        for mapping in mappings:
            uffd_register(uffd.fd, mapping.address, mapping.length_bytes, missing=True, minor=True, tracking=True)
        # Once more: what was mapped between the first look and the registration would never be reported.
        await self._refuse_present(memory)
        return FaultSource(pid=self.qemu.handle.pid, uffd=uffd.fd, mappings=mappings)

    async def _compare(self, monitor: Monitor, regions: tuple[Region, ...]) -> None:
        status = await monitor.status()
        if status != "inmigrate":
            raise GuestError(
                f"guest {self.name}: the new QEMU is in run state {status}, not waiting for a migration",
                code="guest-start",
            )
        found = await qemu_memory.backends(monitor)
        here = {backend.name: backend.size_bytes for backend in found}
        wanted = {region.name: region.size_bytes for region in regions}
        if here != wanted:
            raise regions_differ(self.name, f"the source has {_sizes(wanted)}, QEMU here has {_sizes(here)}")
        qemu_memory.refuse_private(self.name, found)
        for backend in found:
            if backend.prealloc:
                raise preallocated(self.name, f"memory backend {backend.name} has prealloc=on")

    async def _mappings(self, pid: int, memory: tuple[TargetMemory, ...]) -> tuple[Mapping, ...]:
        """Where QEMU maps our memory: each region whole and once."""
        found: list[Mapping] = []
        every = areas(pid)
        for index, item in enumerate(memory):
            key = file_key(item.memory_fd)
            ours: list[Area] = [area for area in every if area.key == key]
            ends = {area.offset + area.end - area.start for area in ours}
            starts = {area.offset for area in ours}
            covered = sum(area.end - area.start for area in ours)
            whole = covered == item.region.size_bytes and starts - ends == {0} and ends - starts == {covered}
            if not whole or not all(area.shared for area in ours):
                raise regions_differ(
                    self.name,
                    f"QEMU maps {covered} of the {item.region.size_bytes} bytes made for {item.region.name}, or not as one",
                )
            found += [Mapping(index, area.start, area.offset, area.end - area.start) for area in ours]
        keys = frozenset(file_key(item.memory_fd) for item in memory)
        # Ourselves excluded: the alias is not the guest's.
        for other in await asyncio.to_thread(mapped_elsewhere, keys, (pid, os.getpid())):
            raise GuestRefusedError(
                f"guest {self.name}: its memory is also mapped by {other}",
                code="memory-mapped-elsewhere",
                hint="vhost-user back ends cannot take part in a move yet",
            )
        return tuple(found)

    async def _refuse_present(self, memory: tuple[TargetMemory, ...]) -> None:
        keys = frozenset(file_key(item.memory_fd) for item in memory)
        for state in await asyncio.to_thread(residences, self.qemu.handle.pid, keys):
            if "lo" in state.flags:
                raise locked(self.name, f"{state.area.path}")
            if state.present_bytes:
                raise preallocated(self.name, f"{state.present_bytes} bytes are there already")

    def _with_log(self, error: MigratedError) -> MigratedError:
        """The error, with the last words of QEMU in its message."""
        tail = self.log_tail()
        if tail and tail not in error.message:
            error.message = f"{error.message}; QEMU said: {tail}"
            error.args = (error.message,)
        return error

    def log_tail(self) -> str:
        """The end of what QEMU wrote."""
        try:
            data = self.log_path.read_bytes()[-_LOG_TAIL_BYTES:]
        except OSError:
            return ""
        return data.decode(errors="replace").strip()

    # ------------------------------------------------------------ a restarted agent

    def memento(self) -> Memento:
        return {"runs": self.runs}

    async def adopt(self, pid: int, uffd: int, memory: tuple[TargetMemory, ...], memento: Memento) -> FaultSource:
        process = PidHandle.attach(pid)
        try:
            remote = injection.find_remote(pid, uffd)
            if remote is None:
                raise GuestError(
                    f"guest {self.name}: process {pid} does not hold the userfaultfd of this migration",
                    code="guest-gone",
                )
            mappings = await self._mappings(pid, memory)
        except BaseException:
            process.close()
            raise
        self.runs = bool(memento.get("runs", True))
        self._owns_files = True
        self.qemu.adopt(process, injection.InjectedUffd(process, uffd, remote, 0.0))
        return FaultSource(pid=pid, uffd=uffd, mappings=mappings)

    async def _monitor(self) -> Monitor:
        try:
            return await self.qemu.monitor()
        except GuestError as error:
            if error.code == "guest-gone":  # its log has the reason
                self._with_log(error)
            raise

    # ------------------------------------------------------------ state, run, end

    async def load_state(self, channel: StateChannel) -> None:
        monitor = await self._monitor()
        head = b""
        while len(head) < PREFACE_BYTES:
            data = await channel.read()
            if not data:
                raise RemoteProtocolError("the guest state ended before it began")
            head += data
        self.runs = parse_preface(head[:PREFACE_BYTES])
        self._settings = MigrationSettings(monitor)
        await self._settings.apply(TARGET_CAPABILITIES, {})
        self._relay = await StateRelay.open(monitor, STATE_STREAM, channel, first=head[PREFACE_BYTES:])
        try:
            await monitor.execute("migrate-incoming", {"uri": f"fd:{STATE_STREAM}"})
            limit = self._timeouts.guest_state
            await self._relay.guard(
                monitor.wait_migration(frozenset({"completed"}), limit=limit, what="loading the device state")
            )
            await self._relay.sent(limit)
            status = await monitor.wait_status(frozenset({"inmigrate"}), limit=limit)
            if status != "paused":
                raise GuestError(
                    f"guest {self.name}: after loading, QEMU is in run state {status}, not paused", code="guest-state"
                )
            await self._settings.restore()
        except GuestError as error:
            raise await self._load_error(error) from error
        finally:
            await self._relay.close()

    async def _load_error(self, error: GuestError) -> MigratedError:
        """A QEMU that cannot load exits (7.2): its log has the reason, the lost QMP session has not."""
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
        if await monitor.status() == "running":
            return
        await monitor.execute("cont", limit=self._timeouts.guest_command)
        status = await monitor.wait_status(frozenset({"inmigrate"}), limit=self._timeouts.guest_command)
        if status != "running":
            raise GuestError(
                f"guest {self.name}: QEMU does not run, its run state is {status}",
                code="guest-not-resumed",
                hint=f"see {self.log_path}",
            )

    async def release(self) -> None:
        await self.qemu.close_uffd()

    async def kill(self) -> None:
        await self.qemu.kill(self._timeouts.abort)
        if self._child is not None:
            await self._child.kill(self._timeouts.abort)
        if self._owns_files:
            self.qmp_path.unlink(missing_ok=True)
            self.log_path.unlink(missing_ok=True)

    async def close(self) -> None:
        relay, self._relay = self._relay, None
        if relay is not None:
            await relay.close()
        await self.qemu.close()
        if self._child is not None:
            self._child.close()

    async def died(self) -> str:
        return await self.qemu.handle.died()


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} of {size} bytes" for name, size in sorted(sizes.items())) or "none"
