"""The qemu driver against real QEMU processes: inspection, refusals, injection, and a whole move between two of them.

The memory is copied here by the test itself, at once and while the guest is paused: what is proven is the driver's order of
things, not the data plane.
"""

# Nothing else runs in these loops: reading /proc for a moment blocks nobody.
# ruff: noqa: ASYNC220, ASYNC221, ASYNC230, ASYNC240

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import mmap
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.console import GuestConsole
from migrated.demo.images import build_bootsector
from migrated.demo.qemu_guest import QEMU
from migrated.errors import ConfigError, GuestError, GuestRefusedError, MigratedError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.driver import FaultSource
from migrated.guests.qemu import source as qemu_source
from migrated.guests.qemu.command import check_command
from migrated.guests.qemu.config import Description, QemuSourceConfig, QemuTargetConfig
from migrated.guests.qemu.qmp import Monitor
from migrated.guests.qemu.source import QemuSource
from migrated.guests.qemu.target import QemuTarget
from migrated.memory import memfd as memory_memfd
from migrated.memory.native import uffd_register, uffd_unregister
from migrated.memory.regions import Region, SourceMemory, TargetMemory
from migrated.memory.smaps import mapped_areas
from migrated.privileged import open_files
from migrated.settings import Timeouts, read

MIB = 1 << 20
TIMEOUTS = Timeouts()

pytestmark = [
    pytest.mark.root,
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="reaching into another process needs root"),
]


