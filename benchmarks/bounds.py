"""Measure what must stay within bounds: the bandwidth limit, and the cost of absent memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks import external
from benchmarks.meter import Meter
from benchmarks.network import link
from benchmarks.pool import warm_pages
from benchmarks.report import Section, mebibytes, milliseconds, seconds
from benchmarks.sample import Sample, median
from benchmarks.settings import MIB, Settings
from migrated.demo.console import GuestConsole
from migrated.demo.pair import AgentPair, short_directory
from migrated.errors import HostError, MigratedError
from migrated.guests.process.client import ENVIRONMENT
from migrated.units import parse_rate

ROOT = Path(__file__).parent.parent
HUGE = 2 * MIB
TIB = 1 << 40
LIMIT_SECONDS = 120


async def limits(settings: Settings) -> Section:
    """Measure pre-copy of an idle guest under bandwidth limits: bytes on the wire and time."""
    section = Section(
        "limits",
        "Bandwidth limits, loopback",
        ("limit", "sent", "in", "of the limit", "least to most", "memory verified"),
        notes=["First round of an idle guest, two connections: bytes on the wire divided by the round's time."],
    )
    size = min(settings.memory_bytes, 512 * MIB)
    with warm_pages(2 * size, HUGE):
        for text in ("1Gbit",) if settings.quick else ("500Mbit", "2Gbit", "4Gbit"):
            samples: list[Sample] = []
            for number in range(settings.runs):
                with link("loopback") as made:
                    sample = await external.move(made, "idle", memory_bytes=size, max_bandwidth=text)
                settings.say("loopback", text, "migrated", number, sample)
                samples.append(sample)
            rounds = [s.details["rounds"][0] for s in samples if s.details.get("rounds")]
            parts = [one["sent"] / one["seconds"] / parse_rate(text) for one in rounds]
            section.rows.append(
                (
                    *(text, mebibytes(median(one["sent"] for one in rounds))),
                    *(seconds(median(one["seconds"] for one in rounds)), f"{median(parts) or 0:.3f}"),
                    f"{min(parts, default=0):.3f} to {max(parts, default=0):.3f}",
                    f"{sum(s.verified for s in samples)} of {len(samples)}",
                )
            )
            section.data.append({"limit": text, "parts": parts})
    settings.save(section)
    return section


async def sparse(settings: Settings) -> Section:
    """Compare a guest of a given size with one that uses as much memory, spread over 1 TiB."""
    used = 512 * MIB if settings.quick else 2048 * MIB
    section = Section(
        "sparse",
        f"A guest with {used // MIB} MiB in use",
        ("its memory", "total", "downtime", "last scan", "source's memory", "target's memory", "memory verified"),
        notes=[
            (
                "A co-operative guest that writes 2 000 blocks a second, on 2 MiB pages, loopback; the memory it uses is spread "
                "over all of its address space. Memory of the agents: the largest growth during the migration, without huge "
                "pages."
            )
        ],
    )
    with warm_pages(2 * used + 16 * HUGE, HUGE), tempfile.TemporaryDirectory() as built:
        program = _build(Path(built))
        results: dict[int, list[dict[str, Any]]] = {used: [], TIB: []}
        for number in range(settings.runs):
            for within, kept in results.items():
                kept.append(await _move_sparse(program, used, within))
                settings.note(f"sparse, {within // MIB} MiB, {number + 1}: {kept[-1]}")
    for within, kept in results.items():
        section.rows.append(
            (
                *(mebibytes(within), seconds(median(one["seconds"] for one in kept))),
                *(milliseconds(median(one[name] for one in kept)) for name in ("downtime", "scan")),
                *(mebibytes(median(one[name] for one in kept)) for name in ("source_bytes", "target_bytes")),
                f"{sum(one['verified'] for one in kept)} of {len(kept)}",
            )
        )
        section.data.append({"within": within, "results": kept})
    settings.save(section)
    return section


def _build(directory: Path) -> Path:
    """Build the example guest.  Raises HostError if there is no compiler."""
    if shutil.which("cc") is None:
        raise HostError("sparse: cannot build the guest: no C compiler")
    program = directory / "guest"
    includes = (f"-I{ROOT / 'native/include'}", f"-I{ROOT / 'migrated/demo/images'}")
    source = str(ROOT / "native/examples/process_guest.c")
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-pthread", *includes, "-o", str(program), source], check=True, timeout=120
    )
    return program


async def _move_sparse(program: Path, used: int, within: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mgb-", dir=short_directory()) as name:
        directory = Path(name)
        arrival = directory / "big.1.tty"
        table = {"driver": "process", "page_size": "2M", "reserve": False}
        async with (
            AgentPair(
                directory,
                source_guests={"big": {**table, "socket": str(directory / "big.sock")}},
                target_guests={"big": {**table, "command": _command(program, used, within, arrival)}},
            ) as pair,
            _guest(program, used, within, directory) as console,
        ):
            agents = Meter(), Meter()
            agents[0].watch(pair.source.pid)
            agents[1].watch(pair.target.pid)
            started = time.monotonic()
            async with agents[0], agents[1]:
                identity = await pair.start("big")
                record = await pair.source.wait(identity, limit_seconds=LIMIT_SECONDS)
            took = time.monotonic() - started
            if record["state"] != "completed":
                raise MigratedError(f"sparse: {record['state']}: {record.get('error')}")
            await console.attach(arrival, LIMIT_SECONDS)
            swept = await console.sweep(LIMIT_SECONDS)
            await console.command("quit")
        return {
            "seconds": took,
            "downtime": record["downtime_seconds"],
            "scan": record["downtime_breakdown"].get("scan"),
            "steps": record["downtime_breakdown"],
            "source_bytes": agents[0].peak_memory_bytes,
            "target_bytes": agents[1].peak_memory_bytes,
            "verified": swept.wrong == 0 and swept.errors == 0 and not console.corrupt,
        }


def _command(program: Path, used: int, within: int, console: Path) -> list[str]:
    sizes = ("--size", str(used // MIB), "--within", str(within // MIB))
    return [str(program), *sizes, "--rate", "2000", "--console", str(console)]


@contextlib.asynccontextmanager
async def _guest(program: Path, used: int, within: int, directory: Path) -> AsyncIterator[GuestConsole]:
    console, tty = GuestConsole("big"), directory / "big.tty"
    process = await asyncio.create_subprocess_exec(
        *_command(program, used, within, tty),
        stdin=asyncio.subprocess.DEVNULL,
        env={**os.environ, ENVIRONMENT: str(directory / "big.sock")},
    )
    try:
        await console.attach(tty, LIMIT_SECONDS)
        await console.stats(LIMIT_SECONDS)
        yield console
    finally:
        await console.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
