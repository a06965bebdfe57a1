"""Drive a running QEMU that is migrated away: find it by its QMP socket, inspect it, track it, pause it, release it.

QEMU does not know that it is migrated.  It runs, or `stop` has paused it; `cont` reverts that at any time:

    running → [stop → cont]*  → stop, xen-save-devices-state → quit
              quiesced scans      cont until COMMIT ┘
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

from migrated import privileged
from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.driver import Description, Memento, Outline, SourceGuest, StateChannel
from migrated.guests.qemu import config as qemu_driver
from migrated.guests.qemu import memory as qemu_memory
from migrated.guests.qemu.config import QemuSourceConfig
from migrated.guests.qemu.memory import Block
from migrated.guests.qemu.process import ManagedQemu, QemuProcess
from migrated.guests.qemu.qmp import MonitorCommands
from migrated.guests.qemu.state import END, StateFile, StateHeader, encode_header
from migrated.memory.maps import mapped_elsewhere, open_area
from migrated.memory.regions import SourceMemory
from migrated.memory.smaps import mapped_areas
from migrated.protocol.messages import MAX_REGIONS
from migrated.settings import Timeouts
from migrated.waiting import drop

#: Run states of a guest that can be migrated; in all but the first it arrives paused.
_MOVABLE = frozenset({"running", "paused", "prelaunch"})
#: Run states of a guest that must not run on.
_ENDED = frozenset({"shutdown", "guest-panicked", "internal-error"})
#: Statuses of a QEMU migration that has finished (or never began).
_IDLE = frozenset({"none", "completed", "failed", "cancelled"})
_TRANSIENT = frozenset({"finish-migrate", "save-vm", "restore-vm", "debug"})
_MOVED_AWAY = "it has been migrated away already; `cont` would run it here again"
_STATE_PIECE_BYTES = 1 << 18


class RunningQemu(SourceGuest):
    """The source side of a QEMU guest, except how the agent reaches and releases it; see `SourceGuest`."""

    def __init__(self, name: str, qemu: ManagedQemu[Any], timeouts: Timeouts) -> None:
        self.name = name
        self._timeouts = timeouts
        self.qemu = qemu
        self.blocks: tuple[Block, ...] = ()  # RAM blocks, in the order of the regions
        self._memory: SourceMemory | None = None
        self._fds: list[int] = []
        self._description: qemu_driver.Description | None = None
        self._runs = True  # whether the guest's owner wants it to run
        self._stopped = False  # we have asked QEMU to stop it
        self._quiesced_at: float | None = None
        self._pins_buffers = True
        self._nested_runs = 0
        self._used_bytes: dict[str, int] = {}
        self._paused_by: MonitorCommands | None = None  # the session in which the guest was paused
        self.paused_at = self.stopped_at = None

    # ------------------------------------------------------------ inspection

    async def open(self) -> SourceMemory:
        monitor = await self.qemu.connect()
        await self._refuse_unmovable(monitor)
        return await self._inspect(monitor)

    async def _reopen(self) -> None:
        """Open for an agent that was restarted during a migration: we may have paused the guest, and may track it."""
        await self._inspect(await self.qemu.connect())
        await self._clear_left_tracking()

    async def _inspect(self, monitor: MonitorCommands) -> SourceMemory:
        pid = self.qemu.handle.pid
        blocks = await qemu_memory.ram_blocks(monitor)
        backends = await qemu_memory.backends(monitor, blocks)
        located = await qemu_memory.locate_blocks(monitor, pid, blocks)
        if len(located) > MAX_REGIONS:
            raise GuestRefusedError(
                f"guest {self.name} has {len(located)} RAM blocks, of which {MAX_REGIONS} can be migrated",
                code="too-many-blocks",
                hint="each device with a ROM has one: leave ROMs out (romfile=) or unplug devices",
            )
        keys = frozenset(item.areas[0].key for item in located if item.shared)
        for other in await asyncio.to_thread(mapped_elsewhere, keys, (pid, os.getpid())):
            raise GuestRefusedError(
                f"guest {self.name}: its memory is also mapped by {other}, whose writes cannot be seen",
                code="memory-mapped-elsewhere",
                hint="detach that process (a vhost-user back end, a debugger) first",
            )
        self._pins_buffers = await qemu_memory.disks_pin_buffers(monitor, pid)
        for item in located:
            fd = open_area(pid, item.areas[0]) if item.shared else _open_memory(pid)
            self._fds.append(fd)
            if item.shared:
                qemu_memory.refuse_disk_file(self.name, item.block, fd)
        self.blocks = tuple(item.block for item in located)
        self._description = qemu_driver.Description(
            machine=await qemu_memory.machine_type(monitor),
            version=await qemu_memory.version(monitor),
            backends=tuple(backend.name for backend in backends),
        )
        self._memory = SourceMemory(
            pid=pid,
            regions=tuple(qemu_memory.region(item, backends, fd) for item, fd in zip(located, self._fds, strict=True)),
            mappings=tuple(item.mapping(index) for index, item in enumerate(located)),
            memory_fds=tuple(self._fds),
            file_offsets=tuple(item.file_offset if item.shared else item.address for item in located),
            private=tuple(not item.shared for item in located),
            file_behind=tuple(item.shows_file for item in located),
        )
        return self._memory

    def describe(self) -> Description:
        if self._description is None:
            raise GuestError(f"guest {self.name} is not open", code="guest-not-open")
        return self._description.encode()

    async def outline(self) -> Outline:
        monitor: MonitorCommands = await self.qemu.monitor()
        size = await monitor.execute("query-memory-size-summary")
        return Outline(await monitor.status(), size["base-memory"] + size.get("plugged-memory", 0))

    # ------------------------------------------------------------ refusals

    async def _refuse_unmovable(self, monitor: MonitorCommands) -> None:
        await self._refuse_run_state(monitor)
        devices = qemu_memory.passed_through_devices(self.qemu.handle.pid)
        if devices:
            raise GuestRefusedError(
                f"guest {self.name} has a passed-through device ({', '.join(devices)}), whose writes cannot be seen",
                code="passed-through-device",
                hint="unplug the device (device_del) for the time of the migration",
            )
        await self._refuse_block_layer(monitor)
        for device in await monitor.execute("query-memory-devices"):
            if device["type"] == "virtio-mem":
                raise GuestRefusedError(
                    f"guest {self.name} has a virtio-mem device ({device['data'].get('id', 'without an id')}), "
                    "part of whose state QEMU saves only in a migration of its own",
                    code="unsupported-device",
                    hint="unplug the device, or use a pc-dimm",
                )
        self._nested_runs = await self._refuse_nested_guest(monitor)

    async def _refuse_run_state(self, monitor: MonitorCommands) -> None:
        status = await monitor.status()
        report = await monitor.migration()
        if status == "inmigrate":
            raise GuestRefusedError(
                f"guest {self.name} has not arrived: its QEMU waits for an incoming migration", code="guest-incoming"
            )
        if str(report.get("status", "none")) not in _IDLE:
            raise GuestRefusedError(
                f"guest {self.name} is being migrated already (QEMU's migration is {report['status']})",
                code="guest-migrating",
                hint="wait for it, or cancel it with migrate_cancel",
            )
        if status not in _MOVABLE:
            raise GuestRefusedError(
                f"guest {self.name} is in run state {status}",
                code="guest-not-movable",
                hint="only a running or a paused guest can be migrated" if status != "postmigrate" else _MOVED_AWAY,
            )
        self._runs = status == "running"
        if reasons := report.get("blocked-reasons"):
            raise GuestRefusedError(
                f"guest {self.name} cannot be migrated; QEMU reports: {'; '.join(reasons)}", code="migration-blocked"
            )

    async def _refuse_block_layer(self, monitor: MonitorCommands) -> None:
        """Refuse jobs (a backup, a mirror, a snapshot being taken) and dirty bitmaps: the device state has neither."""
        jobs: list[dict[str, Any]] = await monitor.execute("query-jobs")
        if working := [f"{job['id']} ({job['type']})" for job in jobs if job["status"] not in {"concluded", "null"}]:
            raise GuestRefusedError(
                f"guest {self.name} has an active job: {', '.join(working)}",
                code="job-running",
                hint="wait for it, or cancel it (job-cancel), and start the migration again",
            )
        nodes: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
        if bitmaps := sorted(
            f"{bitmap.get('name') or 'unnamed'} of {node['node-name']}"
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", [])
        ):
            raise GuestRefusedError(
                f"guest {self.name} has dirty bitmaps, which would be lost: {', '.join(bitmaps)}",
                code="dirty-bitmaps",
                hint="remove them (block-dirty-bitmap-remove); the next backup has to be a full one",
            )

    async def _refuse_nested_guest(self, monitor: MonitorCommands) -> int:
        """Return how often virtual processors have entered a nested guest; raise if one is in a nested guest now.

        KVM writes some pages of a nested guest's hypervisor through mappings of its own, which tracking does not see.
        QEMU reports KVM's counters since 7.1; without them we cannot notice it.
        """
        request = {"target": "vcpu", "providers": [{"provider": "kvm", "names": ["nested_run", "guest_mode"]}]}
        try:
            processors: list[dict[str, Any]] = await monitor.execute("query-stats", request)
        except GuestError:
            return 0
        counters = [stat for processor in processors for stat in processor["stats"]]
        if any(stat["name"] == "guest_mode" and stat["value"] for stat in counters):
            raise GuestRefusedError(
                f"guest {self.name} runs virtual machines of its own at this moment, whose hypervisor state is written unseen",
                code="nested-guest",
                hint="stop the nested guests, and start the migration again",
            )
        return sum(int(stat["value"]) for stat in counters if stat["name"] == "nested_run")

    @property
    def needs_quiesced_scans(self) -> bool:
        return self._pins_buffers

    # ------------------------------------------------------------ tracking

    async def tracking_uffd(self) -> int:
        uffd = self.qemu.uffd
        if uffd is None:
            await self._clear_left_tracking()
            uffd = await self.qemu.open_uffd(faults=False)
        return uffd.fd

    async def _clear_left_tracking(self) -> None:
        """Close the userfaultfd that an agent left when it died in pre-copy: a mapping takes only one."""
        left = injection.userfaultfds(self.qemu.handle.pid)
        if not left or self._memory is None:
            return
        ranges = [(mapping.address, mapping.address + mapping.length_bytes) for mapping in self._memory.mappings]
        states = await asyncio.to_thread(mapped_areas, self.qemu.handle.pid, ranges)
        flags = frozenset(flag for state in states for flag in state.flags)
        if flags & {"um", "ui"}:
            raise GuestRefusedError(
                f"guest {self.name}: some of its memory may still be on its way from another host",
                code="guest-migrating",
                hint="wait until the migration that brought it here has finished",
            )
        if "uw" in flags:
            for number in left:
                await injection.close_remote(self.qemu.handle, number, self._memory)

    async def release_tracking(self) -> None:
        await self.qemu.close_uffd()

    # ------------------------------------------------------------ stopping

    async def quiesce(self) -> None:
        monitor = await self.qemu.monitor()
        self._runs = await monitor.status() == "running"
        if self._runs:
            self._quiesced_at = time.monotonic()
            await self._stop(monitor)

    async def unquiesce(self) -> None:
        if self._quiesced_at is not None:
            await self._run_on(await self.qemu.monitor())
            self._quiesced_at = None

    async def _stop(self, monitor: MonitorCommands) -> None:
        self._stopped = True  # even if the answer is lost
        await monitor.execute("stop", limit=self._timeouts.guest_pause)

    async def _stand_still(self, monitor: MonitorCommands) -> None:
        """Stop the guest for good, if it runs."""
        if self._runs:
            await self._stop(monitor)
        self.stopped_at = time.monotonic()
        monitor.forget_events()
        self._paused_by = monitor

    async def _run_on(self, monitor: MonitorCommands) -> None:
        """Undo our ``stop``, which left the guest ``paused``; in any other state, leave the guest alone.

        Somebody else or QEMU itself caused such a state: ``cont`` would run a guest that has moved away meanwhile
        (``postmigrate``), or hide an I/O error from its owner.
        """
        limit = self._timeouts.guest_pause
        status = await monitor.wait_status(_TRANSIENT, limit=limit)
        if status == "paused":
            await monitor.execute("cont", limit=limit)
            status = await monitor.wait_status(_TRANSIENT, limit=limit)
        if status != "running":
            raise GuestError(
                f"guest {self.name}: QEMU did not resume, its run state is {status}",
                code="guest-not-resumed",
                hint=_MOVED_AWAY if status == "postmigrate" else "",
            )
        self._stopped = False

    async def pause(self, channel: StateChannel) -> None:
        monitor = await self.qemu.monitor()
        status = await monitor.status()
        if status in _ENDED:
            raise GuestError(
                f"guest {self.name} went into run state {status} while it was being migrated", code="guest-not-movable"
            )
        if await self._refuse_nested_guest(monitor) != self._nested_runs:
            raise GuestRefusedError(
                f"guest {self.name} has run virtual machines of its own during the migration", code="nested-guest"
            )
        if self._quiesced_at is None:
            self._runs = status == "running"
        self._used_bytes = await self._read_used_bytes(monitor)
        header = encode_header(StateHeader(self._runs, self._machine, self._used_bytes))
        file = await StateFile.open(monitor)
        try:
            self.paused_at = self._quiesced_at or time.monotonic()
            state = await self._stop_and_save(monitor, file)
            for start in range(0, len(state), _STATE_PIECE_BYTES):
                await channel.write(header + state[start : start + _STATE_PIECE_BYTES])
                header = b""
            await channel.write(END)
            await channel.close_write()
        finally:
            file.close()

    async def _stop_and_save(self, monitor: MonitorCommands, file: StateFile) -> bytes:
        """Stop the guest, if it runs, and return the state of its devices.  What QEMU writes to memory is written then.

        Where the monitor keeps the order, QEMU gets both commands at once.  It reads a command byte by byte, each in a turn
        of its loop (4 us): so it reads the second while it executes the first.  A refused `stop` fails the migration, although
        QEMU then saves the state of a running guest, which runs on.
        """
        limit = self._timeouts.guest_state
        if not monitor.keeps_order:
            await self._stand_still(monitor)
            return await file.save(limit)
        stopping = asyncio.ensure_future(self._stand_still(monitor))
        saving = asyncio.ensure_future(file.save(self._timeouts.guest_pause + limit))
        try:
            await stopping
            return await saving
        finally:
            await drop(stopping, saving)

    async def send_state(self, channel: StateChannel) -> None:
        del channel  # `pause` has sent it
        monitor: MonitorCommands = await self.qemu.monitor()
        status, used_bytes = await asyncio.gather(monitor.status(), self._read_used_bytes(monitor))
        # A guest that was resumed and stopped again has written to its memory too.  A new session has seen no events.
        if status == "running" or monitor.saw("RESUME") or monitor is not self._paused_by:
            raise GuestError(
                f"guest {self.name} was resumed by somebody else during the switchover, or may have been",
                code="guest-resumed",
                hint="leave the guest's monitors alone while it is being migrated",
            )
        if used_bytes != self._used_bytes:
            raise GuestError(
                f"guest {self.name}: a RAM block was resized while it was being paused", code="guest-state"
            )

    async def _read_used_bytes(self, monitor: MonitorCommands) -> dict[str, int]:
        regions = frozenset(region.name for region in self._memory.regions) if self._memory is not None else frozenset()
        blocks = await qemu_memory.ram_blocks(monitor)
        return {block.name: block.used_bytes for block in blocks if block.name in regions}

    @property
    def _machine(self) -> str:
        return self._description.machine if self._description is not None else ""

    # ------------------------------------------------------------ the end

    async def resume(self) -> None:
        monitor = await self.qemu.monitor()
        if self._runs and self._stopped:
            await self._run_on(monitor)
        self._quiesced_at = None
        with contextlib.suppress(GuestError):  # one descriptor left over does no harm
            await monitor.remove_fds()

    def memento(self) -> Memento:
        return {"runs": self._runs}

    async def reclaim(self, memento: Memento) -> None:
        await self._reopen()
        self._runs = bool(memento.get("runs", True))
        self._stopped = True  # perhaps: recording it in the journal would cost downtime
        await self.resume()

    async def adopt(self, pid: int, memento: Memento) -> None:
        del memento  # what it was no longer matters
        self.qemu.adopt(PidHandle.attach(pid))

    async def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        await self.qemu.close()

    async def died(self) -> str:
        return await self.qemu.handle.died()


class QemuSource(RunningQemu):
    """A QEMU that has a QMP socket for us."""

    def __init__(self, name: str, config: QemuSourceConfig, timeouts: Timeouts) -> None:
        super().__init__(name, QemuProcess(name, Path(config.qmp), command_seconds=timeouts.guest_command), timeouts)
        self._on_release = config.on_release

    async def release(self) -> None:
        process = self.qemu.handle
        if process.poll() is not None or self._on_release == "keep":
            return
        with contextlib.suppress(MigratedError):
            await (await self.qemu.monitor()).execute("quit")
        try:
            await process.wait(self._timeouts.release)
        except TimeoutExceededError:
            # The guest runs elsewhere: the process left here must not run.
            await process.kill(self._timeouts.release)


def _open_memory(pid: int) -> int:
    """Open ``/proc/PID/mem`` for reading.  It stays with this process, never a later one with the same pid."""
    path = f"/proc/{pid}/mem"
    try:
        return privileged.open_file(pid, "mem")
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | ProcessLookupError)
        raise GuestError(
            f"cannot open {path}: {error.strerror}",
            code="guest-gone" if gone else "no-rights",
            hint="" if gone else "the agent needs CAP_SYS_PTRACE, or the user the process runs as",
        ) from error
