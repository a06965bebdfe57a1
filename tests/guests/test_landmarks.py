"""The RAM blocks of an incoming QEMU are found by what its own migration stream puts there, where its monitor says they are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrated.demo.pair import short_directory
from migrated.demo.qemu_guest import QEMU
from migrated.errors import GuestError
from migrated.guests.libvirt.landmarks import Landmarks
from migrated.guests.qemu import memory
from migrated.guests.qemu.qmp import Monitor
from migrated.guests.qemu.state import ram_section, stream_begin
from tests.rig import supervisor

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.usefixtures("machine")]

COMMAND = [QEMU, "-machine", "q35", "-m", "64M", "-nodefaults", "-vga", "std", "-display", "none", "-S"]


@pytest.fixture
async def incoming() -> AsyncIterator[Monitor]:
    """The monitor of a QEMU that waits for a migration."""
    with supervisor.directory("mgt-", short_directory()) as directory:
        path: Path = directory / "vm.qmp"
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *("-incoming", "defer", "-qmp", f"unix:{path},server=on,wait=off"),
            stdin=asyncio.subprocess.DEVNULL,
        )
        try:
            monitor = await listening(path, process)
            yield monitor
            await monitor.close()
        finally:
            process.kill()
            await process.wait()


async def listening(path: Path, process: asyncio.subprocess.Process) -> Monitor:
    """The monitor, as soon as QEMU listens."""
    while True:
        assert process.returncode is None
        try:
            return await Monitor.connect("vm", path, greeting_seconds=60)
        except GuestError as error:
            if error.code != "qmp-unreachable":
                raise
        await asyncio.sleep(0.02)


async def test_blocks_are_found_where_the_monitor_says_they_are(incoming: Monitor) -> None:
    blocks = await memory.ram_blocks(incoming)
    pid = incoming.peer_pid()
    expected = {item.block.id: item.address for item in await memory.locate_blocks(incoming, pid, blocks)}
    reading, writing = os.pipe()
    try:
        await incoming.give_fd("stream", reading)
        await incoming.execute("migrate-incoming", {"uri": "fd:stream"})
        os.close(reading)
        landmarks = Landmarks("vm", blocks)
        used = {block.id: block.used_bytes for block in blocks}
        stream = stream_begin(await memory.machine_type(incoming)) + ram_section(used) + landmarks.stream()
        await asyncio.to_thread(os.write, writing, stream)
        found = await landmarks.find(pid, limit_seconds=60)
        assert {block: found[block].address for block in expected} == expected
        assert found.keys() == used.keys()
        # QEMU takes the lengths once more, as it gets them with the state, and goes on waiting.
        await asyncio.to_thread(os.write, writing, ram_section(used))
        assert await incoming.status() == "inmigrate"
        assert (await incoming.migration())["status"] == "active"
    finally:
        os.close(writing)