class Pipe:
    """Both ends of a `StateChannel`, in this process."""

    def __init__(self, incoming: asyncio.Queue[bytes], outgoing: asyncio.Queue[bytes]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.cut = False

    @classmethod
    def pair(cls) -> tuple[Pipe, Pipe]:
        one: asyncio.Queue[bytes] = asyncio.Queue(64)
        two: asyncio.Queue[bytes] = asyncio.Queue(64)
        return cls(one, two), cls(two, one)

    async def read(self) -> bytes:
        return await self._incoming.get()

    async def write(self, data: bytes) -> None:
        await self._outgoing.put(data)

    async def close_write(self) -> None:
        await self._outgoing.put(b"")


class Qemu:
    """A QEMU started as a user would, `-qmp` on a socket of its own."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.qmp = folder / f"{name}.user.qmp"
        self.log = folder / f"{name}.user.log"
        command = [
            *(QEMU, "-nodefaults", "-display", "none", "-vga", "none", *arguments),
            *("-qmp", f"unix:{self.qmp},server=on,wait=off"),
        ]
        self.process = PidHandle.spawn(command, pass_fds=[], log=self.log)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def up(self) -> Qemu:
        async with asyncio.timeout(20):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                try:
                    await (await Monitor.connect("probe", self.qmp)).close()
                except GuestError as error:
                    if error.code != "qmp-unreachable":
                        raise
                    await asyncio.sleep(0.02)
                else:
                    return self

    def source(self, folder: Path, **options: str) -> QemuSource:
        table = {"driver": "qemu", "qmp": str(self.qmp), **options}
        return QemuSource("vm", read(QemuSourceConfig, table, "vm"), TIMEOUTS)

    async def status(self) -> str:
        monitor = await Monitor.connect("probe", self.qmp)
        try:
            return await monitor.status()
        finally:
            await monitor.close()

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        monitor = await Monitor.connect("probe", self.qmp)
        try:
            return await monitor.execute(command, arguments)
        finally:
            await monitor.close()


StartQemu = Callable[..., Awaitable[Qemu]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[StartQemu]:
    """Start a QEMU and wait for its monitor; all are ended with the test."""
    started: list[Qemu] = []

    async def go(*arguments: str) -> Qemu:
        qemu = Qemu(tmp_path, f"vm{len(started)}", *arguments)
        started.append(qemu)
        return await qemu.up()

    yield go
    for qemu in started:
        await qemu.process.kill(10)
        qemu.process.close()


def memory(size: str = "64M", kind: str = "memory-backend-memfd", name: str = "ram", **options: str) -> list[str]:
    extra = "".join(f",{key.replace('_', '-')}={value}" for key, value in {"share": "on", **options}.items())
    return ["-m", size, "-object", f"{kind},id={name},size={size}{extra}", "-machine", f"q35,memory-backend={name}"]


async def refused(source: QemuSource) -> GuestError:
    """The refusal of `open`."""
    try:
        with pytest.raises(GuestError) as caught:
            await source.open()
    finally:
        await source.close()
    assert "vm" in caught.value.message
    return caught.value


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("table", "kind", "says"),
    [
        ({"driver": "qemu"}, QemuSourceConfig, "qmp"),
        ({"driver": "qemu", "qmp": "relative"}, QemuSourceConfig, "absolute"),
        ({"driver": "qemu", "qmp": "/a", "speed": 1}, QemuSourceConfig, "speed"),
        ({"driver": "qemu", "qmp": "/a", "on_release": "explode"}, QemuSourceConfig, "on_release"),
        ({"driver": "qemu", "command": []}, QemuTargetConfig, "command"),
    ],
)
def test_a_wrong_configuration_is_refused_by_key(table: dict[str, object], kind: type, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(kind, table, "vm")


# ---------------------------------------------------------------- inspection


def ram_of(found: SourceMemory) -> int:
    """Index of the region that is the guest's RAM."""
    return [region.device for region in found.regions].index(False)


async def firmware_copied(found: SourceMemory) -> None:
    """Wait until the firmware has copied itself below 1 MiB, which is among the first things it does."""
    ram = ram_of(found)
    async with asyncio.timeout(20):
        while not any(os.pread(found.memory_fds[ram], 0x10000, found.file_offsets[ram] + 0xF0000)):  # noqa: ASYNC110 - memory tells nobody
            await asyncio.sleep(0.01)


async def test_a_guest_is_inspected_without_being_touched(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    source = qemu.source(tmp_path)
    try:
        found = await source.open()
        assert found.pid == qemu.pid
        ram = ram_of(found)
        assert found.regions[ram] == Region("ram", 64 * MIB, 4096)
        assert not found.private[ram]
        assert [(m.offset, m.length_bytes) for m in found.mappings if m.region == ram] == [(0, 64 * MIB)]
        # The firmware's copy at 0xf0000 is guest memory that a descriptor of ours can read.
        await firmware_copied(found)
        assert not source.needs_quiesced_scans
        description = Description.decode(source.describe())
        assert description.machine.startswith("pc-q35-")
        assert description.backends == ("ram",)
    finally:
        await source.close()
        await source.close()
    assert await qemu.status() == "running"


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "64M", "-machine", "q35"),
        ("-m", "64M", "-machine", "pc", "-vga", "std"),
        memory(kind="memory-backend-ram", share="off"),
        memory(share="off"),
    ],
    ids=["default", "default-vga", "ram", "memfd"],
)
async def test_private_memory_is_found_block_by_block(
    start: StartQemu, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    qemu = await start(*arguments)
    source = qemu.source(tmp_path)
    try:
        found = await source.open()
        assert all(found.private)
        ram = ram_of(found)
        assert found.regions[ram].size_bytes == 64 * MIB
        vga = [region.size_bytes for region in found.regions if region.name.endswith("vga.vram")]
        assert vga == ([16 * MIB] if "std" in arguments else [])
        # QEMU itself says what the guest has in the firmware and in its copy below 1 MiB, which the firmware still writes.
        await firmware_copied(found)
        monitor = await source.qemu.monitor()
        await monitor.execute("stop")
        saved = tmp_path / "saved"
        await monitor.execute("pmemsave", {"val": 0xF0000, "size": 0x10000, "filename": str(saved)})
        assert os.pread(found.memory_fds[ram], 0x10000, found.file_offsets[ram] + 0xF0000) == saved.read_bytes()
        bios = [region.name for region in found.regions].index("pc.bios")
        await monitor.execute("pmemsave", {"val": 0xFFFC0000, "size": 0x40000, "filename": str(saved)})
        assert os.pread(found.memory_fds[bios], 0x40000, found.file_offsets[bios]) == saved.read_bytes()
    finally:
        await source.close()


async def test_two_numa_nodes_of_one_size_are_told_apart(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(
        *("-m", "64M", "-object", "memory-backend-memfd,id=near,size=32M,share=on"),
        *("-object", "memory-backend-memfd,id=unused,size=32M,share=on"),
        *("-object", "memory-backend-memfd,id=far,size=32M,share=on"),
        *("-numa", "node,memdev=near", "-numa", "node,memdev=far", "-S"),
    )
    # What the guest has at 0 and at 32 MiB, written by QEMU itself into the files: no reading of maps could be wrong alike.
    source = qemu.source(tmp_path)
    try:
        found = await source.open()
        names = [region.name for region in found.regions]
        assert "unused" not in names
        for place, region in ((0x2000000, names.index("far")), (0, names.index("near"))):
            saved = tmp_path / f"saved{region}"
            with Path(f"/proc/{qemu.pid}/mem").open("r+b", buffering=0) as process:
                process.seek(found.mappings[region].address + 0x1000)
                process.write(f"region {region}".encode())
            monitor = await source.qemu.monitor()
            await monitor.execute("pmemsave", {"val": place + 0x1000, "size": 8, "filename": str(saved)})
            assert saved.read_bytes() == f"region {region}".encode()
            assert os.pread(found.memory_fds[region], 8, found.file_offsets[region] + 0x1000) == saved.read_bytes()
    finally:
        await source.close()


async def test_memory_in_a_disk_file_is_refused(start: StartQemu) -> None:
    folder = Path("/var/tmp") / f"migrated-test-{os.getpid()}"
    folder.mkdir()
    try:
        if subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip() == "tmpfs":
            pytest.skip("/var/tmp is a tmpfs")
        qemu = await start(*memory(kind="memory-backend-file", mem_path=str(folder / "ram")))
        assert (await refused(qemu.source(folder))).code == "memory-unsupported"
    finally:
        shutil.rmtree(folder)


async def test_memory_that_another_process_maps_is_refused_with_its_name(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    source = qemu.source(tmp_path)
    found = await source.open()
    fd = found.memory_fds[ram_of(found)]
    code = "import mmap,sys; m = mmap.mmap(0, 4096, prot=mmap.PROT_READ); print('mapped', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code.replace("mmap(0,", f"mmap({fd},")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[fd],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mapped\n"
        await source.close()
        error = await refused(qemu.source(tmp_path))
        assert error.code == "memory-mapped-elsewhere"
        assert str(other.pid) in error.message
        assert "python" in error.message
        other.communicate(timeout=10)


async def test_nobody_on_the_qmp_socket_is_named(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    await qemu.process.kill(10)
    assert (await refused(qemu.source(tmp_path))).code == "qmp-unreachable"
    qemu.qmp.unlink(missing_ok=True)
    assert (await refused(qemu.source(tmp_path))).code == "qmp-unreachable"


async def test_a_monitor_in_use_is_busy_not_dead(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    monitor = await Monitor.connect("other", qemu.qmp)
    try:
        assert (await refused(qemu.source(tmp_path))).code == "qmp-busy"
    finally:
        await monitor.close()
    source = qemu.source(tmp_path)
    await source.open()
    await source.close()


async def test_a_socket_opened_by_a_manager_still_leads_to_qemu(tmp_path: Path) -> None:
    path = tmp_path / "managed.qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        process = PidHandle.spawn(
            [
                *(QEMU, "-nodefaults", "-display", "none", "-vga", "none", *memory()),
                *("-chardev", f"socket,id=mon,fd={fd},server=on,wait=off", "-mon", "chardev=mon,mode=control"),
            ],
            pass_fds=[fd],
            log=tmp_path / "log",
        )
        try:
            monitor = await Monitor.connect("vm", path, greeting_seconds=20)
            assert monitor.peer_pid() == process.pid
            await monitor.close()
        finally:
            await process.kill(10)
            process.close()


async def test_a_guest_in_a_migration_is_refused(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    await qemu.execute("migrate-set-parameters", {"max-bandwidth": 4096})
    await qemu.execute("migrate", {"uri": "exec:sleep 600"})
    assert (await refused(qemu.source(tmp_path))).code == "guest-migrating"
    await qemu.execute("migrate_cancel")


async def test_a_guest_that_has_not_arrived_is_refused(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory(), "-incoming", "defer", "-S")
    assert (await refused(qemu.source(tmp_path))).code == "guest-incoming"


NULL_DISKS = (
    *("-blockdev", "null-co,node-name=disk,size=1073741824,read-zeroes=on"),
    *("-blockdev", "null-co,node-name=copy,size=1073741824,read-zeroes=on"),
)


async def test_a_guest_with_a_job_at_work_is_refused_until_it_has_ended(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory(), *NULL_DISKS)
    backup = {"job-id": "nightly", "device": "disk", "target": "copy", "sync": "full", "speed": 1}
    await qemu.execute("blockdev-backup", backup)
    error = await refused(qemu.source(tmp_path))
    assert (error.code, "nightly (backup)" in error.message) == ("job-running", True)
    await qemu.execute("block-job-cancel", {"device": "nightly", "force": True})
    async with asyncio.timeout(20):
        while await qemu.execute("query-jobs"):  # noqa: ASYNC110 - asked with a session of its own each time
            await asyncio.sleep(0.05)
    source = qemu.source(tmp_path)
    await source.open()
    await source.close()


async def test_a_guest_with_dirty_bitmaps_is_refused(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory(), *NULL_DISKS)
    await qemu.execute("block-dirty-bitmap-add", {"node": "disk", "name": "since-monday"})
    error = await refused(qemu.source(tmp_path))
    assert (error.code, "since-monday of disk" in error.message) == ("dirty-bitmaps", True)


async def test_a_guest_with_virtio_mem_is_refused(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(
        *("-machine", "q35", "-m", "64M,slots=1,maxmem=1G", "-object", "memory-backend-ram,id=more,size=128M"),
        *("-device", "virtio-mem-pci,id=elastic,memdev=more,requested-size=0"),
    )
    error = await refused(qemu.source(tmp_path))
    assert (error.code, "elastic" in error.message) == ("unsupported-device", True)


async def test_more_blocks_than_can_travel_are_refused(
    start: StartQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_source, "MAX_REGIONS", 1)
    error = await refused((await start(*memory())).source(tmp_path))
    assert (error.code, "of which 1 can be migrated" in error.message) == ("too-many-blocks", True)


async def test_a_hot_plugged_dimm_is_found(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start("-machine", "q35", "-m", "64M,slots=1,maxmem=1G")
    await qemu.execute("object-add", {"qom-type": "memory-backend-ram", "id": "dimm0", "size": 32 * MIB})
    await qemu.execute("device_add", {"driver": "pc-dimm", "id": "d0", "memdev": "dimm0"})
    source = qemu.source(tmp_path)
    found = await source.open()
    await source.close()
    dimms = [region for region in found.regions if region.name == "dimm0"]
    assert dimms == [Region("dimm0", 32 * MIB, 4096)]


async def test_a_disk_with_direct_io_asks_for_quiesced_scans(start: StartQemu) -> None:
    folder = Path("/var/tmp") / f"migrated-test-{os.getpid()}"
    folder.mkdir()
    try:
        disk = folder / "disk"
        with disk.open("wb") as file:
            file.truncate(MIB)
        drive = f"file={disk},format=raw,if=virtio,cache=none"
        qemu = await start(*memory(), "-drive", drive)
        source = qemu.source(folder)
        await source.open()
        assert source.needs_quiesced_scans
        await source.close()
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- injection


async def test_a_userfaultfd_comes_and_goes_without_a_trace(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    source = qemu.source(tmp_path)
    await source.open()
    session = await source.qemu.monitor()
    try:
        for _ in range(3):
            before = open_files(qemu.pid).keys()
            uffd = await source.tracking_uffd()
            assert await source.tracking_uffd() == uffd
            assert len(injection.userfaultfds(qemu.pid)) == 1
            assert source.qemu.uffd is not None
            await source.release_tracking()
            await source.release_tracking()
            assert open_files(qemu.pid).keys() == before
        assert await source.qemu.monitor() is session
        await source.tracking_uffd()
        await qemu.process.kill(10)
        await source.release_tracking()
        assert await source.died()
    finally:
        await source.close()


async def test_tracking_left_by_an_agent_that_died_is_replaced(
    start: StartQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked_at_close: list[frozenset[str]] = []
    real = injection.remote_syscall

    def remote_syscall(process: PidHandle, number: int, *arguments: int) -> tuple[int, float]:
        if number == 3:  # close(2) on x86-64
            area = (mapping.address, mapping.address + mapping.length_bytes)
            tracked_at_close.extend(state.flags & {"uw"} for state in mapped_areas(process.pid, [area]))
        return real(process, number, *arguments)

    qemu = await start(*memory())
    dead = qemu.source(tmp_path)
    found = await dead.open()
    mapping = found.mappings[ram_of(found)]
    uffd_register(
        await dead.tracking_uffd(), mapping.address, mapping.length_bytes, missing=False, minor=False, tracking=True
    )
    await dead.close()
    monkeypatch.setattr(injection, "remote_syscall", remote_syscall)
    source = qemu.source(tmp_path)
    try:
        await source.open()
        uffd = await source.tracking_uffd()
        # Unregistered step by step before that: closing alone would hold the guest's mmap_lock for all of it at once.
        assert tracked_at_close
        assert not any(tracked_at_close)
        uffd_register(uffd, mapping.address, mapping.length_bytes, missing=False, minor=False, tracking=True)
        assert len(injection.userfaultfds(qemu.pid)) == 1
        await source.release_tracking()
        assert not injection.userfaultfds(qemu.pid)
    finally:
        await source.close()
    assert await qemu.status() == "running"


async def test_a_guest_still_on_its_way_here_is_not_moved_on(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    source = qemu.source(tmp_path)
    found = await source.open()
    mapping = found.mappings[ram_of(found)]
    process = PidHandle.attach(qemu.pid)
    uffd = await injection.open_uffd(process, faults=True, tracking=True, send_descriptor=None)
    try:
        uffd_register(uffd.fd, mapping.address, mapping.length_bytes, missing=True, minor=True, tracking=True)
        with pytest.raises(GuestRefusedError) as caught:
            await source.tracking_uffd()
        assert caught.value.code == "guest-migrating"
        assert injection.userfaultfds(qemu.pid) == [uffd.remote_fd]
    finally:
        await source.close()
        await injection.close_uffd(uffd)
        process.close()


async def test_a_process_without_the_right_gets_it_through_the_device(
    start: StartQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not injection.DEVICE.exists():
        pytest.skip("this kernel has no /dev/userfaultfd")
    folder = Path("/var/tmp") / f"migrated-test-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    monkeypatch.chdir(folder)
    try:
        usage = subprocess.run([QEMU, "-help"], capture_output=True, text=True, check=True).stdout
        run_as = ("-run-with", "user=nobody") if "[user=username" in usage else ("-runas", "nobody")
        qemu = Qemu(folder, "nobody", *memory(), *run_as)
        await qemu.up()
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
        source = qemu.source(tmp_path)
        before = len(open_files(qemu.pid))
        await source.open()
        await source.tracking_uffd()
        assert allowed or str(injection.DEVICE) not in open_files(qemu.pid).values()
        assert len(injection.userfaultfds(qemu.pid)) == 1
        await source.release_tracking()
        await source.close()
        assert len(open_files(qemu.pid)) <= before + 1
        await qemu.process.kill(10)
        qemu.process.close()
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- the target


def target_command(*extra: str, size: str = "64M", options: str = "share=on") -> list[str]:
    backend = f"memory-backend-file,id=ram,size={size},{options},mem-path={{memory:ram}}"
    return [
        *(QEMU, "-nodefaults", "-display", "none", "-vga", "none", "-m", size),
        *("-object", backend, "-machine", "q35,memory-backend=ram", *extra),
    ]


def make_target(folder: Path, command: list[str]) -> QemuTarget:
    return QemuTarget("vm", QemuTargetConfig(command=command), folder, TIMEOUTS)


@contextlib.contextmanager
def memfds(regions: tuple[Region, ...], page_bytes: int = 4096) -> Iterator[tuple[TargetMemory, ...]]:
    """Memory for the regions, RAM on pages of ``page_bytes``."""
    pieces: list[TargetMemory] = []
    try:
        for region in regions:
            pages = 4096 if region.device else page_bytes
            fd = memory_memfd.allocate(region.size_bytes, pages, region.name.replace("/", "-"))
            pieces.append(TargetMemory(dataclasses.replace(region, page_bytes=pages), fd))
        yield tuple(pieces)
    finally:
        for piece in pieces:
            os.close(piece.memory_fd)


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What a source says of the guest that `target_command` takes."""

    regions: tuple[Region, ...]
    description: dict[str, Any]


@pytest.fixture
async def theirs(start: StartQemu, tmp_path: Path) -> Theirs:
    qemu = await start(*memory())
    source = qemu.source(tmp_path)
    found = await source.open()
    await source.close()
    return Theirs(found.regions, source.describe())


RAM = (Region("ram", 64 * MIB, 4096),)
THEIRS = {"machine": "pc-q35-0.0", "version": [7, 2, 0], "backends": ["ram"]}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["no-such-program", "{memory:ram}"], "guest-command-missing"),
        (target_command(options="share=off"), "memory-not-shared"),
        (target_command(size="32M"), "regions-differ"),
        ([a.replace("memory:ram", "memory:other") for a in target_command()], "regions-differ"),
        (target_command("-daemonize"), "guest-command"),
        (target_command("-incoming", "tcp::1"), "guest-command"),
    ],
)
async def test_a_command_that_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, command: list[str], code: str
) -> None:
    target = make_target(tmp_path, command)
    with pytest.raises(GuestRefusedError) as caught:
        await target.check(RAM, THEIRS)
    assert caught.value.code == code
    await target.kill()
    await target.close()
    assert not list(tmp_path.iterdir())


def test_memory_that_is_not_to_be_reserved_is_not_reserved_by_qemu_either() -> None:
    with pytest.raises(GuestRefusedError, match="would reserve it"):
        check_command("vm", target_command(), RAM, reserve=False)
    check_command("vm", target_command(options="share=on,reserve=off"), RAM, reserve=False)
    check_command("vm", target_command(options="share=on,reserve=off"), RAM)


async def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    target = make_target(tmp_path, ["no-such-program", "{memory:ram}"])
    with memfds(RAM) as pieces, pytest.raises(GuestError) as caught:
        await target.start(pieces)
    assert caught.value.code == "guest-start"
    await target.kill()
    await target.close()
    assert not list(tmp_path.iterdir())


PREALLOCATING = {
    "untouched": target_command(),
    "prealloc": target_command(options="share=on,prealloc=on"),
    "mem-prealloc": ["/bin/sh", "-c", 'exec "$@" -mem-prealloc', "sh", *target_command()],
    "mem-lock": target_command("-overcommit", "mem-lock=on"),
}


@pytest.mark.parametrize("how", PREALLOCATING)
async def test_a_target_takes_the_faults_of_every_page(tmp_path: Path, theirs: Theirs, how: str) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    target = make_target(folder, PREALLOCATING[how])
    await target.check(theirs.regions, theirs.description)
    with memfds(theirs.regions) as pieces:
        faults = await target.start(pieces)
        try:
            covered = [(m.region, m.offset, m.length_bytes) for m in faults.mappings]
            assert covered == [(index, 0, region.size_bytes) for index, region in enumerate(theirs.regions)]
            states = mapped_areas(faults.pid, [(m.address, m.address + m.length_bytes) for m in faults.mappings])
            assert len(states) == len(faults.mappings)
            for state in states:
                assert state.present_bytes == 0
                assert {"um", "ui", "sh"} <= state.flags
                assert ("lo" in state.flags) == (how == "mem-lock")
            assert injection.userfaultfds(faults.pid)
            with pytest.raises(GuestRefusedError) as caught:
                await make_target(folder, target_command()).check(theirs.regions, theirs.description)
            assert caught.value.code == "guest-exists"
        finally:
            await target.kill()
            await target.kill()
            await target.close()
    assert not list(folder.iterdir())
    assert not Path(f"/proc/{faults.pid}").exists()


CLOSING_WRAPPER = """
import os, sys
for fd in range(3, 256):
    if os.path.exists(f"/proc/self/fd/{fd}") and "pc.bios" in os.readlink(f"/proc/self/fd/{fd}"):
        os.close(fd)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (target_command("-m", "32M", size="32M"), "regions-differ", "67108864 bytes on the source and 33554432 here"),
        (target_command("-vga", "std"), "regions-differ", "vga.vram is here and not on the source"),
        (target_command("-machine", "pc,memory-backend=ram"), "machine-differs", "pc-q35"),
        (target_command("-device", "no-such-device"), "guest-start", "no-such-device"),
        ([sys.executable, "-c", CLOSING_WRAPPER, *target_command()], "guest-command", "has not inherited descriptor"),
    ],
    ids=["size", "device", "machine", "dies", "wrapper"],
)
async def test_what_only_the_running_qemu_shows_is_refused_too(
    tmp_path: Path, theirs: Theirs, command: list[str], code: str, says: str
) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    target = make_target(folder, command)
    with contextlib.suppress(GuestRefusedError):  # what a wrapper script hides from it
        await target.check(theirs.regions, theirs.description)
    with memfds(theirs.regions) as pieces:
        with pytest.raises(GuestError) as caught:
            await target.start(pieces)
        assert caught.value.code == code
        assert says in caught.value.message
        await target.kill()
        await target.close()
    assert not list(folder.iterdir())


# ---------------------------------------------------------------- a whole move


class Move:
    """A checking guest, an incoming QEMU, and the two drivers."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.image = image
        self.huge = False
        self.private = False
        self.extra: tuple[str, ...] = ()  # of the source alone
        self.accelerator = "tcg"
        self.console = GuestConsole()
        self.near, self.far = Pipe.pair()
        self.qemu: Qemu
        self.source: QemuSource
        self.target: QemuTarget
        self.faults: FaultSource
        self.regions: tuple[Region, ...]
        self.loading: asyncio.Task[None]
        self.pieces: tuple[TargetMemory, ...]

    def devices(self, serial: str) -> list[str]:
        return [
            *("-drive", f"format=raw,file={self.image},if=ide,snapshot=off,readonly=off,file.locking=off"),
            *("-serial", f"unix:{self.folder / serial},server=on,wait=off", "-accel", self.accelerator),
        ]

    async def begin(
        self, stack: contextlib.AsyncExitStack, command: list[str] | None = None
    ) -> tuple[TargetMemory, ...]:
        pages = {"hugetlb": "on", "hugetlbsize": "2M"} if self.huge else {}
        ram = ("-m", "64M", "-machine", "q35") if self.private else memory(**pages)
        self.qemu = Qemu(self.folder, "source", *ram, *self.devices("source.serial"), *self.extra)
        stack.callback(self.qemu.process.close)
        stack.push_async_callback(self.qemu.process.kill, 10)
        await self.qemu.up()
        stack.push_async_callback(self.console.close)
        await self.console.attach(self.folder / "source.serial")
        await self.console.wait_booted()
        self.source = self.qemu.source(self.folder)
        stack.push_async_callback(self.source.close)
        found = await self.source.open()
        self.regions = found.regions
        command = command or target_command(*self.devices("target.serial"))
        if self.private:
            command = [
                argument.replace("=ram,", "=pc.ram,").replace("memory:ram", "memory:pc.ram") for argument in command
            ]
            command = [argument.replace("memory-backend=ram", "memory-backend=pc.ram") for argument in command]
        self.target = make_target(self.folder, command)
        stack.push_async_callback(self.target.close)
        stack.push_async_callback(self.target.kill)
        pieces = stack.enter_context(memfds(found.regions, 2 * MIB if self.huge else 4096))
        await self.target.check(found.regions, self.source.describe())
        self.faults = await self.target.start(pieces)
        # However the test lets go of the target, its process ends with the test.
        incoming = PidHandle.attach(self.faults.pid)
        stack.callback(incoming.close)
        stack.push_async_callback(incoming.kill, 10)
        self.loading = asyncio.create_task(self.target.load_state(self.far))
        stack.push_async_callback(self.stop_loading)
        self.pieces = pieces
        return pieces

    async def stop_loading(self) -> None:
        self.loading.cancel()
        await asyncio.gather(self.loading, return_exceptions=True)

    def copy(self, pieces: tuple[TargetMemory, ...]) -> None:
        found = self.source._memory
        assert found is not None
        for piece, fd, start in zip(pieces, found.memory_fds, found.file_offsets, strict=True):
            with mmap.mmap(piece.memory_fd, piece.region.size_bytes) as alias:
                for offset in range(0, piece.region.size_bytes, MIB):
                    data = os.pread(fd, min(MIB, piece.region.size_bytes - offset), start + offset)
                    alias[offset : offset + len(data)] = data

    def free(self) -> None:
        """All memory is in: no fault is to be reported any more."""
        for mapping in self.faults.mappings:
            uffd_unregister(self.faults.uffd, mapping.address, mapping.length_bytes)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bootsector(tmp_path_factory.mktemp("images"), size_bytes=32 * MIB, rate=20000, sweep_seconds=2)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """2 MiB pages for two guests of 64 MiB on top of what the pool has; taken back afterwards."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    more = 2 * 64 // 2
    wanted = int(pool.read_text()) + more
    pool.write_text(str(wanted))
    try:
        if int(pool.read_text()) < wanted:
            pytest.skip("no 2 MiB pages to be had")
        yield
    finally:
        pool.write_text(str(max(0, int(pool.read_text()) - more)))


@pytest.fixture
async def move(tmp_path: Path, image: Path) -> AsyncIterator[tuple[Move, contextlib.AsyncExitStack]]:
    async with contextlib.AsyncExitStack() as stack:
        yield Move(tmp_path, image), stack


async def status_of(side: QemuSource | QemuTarget) -> str:
    return await (await side.qemu.monitor()).status()


async def move_there(it: Move, stack: contextlib.AsyncExitStack) -> None:
    pieces = await it.begin(stack)
    await it.source.pause(it.near)
    assert await status_of(it.source) != "running"
    assert it.source.paused_at is not None
    it.copy(pieces)
    it.free()
    await it.source.send_state(it.near)
    await asyncio.wait_for(it.loading, 30)
    assert it.target.runs
    await it.console.attach(it.folder / "target.serial")
    await it.target.resume()
    await it.target.resume()
    await it.target.release()
    assert not injection.userfaultfds(it.faults.pid)
    assert (await it.console.stats()).errors == 0
    assert await it.console.verified()
    await it.source.release()
    assert it.qemu.process.poll() is not None
    # Our going away changes nothing for the guest.
    await it.target.close()
    assert (await it.console.stats()).errors == 0
    assert await it.console.verified()


async def test_a_guest_moves_between_two_processes(move: tuple[Move, contextlib.AsyncExitStack]) -> None:
    await move_there(*move)


@pytest.mark.hugepages
@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
async def test_a_guest_on_huge_pages_moves(
    move: tuple[Move, contextlib.AsyncExitStack], huge_pages: None, accelerator: str
) -> None:
    if accelerator == "kvm" and not Path("/dev/kvm").exists():
        pytest.skip("no /dev/kvm")
    it, stack = move
    it.huge, it.accelerator = True, accelerator
    await move_there(it, stack)
    assert Region("ram", 64 * MIB, 2 * MIB) in it.regions


async def test_a_guest_on_qemus_default_memory_moves(move: tuple[Move, contextlib.AsyncExitStack]) -> None:
    it, stack = move
    it.private = True
    await move_there(it, stack)
    assert all(piece.region.name == "pc.ram" for piece in it.pieces if not piece.region.device)


async def test_a_guest_its_owner_has_paused_arrives_paused(move: tuple[Move, contextlib.AsyncExitStack]) -> None:
    it, stack = move
    pieces = await it.begin(stack)
    await (await it.source.qemu.monitor()).execute("stop")
    await it.source.pause(it.near)
    it.copy(pieces)
    it.free()
    await it.source.send_state(it.near)
    await asyncio.wait_for(it.loading, 30)
    await it.target.resume()
    assert await status_of(it.target) == "paused"


@pytest.mark.parametrize("stage", ["open", "tracking", "quiesced", "paused", "monitor-lost", "handed-over"])
async def test_a_guest_runs_on_after_a_failure_at_any_stage(
    move: tuple[Move, contextlib.AsyncExitStack], stage: str
) -> None:
    it, stack = move
    pieces = await it.begin(stack)
    await it.source.tracking_uffd()
    if stage == "quiesced":
        await it.source.quiesce()
        assert await status_of(it.source) == "paused"
    if stage in {"paused", "monitor-lost", "handed-over"}:
        await it.source.pause(it.near)
    if stage == "handed-over":
        it.copy(pieces)
        it.free()
        await it.source.send_state(it.near)
        await asyncio.wait_for(it.loading, 30)
    if stage == "monitor-lost":
        await (await it.source.qemu.monitor()).close()
    await it.target.kill()
    await it.source.resume()
    await it.source.resume()
    await it.source.release_tracking()
    assert await status_of(it.source) == "running"
    assert not await (await it.source.qemu.monitor()).execute("query-fdsets")
    assert (await it.console.stats()).errors == 0
    assert await it.console.verified()
    # And it can be tried again.
    await it.source.close()
    again = it.qemu.source(it.folder)
    await again.open()
    await again.close()


@contextlib.asynccontextmanager
async def beside(
    start: StartQemu, tmp_path: Path
) -> AsyncIterator[tuple[QemuSource, Callable[[], QemuSource], Monitor]]:
    """A guest that runs: the driver's view of it, another agent's, and somebody else's monitor."""
    other = tmp_path / "other.qmp"
    qemu = await start(*memory(), "-qmp", f"unix:{other},server=on,wait=off")
    made = [qemu.source(tmp_path)]

    def again() -> QemuSource:
        made.append(qemu.source(tmp_path))
        return made[-1]

    monitor = await Monitor.connect("somebody", other)
    try:
        await made[0].open()
        yield made[0], again, monitor
    finally:
        await monitor.close()
        for source in made:
            await source.close()


@pytest.mark.parametrize("restarted", [False, True], ids=["same-agent", "next-agent"])
async def test_a_guest_that_somebody_else_has_moved_meanwhile_is_not_run_here(
    start: StartQemu, tmp_path: Path, restarted: bool
) -> None:
    async with beside(start, tmp_path) as (source, again, monitor):
        await source.pause(Pipe.pair()[0])
        memento = source.memento()
        await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
        async with asyncio.timeout(60):
            while await monitor.status() != "postmigrate":  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.02)
        if restarted:
            await source.close()
        with pytest.raises(GuestError, match="postmigrate") as caught:
            await (again().reclaim(memento) if restarted else source.resume())
        assert caught.value.code == "guest-not-resumed"
        assert "would run it here again" in caught.value.hint
        assert await monitor.status() == "postmigrate"


@pytest.mark.parametrize("stage", ["open", "unquiesced"])
async def test_a_guest_that_its_owner_has_stopped_meanwhile_stays_stopped(
    start: StartQemu, tmp_path: Path, stage: str
) -> None:
    async with beside(start, tmp_path) as (source, _, monitor):
        if stage == "unquiesced":
            await source.quiesce()
            await source.unquiesce()
            assert await monitor.status() == "running"
        await monitor.execute("stop")
        await source.resume()
        assert await monitor.status() == "paused"


@pytest.mark.parametrize("committed", [False, True])
async def test_a_restarted_source_agent_finds_the_guest_where_it_stood(
    move: tuple[Move, contextlib.AsyncExitStack], committed: bool
) -> None:
    it, stack = move
    pieces = await it.begin(stack)
    found = it.source._memory
    assert found is not None
    mapping = found.mappings[ram_of(found)]
    uffd = await it.source.tracking_uffd()
    uffd_register(uffd, mapping.address, mapping.length_bytes, missing=False, minor=False, tracking=True)
    await it.source.pause(it.near)
    memento = it.source.memento()
    if committed:
        it.copy(pieces)
        it.free()
        await it.source.send_state(it.near)
        await asyncio.wait_for(it.loading, 30)
    await it.source.close()
    again = it.qemu.source(it.folder)
    stack.push_async_callback(again.close)
    if committed:
        await again.adopt(found.pid, memento)
        await again.release()
        assert it.qemu.process.poll() is not None
    else:
        await it.target.kill()
        await again.reclaim(memento)
        assert not injection.userfaultfds(found.pid)
        assert await status_of(again) == "running"
        assert (await it.console.stats()).errors == 0
        assert await it.console.verified()


@pytest.mark.parametrize("commands", [["cont"], ["cont", "stop"], []], ids=["resumed", "resumed-stopped", "unwatched"])
async def test_a_guest_that_somebody_else_resumes_is_not_given_away(
    move: tuple[Move, contextlib.AsyncExitStack], commands: list[str]
) -> None:
    it, stack = move
    other = it.folder / "other.qmp"
    it.extra = ("-qmp", f"unix:{other},server=on,wait=off")
    pieces = await it.begin(stack)
    await it.source.pause(it.near)
    monitor = await Monitor.connect("somebody", other)
    for command in commands:
        await monitor.execute(command)
    await monitor.close()
    if not commands:
        await (await it.source.qemu.monitor()).close()
    it.copy(pieces)
    it.free()
    with pytest.raises(GuestError) as caught:
        await it.source.send_state(it.near)
    assert caught.value.code == "guest-resumed"
    await it.target.kill()
    await it.source.resume()
    assert (await it.console.stats()).errors == 0
    assert await it.console.verified()


async def test_a_state_that_does_not_fit_fails_with_qemus_words_and_the_source_runs_on(
    move: tuple[Move, contextlib.AsyncExitStack],
) -> None:
    it, stack = move
    # The device's own state is the first thing in which the two differ.
    it.extra = ("-device", "virtio-rng-pci")
    pieces = await it.begin(stack, target_command(*it.devices("target.serial")))
    await it.source.pause(it.near)
    it.copy(pieces)
    it.free()
    with pytest.raises(MigratedError, match=r"QEMU said.*virtio-rng"):
        await asyncio.wait_for(it.loading, 30)
    await it.target.kill()
    await it.source.resume()
    assert (await it.console.stats()).errors == 0
    assert await it.console.verified()


async def test_a_restarted_agent_takes_the_incoming_guest_back(move: tuple[Move, contextlib.AsyncExitStack]) -> None:
    it, stack = move
    pieces = await it.begin(stack)
    await it.source.pause(it.near)
    it.copy(pieces)
    it.free()
    await it.source.send_state(it.near)
    await asyncio.wait_for(it.loading, 30)
    uffd = os.dup(it.faults.uffd)
    await it.target.close()
    adopted = QemuTarget("vm", it.target._config, it.folder, TIMEOUTS)
    faults = await adopted.adopt(it.faults.pid, uffd, pieces, it.target.memento())
    stack.push_async_callback(adopted.close)
    stack.push_async_callback(adopted.kill)
    assert faults.mappings == it.faults.mappings
    await it.console.attach(it.folder / "target.serial")
    await adopted.resume()
    await adopted.release()
    assert not injection.userfaultfds(faults.pid)
    assert await it.console.verified()


async def test_a_process_that_is_not_the_guest_is_not_adopted(start: StartQemu, tmp_path: Path) -> None:
    qemu = await start(*memory())
    process = PidHandle.attach(qemu.pid)
    uffd = await injection.open_uffd(process, faults=True, tracking=True, send_descriptor=None)
    with memfds(RAM) as pieces:
        config = QemuTargetConfig(command=target_command())
        with pytest.raises(GuestError):
            await QemuTarget("vm", config, tmp_path, TIMEOUTS).adopt(qemu.pid, uffd.fd, pieces, {})
    await injection.close_uffd(uffd)
    process.close()
