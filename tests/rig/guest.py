"""A self-checking QEMU guest that migrates between two hosts.

It verifies all of its memory after every migration.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import ctypes
import dataclasses
import os
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from migrated.demo.console import GuestConsole, Load
from migrated.demo.pair import short_directory
from migrated.demo.qemu_guest import QemuGuest, RunningQemu
from migrated.demo.run import cache_directory
from migrated.guests.qemu.memory import locate_blocks, ram_blocks
from migrated.guests.qemu.qmp import Monitor
from migrated.memory.maps import areas
from migrated.waiting import within
from tests.rig import supervisor, traces
from tests.rig.host import Host

MIB = 1 << 20
NAME = "vm"
VIDEO_NOISE_BYTES = 15 * MIB
_PROCESS_MADVISE = 440
_MADV_PAGEOUT = 21
MOVE_SECONDS = 90.0
GONE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """A finished migration: the records of both sides."""

    source: dict[str, Any]
    target: dict[str, Any]


class OnTheMove(abc.ABC):
    """A self-checking guest, currently on ``hosts[at]``, whatever manages its QEMU."""

    def __init__(self, name: str, hosts: tuple[Host, Host], directory: Path, memory_bytes: int) -> None:
        self.name = name
        self.hosts = hosts
        self.at = 0
        self.directory = directory
        self.memory_bytes = memory_bytes
        self.expected: set[str] = set()  # events that an agent may log as errors in this test

    @property
    @abc.abstractmethod
    def console(self) -> GuestConsole:
        """The guest's serial console, on its current host."""

    @property
    @abc.abstractmethod
    def next_console(self) -> Path:
        """The console's socket on the other host."""

    @property
    def here(self) -> Host:
        """The host on which the guest runs."""
        return self.hosts[self.at]

    @property
    def there(self) -> Host:
        """The host to which the guest would migrate next."""
        return self.hosts[1 - self.at]

    @property
    def pids(self) -> list[int]:
        """The guest's QEMU processes on both hosts: one, except during a migration."""
        return traces.qemus(self.directory)

    # ------------------------------------------------------------ moves

    async def begin(self, **options: Any) -> str:
        """Start a migration to the other host, and return its id."""
        await self.there.target()
        body = {"guest": self.name, "to": self.there.address, **options}
        return str((await (await self.here.source()).request("POST", "/v1/migrations", body))["id"])

    async def arrive(self, migration: str, limit_seconds: float = MOVE_SECONDS) -> Move:
        """Wait until an active migration has completed, and follow the guest to its new console."""
        source, target = await self.here.source(), await self.there.target()
        attach = asyncio.ensure_future(self.console.attach(self.next_console, limit_seconds))
        try:
            record = await source.wait(migration, limit_seconds=limit_seconds)
            assert record["state"] == "completed", self.explain(record)
            other = await target.wait(migration, limit_seconds=limit_seconds)
            assert other["state"] == "completed", self.explain(other)
            await attach
        finally:
            attach.cancel()
        self.at = 1 - self.at
        await self.alone()
        return Move(record, other)

    async def move(self, *, limit_seconds: float = MOVE_SECONDS, **options: Any) -> Move:
        """Migrate the guest once, and verify its memory on arrival."""
        before = await self.console.stats()
        migration = await self.begin(**options)
        move = await self.arrive(migration, limit_seconds)
        await self.assert_sound(before)
        return move

    async def fail(self, *, limit_seconds: float = MOVE_SECONDS, **options: Any) -> dict[str, Any]:
        """Run a migration that must fail, and return the source's record.  The guest must keep running here, undisturbed."""
        before = await self.console.stats()
        migration = await self.begin(**options)
        record = await (await self.here.source()).wait(migration, limit_seconds=limit_seconds)
        assert record["state"] in {"failed", "aborted"}, record
        await self.alone()
        await self.assert_sound(before)
        return record

    # ------------------------------------------------------------ what must be true

    async def assert_sound(self, since: Load) -> None:
        """Assert that the guest has run since ``since``, and that every block of its memory holds what it wrote."""
        swept = await self.console.sweep()
        after = await self.console.stats()
        assert (swept.wrong, swept.errors, after.errors, self.console.corrupt) == (0, 0, 0, [])
        assert swept.blocks * 4096 > self.memory_bytes // 4
        assert after.operations > since.operations
        assert after.seconds > since.seconds

    async def alone(self) -> None:
        """Wait until only one QEMU is left, and assert that it holds no userfaultfd."""
        async with within(GONE_SECONDS, "the other QEMU to exit"):
            while len(self.pids) != 1:  # noqa: ASYNC110 - nothing reports the exit of these processes
                await asyncio.sleep(0.02)
        (pid,) = self.pids
        assert traces.userfaultfds(pid) == []

    def explain(self, record: dict[str, Any]) -> str:
        """Format an unexpected record with the last log lines of all agents."""
        told = [f"{record['role']}: {record['state']} {record.get('error')}"]
        for host in self.hosts:
            for role in ("source", "target"):
                told += [f"{host.name} {role}: {event}" for event in host.events(role)[-8:]]
        return "\n".join(told)

    async def stop_agents(self) -> None:
        """Stop the agents."""
        for host in self.hosts:
            await host.stop()

    def assert_no_complaints(self) -> None:
        """Assert that the agents have logged no error but those expected."""
        told = [event for host in self.hosts for event in host.complaints()]
        complaints = [event for event in told if event["event"] not in self.expected]
        assert not complaints, "\n".join(str(event.get("exception", event)) for event in complaints)


