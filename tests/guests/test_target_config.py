"""`migrated inspect --target-config` of a QEMU that runs: an incoming QEMU started from the printed table has the same memory.

The table is taken as it was printed, and its placeholders are filled in as the agent does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from migrated.cli.host import inspect
from migrated.demo.pair import short_directory
from migrated.demo.qemu_guest import QEMU
from migrated.errors import GuestError
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.qemu.command import check_command, command_line
from migrated.guests.qemu.config import QemuTargetConfig
from migrated.guests.qemu.options import Properties, parse_options, parse_size
from migrated.guests.qemu.qmp import Monitor
from migrated.memory import memfd
from migrated.memory.regions import Region, TargetMemory
from migrated.settings import read
from tests.rig import supervisor
from tests.rig.guest import MIB, moving_guest

PLAIN = (QEMU, "-nodefaults", "-display", "none", "-vga", "none", "-S")
UP_SECONDS = 60.0

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
]

#: What people start QEMU with: default RAM, backends, NUMA, DIMMs, JSON, old machine types.
SHAPES = {
    "nothing but a size": ["-m", "96"],
    "the default size": ["-machine", "q35"],
    "an odd size": ["-m", "97"],
    "video memory": ["-m", "96", "-device", "VGA"],
    "private backend": ["-M", "q35,memory-backend=m", "-m", "96M", "-object", "memory-backend-ram,id=m,size=96M"],
    "memfd in JSON": [
        *("-machine", "pc,memory-backend=m", "-m", "96", "-object"),
        '{"qom-type":"memory-backend-memfd","id":"m","size":100663296,"share":true,"prealloc":true}',
    ],
    "two nodes and a DIMM": [
        *("-machine", "q35", "-smp", "2", "-m", "128M,slots=2,maxmem=1G"),
        *("-object", "memory-backend-ram,id=n0,size=64M", "-object", "memory-backend-memfd,id=n1,size=64M"),
        *("-numa", "node,nodeid=0,cpus=0,memdev=n0", "-numa", "node,nodeid=1,cpus=1,memdev=n1"),
        *("-object", "memory-backend-ram,id=d,size=128M", "-device", "pc-dimm,memdev=d"),
    ],
    "two nodes of default RAM": [
        *("-machine", "q35", "-smp", "2", "-m", "128M", "-object", "memory-backend-ram,id=n0,size=128M"),
        *("-numa", "node,memdev=n0", "-numa", "node"),
    ],
    "a file": ["-m", "32", "-mem-path", "{directory}", "-mem-prealloc"],
    "a machine type before 4.0": ["-M", "pc-i440fx-3.1", "-m", "96"],
    "its private backend": [
        *("-M", "pc-i440fx-3.1,memory-backend=m", "-m", "96", "-object", "memory-backend-ram,id=m,size=96M"),
    ],
    "its memfd": [
        *("-M", "pc-i440fx-3.1,memory-backend=m", "-m", "96", "-object", "memory-backend-memfd,id=m,size=96M"),
    ],
    "its legacy nodes": [
        *("-M", "pc-i440fx-3.1", "-smp", "2", "-m", "128", "-numa", "node,mem=64", "-numa", "node,mem=64"),
    ],
}


@pytest.fixture
def directory() -> Iterator[Path]:
    with supervisor.directory("mgc-", short_directory()) as path:
        yield path


@contextlib.asynccontextmanager
async def qemu(command: list[str], qmp: Path, fds: tuple[int, ...] = ()) -> AsyncIterator[Monitor]:
    """A QEMU, once it answers on ``qmp``."""
    log = qmp.with_suffix(".log")
    process = PidHandle.spawn(command, pass_fds=fds, log=log)
    try:
        async with asyncio.timeout(UP_SECONDS):
            while True:
                assert process.poll() is None, log.read_text()
                try:
                    monitor = await Monitor.connect(qmp.stem, qmp, greeting_seconds=UP_SECONDS)
                    break
                except GuestError as error:
                    if error.code != "qmp-unreachable":
                        raise
                await asyncio.sleep(0.02)
        assert monitor.peer_pid() == process.pid
        try:
            yield monitor
        finally:
            await monitor.close()
    finally:
        await process.kill(UP_SECONDS)
        process.close()


def invoke(pid: int, *arguments: str) -> tuple[str, object]:
    result = CliRunner().invoke(inspect, [str(pid), *arguments], standalone_mode=False)
    return result.output, result.exception or result.return_value


async def inspected(pid: int, *arguments: str) -> str:
    """What the command prints."""
    output, result = await asyncio.to_thread(invoke, pid, *arguments)
    assert result == 0
    return output


async def blocks(monitor: Monitor) -> dict[str, tuple[int, int]]:
    """Used and total length of each RAM block, by name."""
    found = re.findall(
        r"^ *(\S+) +\d+ [KMG]iB +0x\w+ +0x(\w+) +0x(\w+)", await monitor.hmp("info ramblock"), re.MULTILINE
    )
    return {name: (int(used, 16), int(total, 16)) for name, used, total in found}


def region_sizes(command: list[str]) -> dict[str, int]:
    """What the agent is to provide, by backend."""
    found = {}
    for option in parse_options(command[1:]):
        properties = Properties(option.value or "", "qom-type")
        if option.name == "object" and properties.get("mem-path").startswith("{memory:"):
            found[properties.get("id")] = parse_size(properties.get("size")) or 0
    return found


def machine_is_missing(name: str) -> bool:
    listed = subprocess.run([QEMU, "-machine", "help"], capture_output=True, text=True, check=True).stdout
    return re.search(rf"^{re.escape(name)} ", listed, re.MULTILINE) is None


async def comes_up_with_the_same_blocks(command: list[str], source: Monitor, directory: Path) -> None:
    """An incoming QEMU from a table's command."""
    sizes = region_sizes(command)
    memory = tuple(
        TargetMemory(Region(name, size, 4096), memfd.allocate(size, 4096, name)) for name, size in sizes.items()
    )
    try:
        check_command("vm", command, tuple(item.region for item in memory))
        qmp = directory / "there.qmp"
        fds = tuple(item.memory_fd for item in memory)
        async with qemu(command_line(command, memory, qmp), qmp, fds) as target:
            assert await target.status() == "inmigrate"
            assert await blocks(target) == await blocks(source)
            for memdev in await target.execute("query-memdev"):
                assert (memdev["size"], memdev["share"]) == (sizes[memdev["id"]], True)
            machine = {"path": "/machine", "property": "type"}
            assert await target.execute("qom-get", machine) == await source.execute("qom-get", machine)
    finally:
        for item in memory:
            os.close(item.memory_fd)


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_printed_table_starts_the_same_machine(directory: Path, shape: str) -> None:
    arguments = [argument.replace("{directory}", str(directory)) for argument in SHAPES[shape]]
    for argument in arguments:
        if (named := re.match(r"pc-(i440fx|q35)-\d+\.\d+", argument)) and machine_is_missing(named[0]):
            pytest.skip(f"this QEMU has no machine type {named[0]}")
    qmp = directory / "here.qmp"
    async with qemu([*PLAIN, *arguments, "-qmp", f"unix:{qmp},server=on,wait=off"], qmp) as source:
        printed = await inspected(source.peer_pid(), "--target-config", "--name", "vm")
        table = read(QemuTargetConfig, tomllib.loads(printed)["guests"]["vm"], "vm")
        assert "{qmp}" in " ".join(table.command)
        assert table.command[0] == Path(QEMU).name
        # QEMU may be a script that starts the program of that name from another distribution's tree.
        await comes_up_with_the_same_blocks([QEMU, *table.command[1:]], source, directory)


