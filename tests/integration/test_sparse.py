"""A guest of 1 TiB of which next to nothing is in use: moved in the time and the memory of what it uses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.console import GuestConsole
from migrated.demo.pair import AgentPair, short_directory
from migrated.guests.process.client import ENVIRONMENT
from tests.rig.pages import PagesUnavailableError, more_pages

MIB = 1 << 20
TIB = 1 << 40
HUGE = 2 * MIB
USED = 256 * MIB
PATIENCE_SECONDS = 60.0


def _command(program: Path, console: Path) -> list[str]:
    size, within = str(USED // MIB), str(TIB // MIB)
    return [str(program), "--size", size, "--within", within, "--rate", "2000", "--console", str(console)]


@contextlib.asynccontextmanager
async def _agents(program: Path, directory: Path, *, reserve: bool) -> AsyncIterator[AgentPair]:
    source: dict[str, Any] = {"driver": "process", "socket": str(directory / "big.sock"), "page_size": "2M"}
    target = {"driver": "process", "page_size": "2M", "command": _command(program, directory / "big.1.tty")}
    async with AgentPair(
        directory,
        source_guests={"big": source | {"reserve": False}},
        target_guests={"big": target | ({} if reserve else {"reserve": False})},
    ) as pair:
        yield pair


@contextlib.asynccontextmanager
async def _guest(program: Path, directory: Path) -> AsyncIterator[GuestConsole]:
    console, tty = GuestConsole("big"), directory / "big.tty"
    process = await asyncio.create_subprocess_exec(
        *_command(program, tty),
        stdin=asyncio.subprocess.DEVNULL,
        env={**os.environ, ENVIRONMENT: str(directory / "big.sock")},
    )
    try:
        await console.attach(tty, PATIENCE_SECONDS)
        await console.stats(PATIENCE_SECONDS)
        yield console
    finally:
        with contextlib.suppress(Exception):
            await console.command("quit")
        await console.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


def _resident_bytes(pid: int) -> int:
    """What a process holds of its own: no file's pages, no huge pages; its page tables too."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmPTE"))


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="mgs-", dir=short_directory()) as path:
        yield Path(path)


async def test_a_sparse_guest_of_1_tib_moves_as_what_it_uses(program: Path, directory: Path) -> None:
    """A quarter of a thousandth of it is in use, spread all over; it goes on writing; both agents stay small."""
    try:
        with more_pages(2 * USED // HUGE + 8, HUGE):
            async with _agents(program, directory, reserve=False) as pair, _guest(program, directory) as console:
                small = [_resident_bytes(pid) for pid in (pair.source.pid, pair.target.pid)]
                identity = await pair.start("big")
                record = await pair.source.wait(identity, limit_seconds=PATIENCE_SECONDS)
                grown = [_resident_bytes(pid) for pid in (pair.source.pid, pair.target.pid)]
                assert record["state"] == "completed", record["error"]
                assert record["total_bytes"] == TIB
                assert record["transferred_bytes"] < 4 * USED
                await console.attach(directory / "big.1.tty", PATIENCE_SECONDS)
                swept = await console.sweep(PATIENCE_SECONDS)
                assert (swept.blocks, swept.wrong, swept.errors, console.corrupt) == (USED // 4096, 0, 0, [])
                # A bit a block of 1 TiB would be 32 MiB: whatever is kept a block or a page is not touched for all.
                assert all(after - before < 32 * MIB for before, after in zip(small, grown, strict=True))
    except PagesUnavailableError as error:
        pytest.skip(str(error))


async def test_a_target_that_is_to_reserve_all_of_it_says_what_is_lacking(program: Path, directory: Path) -> None:
    """And how many pages that would be; the guest runs on."""
    try:
        with more_pages(USED // HUGE + 8, HUGE):
            async with _agents(program, directory, reserve=True) as pair, _guest(program, directory) as console:
                identity = await pair.start("big")
                record = await pair.source.wait(identity, limit_seconds=PATIENCE_SECONDS)
                assert record["state"] == "failed"
                assert record["error"]["code"] == "no-huge-pages"
                assert str(TIB // HUGE) in record["error"]["message"]
                swept = await console.sweep(PATIENCE_SECONDS)
                assert (swept.wrong, swept.errors) == (0, 0)
    except PagesUnavailableError as error:
        pytest.skip(str(error))