class MovingGuest(OnTheMove):
    """The guest, currently on ``hosts[at]``.  Created by `moving_guest`."""

    def __init__(self, guest: QemuGuest, hosts: tuple[Host, Host], page_bytes: tuple[int, int]) -> None:
        first = hosts[0]
        # The path where the agent would put the monitor of an incoming guest.  The first host's source agent then finds
        # the guest at one path, whether it was started here or migrated back.
        self.guest = dataclasses.replace(guest, qmp=first.qmp(guest.name))
        super().__init__(guest.name, hosts, guest.directory, guest.memory_bytes)
        self.qemu = RunningQemu(self.guest)
        self._noise = b""
        for index, (host, pages) in enumerate(zip(hosts, page_bytes, strict=True)):
            host.source_guests[self.name] = self.guest.source_table(host.qmp(self.name))
            host.target_guests[self.name] = dataclasses.replace(guest, target_page_bytes=pages).target_table(index)

    @property
    def console(self) -> GuestConsole:
        return self.qemu.console

    @property
    def next_console(self) -> Path:
        return self.guest.target_serial(1 - self.at)

    async def start(self) -> None:
        """Boot the guest on the first host."""
        self.here.qmp(self.name).parent.mkdir(parents=True)
        await self.qemu.start(prefix=self.here.prefix)

    # ------------------------------------------------------------ video memory

    async def fill_video_memory(self) -> None:
        """Fill the frame buffer with noise, except its first MiB."""
        self._noise = await fill_video_memory(self.name, self.here.qmp(self.name))

    async def assert_video_memory(self) -> None:
        """Assert that the frame buffer still holds the noise."""
        fd, address = await _open_video_memory(self.name, self.here.qmp(self.name))
        try:
            assert os.pread(fd, len(self._noise), address) == self._noise
        finally:
            os.close(fd)

    def swap_out(self) -> int:
        """Have the kernel swap out QEMU's private memory (process_madvise), and return the number of bytes on swap."""
        (pid,) = self.pids
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(pid)
        try:
            for area in areas(pid):
                if not area.shared and area.length_bytes >= MIB and area.permissions.startswith("rw"):
                    piece = struct.pack("QQ", area.start, area.length_bytes)
                    libc.syscall(_PROCESS_MADVISE, pidfd, piece, 1, _MADV_PAGEOUT, 0)
        finally:
            os.close(pidfd)
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmSwap:")[2].split()[0]) * 1024

    async def stop(self) -> None:
        """Stop agents and guest, and assert that the agents logged no errors."""
        try:
            await self.stop_agents()
        finally:
            await self.qemu.stop()
            traces.end_processes(self.guest.directory)
        self.assert_no_complaints()


async def _open_video_memory(name: str, qmp: Path) -> tuple[int, int]:
    """Open ``/proc/PID/mem`` of QEMU; return it with the address of the frame buffer's second MiB, where no text is written."""
    monitor = await Monitor.connect(name, qmp)
    try:
        pid = monitor.peer_pid()
        blocks = [block for block in await ram_blocks(monitor) if block.name.endswith("vga.vram")]
        (located,) = await locate_blocks(monitor, pid, blocks)
    finally:
        await monitor.close()
    return os.open(f"/proc/{pid}/mem", os.O_RDWR), located.address + MIB


async def fill_video_memory(name: str, qmp: Path) -> bytes:
    """Fill the frame buffer of a guest with VGA with noise, except its first MiB, and return the noise."""
    fd, address = await _open_video_memory(name, qmp)
    noise = os.urandom(VIDEO_NOISE_BYTES)
    try:
        assert os.pwrite(fd, noise, address) == len(noise)
    finally:
        os.close(fd)
    return noise


@contextlib.asynccontextmanager
async def moving_guest(
    *,
    page_bytes: tuple[int, int] = (2 * MIB, 2 * MIB),
    hosts: Sequence[dict[str, Any]] = ({}, {}),
    config: dict[str, Any] | None = None,
    **guest: Any,
) -> AsyncIterator[MovingGuest]:
    """Boot a guest on the first of two hosts.

    ``guest`` holds fields of `QemuGuest`.  ``page_bytes`` and ``hosts`` (arguments of `Host`) are for the first and the
    second host.  ``config`` holds configuration sections for all agents.
    """
    with supervisor.directory("mgt-", short_directory()) as directory:
        options = {"name": NAME, "memory_bytes": 128 * MIB, "cache": cache_directory(), **guest}
        where = tuple(
            Host(directory, name, **{"config": config, **arguments})
            for name, arguments in zip("ab", hosts, strict=True)
        )
        moving = MovingGuest(
            QemuGuest(directory=directory, page_bytes=page_bytes[0], **options), (where[0], where[1]), page_bytes
        )
        try:
            await moving.start()
            yield moving
        finally:
            await moving.stop()
