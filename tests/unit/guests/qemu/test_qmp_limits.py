"""A QEMU that is slow to answer gets the time that the configuration gives a command, its greeting included."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrated.errors import GuestError
from migrated.guests.qemu.config import QemuSourceConfig
from migrated.guests.qemu.source import QemuSource
from migrated.settings import Timeouts

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="mg") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def silent_qemu(path: Path, *, greets: bool) -> AsyncIterator[None]:
    """Listens at ``path`` and answers nothing, or nothing after the greeting and its capabilities."""
    over = asyncio.Event()
    served: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done = asyncio.get_running_loop().create_future()
        served.append(done)
        try:
            if greets:
                writer.write(json.dumps(GREETING).encode() + b"\r\n")
                await reader.read(4096)  # qmp_capabilities, without a newline
                writer.write(b'{"return": {}}\r\n')
            await over.wait()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            done.set_result(None)

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        over.set()
        server.close()
        await asyncio.gather(*served)


@pytest.mark.parametrize(("greets", "code", "seconds"), [(False, "qmp-busy", 0.25), (True, "qmp-timeout", 2.5)])
async def test_the_limit_of_a_command_is_the_configurations(
    short: Path, *, greets: bool, code: str, seconds: float
) -> None:
    path = short / "qmp"
    source = QemuSource("vm1", QemuSourceConfig(qmp=str(path)), Timeouts(guest_command=seconds))
    async with silent_qemu(path, greets=greets):
        with pytest.raises(GuestError, match=f"within {seconds:g} s") as caught:
            await source.open()
        assert caught.value.code == code
        await source.close()