async def test_what_the_command_line_does_not_say_is_asked_of_qemu(directory: Path) -> None:
    """The machine type behind an alias, and memory that was plugged in later."""
    qmp, mine = directory / "here.qmp", directory / "mine.qmp"
    sockets = [word for path in (mine, qmp) for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    async with qemu([*PLAIN, "-m", "96M,slots=2,maxmem=1G", *sockets], qmp) as source:
        machine = str(await source.execute("qom-get", {"path": "/machine", "property": "type"}))
        await source.execute("object-add", {"qom-type": "memory-backend-ram", "id": "late", "size": 128 << 20})
        await source.execute("device_add", {"driver": "pc-dimm", "memdev": "late"})
        told = json.loads(
            await inspected(source.peer_pid(), "--target-config", "--name", "vm", "--qmp", str(mine), "--json")
        )
        command = tomllib.loads(told["target_config"])["guests"]["vm"]["command"]
        assert f"{machine.removesuffix('-machine')},memory-backend=pc.ram" in command
        assert f"unix:{qmp},server=on,wait=off" in command
        assert [check for check in told["checks"] if "memory backend late is not in" in check]
        assert not [check for check in told["checks"] if "machine type" in check]


async def test_the_monitor_of_another_process_is_refused(directory: Path) -> None:
    here, there = (
        (path, f"unix:{path},server=on,wait=off") for path in (directory / "here.qmp", directory / "there.qmp")
    )
    async with qemu([*PLAIN, "-machine", "none", "-qmp", here[1]], here[0]) as one:
        pid = one.peer_pid()
        async with qemu([*PLAIN, "-machine", "none", "-qmp", there[1]], there[0]) as other:
            await one.close()
            _, error = await asyncio.to_thread(invoke, other.peer_pid(), "--target-config", "--qmp", str(here[0]))
            assert isinstance(error, GuestError)
            assert error.code == "wrong-qmp"
            assert f"process {pid}" in error.message


@pytest.mark.root
async def test_inspect_asks_qemu_which_memory_is_the_guests(directory: Path) -> None:
    qmp = directory / "here.qmp"
    memory = ["-machine", "q35,memory-backend=m", "-m", "96", "-object", "memory-backend-memfd,id=m,size=96M,share=on"]
    async with qemu([*PLAIN, *memory, "-qmp", f"unix:{qmp},server=on,wait=off"], qmp) as source:
        pid = source.peer_pid()
        await source.close()
        told = json.loads(await inspected(pid, "--qmp", str(qmp), "--json"))
        (ram,) = (row for row in told["memory"] if row["file"] == "m")
        assert (ram["size_bytes"], ram["page_bytes"], ram["shared"], ram["movable"]) == (96 << 20, 4096, True, True)


@pytest.mark.root
async def test_inspect_says_why_the_agent_refuses_a_guest(directory: Path) -> None:
    qmp = directory / "here.qmp"
    incoming = ["-m", "96", "-incoming", "defer", "-qmp", f"unix:{qmp},server=on,wait=off"]
    async with qemu([*PLAIN, *incoming], qmp) as source:
        pid = source.peer_pid()
        await source.close()
        _, error = await asyncio.to_thread(invoke, pid, "--qmp", str(qmp))
        assert isinstance(error, GuestError)
        assert "inmigrate" in error.message or error.code == "guest-incoming"


def inode(path: Path) -> int:
    """0 while there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


@contextlib.asynccontextmanager
async def linked_once_rebound(path: Path, link: Path) -> AsyncIterator[None]:
    """``link`` becomes another name of the socket at ``path``, as soon as somebody else listens there."""
    first = inode(path)

    async def follow() -> None:
        while inode(path) in {0, first}:  # noqa: ASYNC110 - a socket tells nobody that it is bound
            await asyncio.sleep(0.01)
        os.link(path, link)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.timeout(300)  # on a busy machine; usually seconds
@pytest.mark.usefixtures("page_pool")
async def test_a_guest_on_default_memory_migrates_with_the_printed_table(fast_accel: str) -> None:
    load = {"rate": 2000, "pattern": "hot", "sweep_seconds": 0}
    shape: dict[str, Any] = {"memory": "private", "page_bytes": (4096, 2 * MIB), "extra": ("-vga", "std")}
    async with moving_guest(kind="boot", accel=fast_accel, load=load, **shape) as moving:
        guest = moving.guest
        (pid,) = moving.pids
        printed = await inspected(pid, "--target-config", "--name", guest.name, "--qmp", str(guest.source_qmp))
        table = tomllib.loads(printed)["guests"][guest.name]
        table["command"][0] = QEMU
        moving.there.target_guests[guest.name] = table
        # Both hosts are one machine here: the two QEMUs listen for their consoles on the same path.
        async with linked_once_rebound(guest.source_serial, guest.target_serial(1)):
            move = await moving.move(downtime_limit_ms=2000)
        assert move.target["page_size"] == 2 * MIB
