"""A running QEMU, to be moved away: found by its QMP socket, inspected, tracked from outside, paused, given up.

The order QEMU goes through, and what brings it back (`resume`) from each point:

    running → [stop → cont]* → migrate: active → pre-switchover → migrate-continue: device → completed (postmigrate)
              quiesced scans            migrate_cancel, QEMU restarts the guest itself ┘        cont ┘

Until ``completed`` a QEMU that loses its stream starts the guest again by itself.  That is harmless: the target never runs
it before COMMIT, and COMMIT is sent only after `send_state` has returned, which is after ``completed``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

from migrated.config import Timeouts
from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests import injection, qemu_memory
from migrated.guests.driver import Memento, SourceGuest, SourceMemory, StateChannel
from migrated.guests.pidfd import PidHandle
from migrated.guests.qemu import SOURCE_CAPABILITIES, SOURCE_PARAMETERS, MigrationSettings, QemuSourceConfig, preface
from migrated.guests.qemu_process import STATE_STREAM, QemuProcess
from migrated.guests.qemu_relay import StateRelay
from migrated.guests.qmp import Monitor
from migrated.guests.residence import residences
from migrated.memory.maps import areas, mapped_elsewhere, open_area

#: Run states of a guest that can be moved; all but the first are moved paused.
_MOVABLE = frozenset({"running", "paused", "prelaunch"})
#: Statuses of a QEMU migration that is over (or never was).
_IDLE = frozenset({"none", "completed", "failed", "cancelled"})
_TRANSIENT = frozenset({"finish-migrate", "save-vm", "restore-vm", "debug"})


class QemuSource(SourceGuest):
    """See `SourceGuest`."""

    def __init__(self, name: str, config: QemuSourceConfig, run_dir: Path, timeouts: Timeouts) -> None:
        self.name = name
        self._config = config
        self._run_dir = run_dir
        self._timeouts = timeouts
        self.qemu = QemuProcess(name, Path(config.qmp))
        self._memory: SourceMemory | None = None
        self._fds: list[int] = []
        self._settings: MigrationSettings | None = None
        self._relay: StateRelay | None = None
        self._runs = True  # whether the guest's owner wants it to run
        self._quiesced_at: float | None = None
        self._pins_buffers = True
        self.paused_at = None

    # ------------------------------------------------------------ inspection

    async def open(self) -> SourceMemory:
        monitor = await self._attach()
        await self._refuse_unmovable(monitor)
        return await self._inspect(monitor)

    async def reopen(self) -> SourceMemory:
        """`open` for an agent that was restarted in the middle of a migration, and knows from its journal where it stood.

        The guest may be in any state: paused at pre-switchover (then `resume` brings it back) or given up (then its memory
        is served on, and `release` ends it).  Which of the two is for the journal to say, never for the guest's looks.
        """
        memory = await self._inspect(await self._attach())
        await self._clear_left_tracking()
        return memory

    async def _attach(self) -> Monitor:
        monitor = await self.qemu.connect()
        self._settings = MigrationSettings(monitor)
        return monitor

    async def _inspect(self, monitor: Monitor) -> SourceMemory:
        pid = self.qemu.handle.pid
        found = await qemu_memory.backends(monitor)
        qemu_memory.refuse_private(self.name, found)
        placed = await qemu_memory.place(monitor, pid, found)
        keys = frozenset(area.key for item in placed for area in item.areas)
        for other in await asyncio.to_thread(mapped_elsewhere, keys, (pid,)):
            raise GuestRefusedError(
                f"guest {self.name}: its memory is also mapped by {other}, whose writes cannot be seen",
                code="memory-mapped-elsewhere",
                hint="detach that process (a vhost-user back end, a debugger) first",
            )
        self._pins_buffers = await qemu_memory.disks_pin_buffers(monitor, pid)
        self._fds.extend(open_area(pid, item.areas[0]) for item in placed)
        self._memory = SourceMemory(
            pid=pid,
            regions=tuple(
                qemu_memory.region(self.name, item.backend, fd) for item, fd in zip(placed, self._fds, strict=True)
            ),
            mappings=tuple(mapping for index, item in enumerate(placed) for mapping in item.mappings(index)),
            memory_fds=tuple(self._fds),
            file_offsets=tuple(item.file_offset for item in placed),
        )
        return self._memory

    async def _refuse_unmovable(self, monitor: Monitor) -> None:
        status = await monitor.status()
        report = await monitor.migration()
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
                hint="only a running or a paused guest can be moved"
                if status != "postmigrate"
                else "it has been moved away already; `cont` would run it here again",
            )
        self._runs = status == "running"
        devices = qemu_memory.passed_through_devices(self.qemu.handle.pid)
        if devices:
            raise GuestRefusedError(
                f"guest {self.name} has a passed-through device ({', '.join(devices)}), whose writes cannot be seen",
                code="passed-through-device",
                hint="unplug the device (device_del) for the time of the move",
            )
        if reasons := report.get("blocked-reasons"):
            raise GuestRefusedError(
                f"guest {self.name} cannot be migrated, says QEMU: {'; '.join(reasons)}", code="migration-blocked"
            )

    @property
    def needs_quiesced_scans(self) -> bool:
        return self._pins_buffers

    # ------------------------------------------------------------ tracking

    async def tracking_uffd(self) -> int:
        uffd = self.qemu.uffd
        if uffd is None:
            monitor = await self.qemu.monitor()
            await self._clear_left_tracking()
            uffd = await self.qemu.open_uffd(monitor, faults=False)
        return uffd.fd

    @property
    def injection_stopped_seconds(self) -> float | None:
        """How long QEMU's main thread stood still for the injection."""
        return None if self.qemu.uffd is None else self.qemu.uffd.stopped_seconds

    async def _clear_left_tracking(self) -> None:
        """An agent that died in pre-copy left its userfaultfd in the guest, and one mapping takes only one."""
        left = injection.userfaultfds(self.qemu.handle.pid)
        if not left or self._memory is None:
            return
        starts = {mapping.address for mapping in self._memory.mappings}
        keys = frozenset(area.key for area in areas(self.qemu.handle.pid) if area.start in starts)
        states = await asyncio.to_thread(residences, self.qemu.handle.pid, keys)
        flags = frozenset(flag for state in states for flag in state.flags)
        if flags & {"um", "ui"}:
            raise GuestRefusedError(
                f"guest {self.name}: some of its memory may still be on its way from another host",
                code="guest-migrating",
                hint="wait until the migration that brought it here is completed",
            )
        if "uw" in flags:
            for number in left:
                await injection.close_remote(self.qemu.handle, number)

    async def release_tracking(self) -> None:
        await self.qemu.close_uffd()

    # ------------------------------------------------------------ stopping

    async def quiesce(self) -> None:
        monitor = await self.qemu.monitor()
        status = await monitor.status()
        self._runs = status == "running"
        if self._runs:
            self._quiesced_at = time.monotonic()
            await monitor.execute("stop", limit=self._timeouts.guest_pause)

    async def unquiesce(self) -> None:
        if self._quiesced_at is not None:
            monitor = await self.qemu.monitor()
            await monitor.execute("cont", limit=self._timeouts.guest_pause)
            self._quiesced_at = None

    async def pause(self, channel: StateChannel) -> None:
        monitor = await self.qemu.monitor()
        if self._quiesced_at is None:
            self._runs = await monitor.status() == "running"
        if self._settings is None:
            self._settings = MigrationSettings(monitor)
        await self._settings.apply(SOURCE_CAPABILITIES, SOURCE_PARAMETERS)
        await channel.write(preface(runs=self._runs))
        monitor.forget_events()
        self._relay = await StateRelay.open(monitor, STATE_STREAM, channel)
        await monitor.execute("migrate", {"uri": f"fd:{STATE_STREAM}"})
        try:
            await self._relay.guard(
                monitor.wait_migration(
                    frozenset({"pre-switchover"}), limit=self._timeouts.guest_pause, what="pausing the guest"
                )
            )
        finally:
            self.paused_at = monitor.stopped_at or self._quiesced_at or time.monotonic()

    async def send_state(self, channel: StateChannel) -> None:
        del channel  # the relay has it since `pause`
        monitor, relay = await self.qemu.monitor(), self._relay
        if relay is None:
            raise GuestError(f"guest {self.name} is not paused", code="guest-not-paused")
        await monitor.execute("migrate-continue", {"state": "pre-switchover"})
        limit = self._timeouts.guest_state
        await relay.guard(
            monitor.wait_migration(frozenset({"completed"}), limit=limit, what="handing over the device state")
        )
        await relay.sent(limit)

    # ------------------------------------------------------------ the end

    async def resume(self) -> None:
        try:
            monitor = await self.qemu.monitor()
            await self._cancel(monitor)
            limit = self._timeouts.guest_pause
            status = await monitor.wait_status(_TRANSIENT, limit=limit)
            if self._runs and status != "running":
                await monitor.execute("cont", limit=limit)
                status = await monitor.wait_status(_TRANSIENT, limit=limit)
                if status != "running":
                    raise GuestError(
                        f"guest {self.name}: QEMU does not run on, its run state is {status}", code="guest-not-resumed"
                    )
            self._quiesced_at = None
            if self._settings is not None:
                await self._settings.restore(monitor)
        finally:
            await self._end_relay()

    async def _cancel(self, monitor: Monitor) -> None:
        status = str((await monitor.migration()).get("status", "none"))
        if status in _IDLE:
            return
        with contextlib.suppress(GuestError):  # it may end by itself in between
            await monitor.execute("migrate_cancel")
        # A stream nobody reads would keep QEMU from noticing.
        await self._end_relay()
        await monitor.wait_migration(_IDLE, limit=self._timeouts.guest_pause, what="cancelling QEMU's migration")

    async def _end_relay(self) -> None:
        relay, self._relay = self._relay, None
        if relay is not None:
            await relay.close()

    async def release(self) -> None:
        await self._end_relay()
        process = self.qemu.handle
        if process.poll() is not None:
            return
        if self._config.on_release == "keep":
            if self._settings is not None:
                await self._settings.restore(await self.qemu.monitor())
            return
        with contextlib.suppress(MigratedError):
            await (await self.qemu.monitor()).execute("quit")
        try:
            await process.wait(self._timeouts.release)
        except TimeoutExceededError:
            # The guest runs elsewhere: what is left here must not.
            await process.kill(self._timeouts.release)

    def memento(self) -> Memento:
        return {"runs": self._runs}

    async def reclaim(self, memento: Memento) -> None:
        await self.reopen()
        self._runs = bool(memento.get("runs", True))
        await self.resume()
        await MigrationSettings(await self.qemu.monitor()).undo_unknown()

    async def adopt(self, pid: int, memento: Memento) -> None:
        del memento  # what it was is of no use any more
        self.qemu.adopt(PidHandle.attach(pid))

    async def close(self) -> None:
        await self._end_relay()
        while self._fds:
            os.close(self._fds.pop())
        await self.qemu.close()

    async def died(self) -> str:
        return await self.qemu.handle.died()
