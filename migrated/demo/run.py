"""Run ``migrated demo``: a guest, two agents and a migration on this machine, watched and verified.

With root, QEMU and huge pages the guest is Linux under TCG, which writes and checks its memory all the time.  Otherwise
it is the co-operative guest on 4 KiB pages, and the demo reports what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from migrated.demo.pair import AgentPair, short_directory
from migrated.demo.pool import huge_pages
from migrated.demo.process_guest import RunningProcess
from migrated.demo.qemu_guest import QEMU, QemuGuest, RunningQemu
from migrated.demo.show import Show
from migrated.errors import HostError, MigratedError

MIB = 1 << 20
QEMU_MEMORY_BYTES = 512 * MIB
PROCESS_MEMORY_BYTES = 64 * MIB


def cache_directory() -> Path:
    """Return where guest images are kept between runs: ``MIGRATED_CACHE``, or below the user's cache."""
    if configured := os.environ.get("MIGRATED_CACHE"):
        return Path(configured).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "migrated"


def run(*, json: bool = False, mode: str = "hybrid", guest: str = "auto") -> int:
    """Run the demo; return exit code 0 if the guest arrived and its memory was verified."""
    console = Console(stderr=json, highlight=False)
    show = Show(console)
    try:
        result = asyncio.run(_run(show, mode=mode, guest=guest))
    except MigratedError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        if error.hint:
            console.print(f"  hint: {error.hint}", markup=False)
        return 1
    if json:
        print(json_module.dumps(result))  # noqa: T201 - the command's output
    return 0 if result["verified"] else 1


def lacking_for_qemu() -> list[str]:
    """Return what this machine and user lack for the demo with a real QEMU guest."""
    lacking = []
    if os.geteuid() != 0:
        lacking.append("root (to reserve huge pages and attach to an unmodified QEMU)")
    if shutil.which(QEMU) is None:
        lacking.append(f"{QEMU} (Debian package qemu-system-x86)")
    return lacking


async def _run(show: Show, *, mode: str, guest: str) -> dict[str, Any]:
    if guest == "auto":
        lacking = lacking_for_qemu()
        if lacking:
            show.without("a real QEMU guest on huge pages", lacking)
        guest = "process" if lacking else "linux"
        if guest == "linux":
            try:
                return await _qemu_demo(show, mode)
            except HostError as error:  # no huge pages, or no package with the guest's kernel
                show.without("a real QEMU guest on huge pages", [error.message])
                guest = "process"
    return await (_process_demo(show, mode) if guest == "process" else _qemu_demo(show, mode))


async def _qemu_demo(show: Show, mode: str) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="migrated-", dir=short_directory())))
        guest = QemuGuest(
            directory=directory,
            cache=cache_directory(),
            memory_bytes=QEMU_MEMORY_BYTES,
            memory="private",
            load={"size": "60%", "rate": 20000, "pattern": "sparse"},
        )
        show.step("building the guest image (Debian's kernel, an init that checks its own memory)")
        await asyncio.to_thread(guest.source_command)
        show.step(f"reserving {QEMU_MEMORY_BYTES // MIB} MiB of 2 MiB huge pages for the target")
        stack.enter_context(huge_pages(QEMU_MEMORY_BYTES, guest.page_bytes))
        running = RunningQemu(guest)
        stack.push_async_callback(running.stop)
        show.step(
            "booting Linux in an ordinary QEMU (TCG, default memory), writing and checking its memory from then on"
        )
        await running.start()
        pair = AgentPair(
            directory,
            source_guests={guest.name: guest.source_table()},
            target_guests={guest.name: guest.target_table()},
        )
        await stack.enter_async_context(pair)
        return await _move(
            show,
            pair,
            guest.name,
            mode,
            console=running.console,
            arrived=guest.target_serial(),
            about={"kind": "qemu-linux-tcg", "memory_bytes": guest.memory_bytes, "page_size": guest.page_bytes},
        )


async def _process_demo(show: Show, mode: str) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="migrated-", dir=short_directory())))
        running = RunningProcess(directory, memory_bytes=PROCESS_MEMORY_BYTES)
        pair = AgentPair(
            directory,
            source_guests={running.name: running.source_table()},
            target_guests={running.name: running.target_table()},
        )
        stack.push_async_callback(running.stop)
        await stack.enter_async_context(pair)
        show.step("starting a co-operative guest that writes and checks its memory")
        await running.start()
        return await _move(
            show,
            pair,
            running.name,
            mode,
            console=running.console,
            arrived=running.target_console,
            about={"kind": "process", "memory_bytes": running.memory_bytes, "page_size": 4096},
        )


async def _move(
    show: Show,
    pair: AgentPair,
    guest: str,
    mode: str,
    *,
    console: Any,
    arrived: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    before = await console.stats()
    show.step(f"the guest is at work: {before.operations} blocks written and checked, {before.errors} errors")
    started = time.monotonic()
    migration = await pair.start(guest, mode=mode)
    show.step(f"migration {migration}: {pair.source.role} agent → {pair.address}, mode {mode}")
    attach = asyncio.ensure_future(console.attach(arrived, 60))
    target: dict[str, Any] = {}
    try:
        record = await show.follow(pair.source.events(migration))
        if record["state"] != "completed":
            error = record.get("error") or {}
            raise MigratedError(
                f"the migration {record['state']}: {error.get('message', '')}",
                code=error.get("code"),
                hint=error.get("hint", "") + f"\n{pair.target.log_tail(4)}",
            )
        total_seconds = time.monotonic() - started
        target = await pair.target.wait(migration, limit_seconds=60)
        await attach
    finally:
        attach.cancel()
    show.step("the guest runs on the target and needs neither agent; it now checks all of its memory")
    try:
        after = await console.stats()
        swept = await console.sweep()
    finally:
        with contextlib.suppress(MigratedError):
            await console.command("quit")
    verified = (
        swept.wrong == 0 and swept.errors == 0 and after.errors == 0 and after.operations > before.operations
    ) and not console.corrupt
    result = {
        "verified": bool(verified),
        "downtime_seconds": record["downtime_seconds"],
        "total_seconds": round(total_seconds, 3),
        "transferred_bytes": record["transferred_bytes"],
        "rounds": record["round"],
        "stale_pages": record["stale_pages"],
        "faults": target["faults"],
        "fault_seconds": target["fault_seconds"],
        "faults_by_kind_us": target.get("faults_by_kind_us", {}),
        "guest": about,
        "mode": mode,
        "swept_blocks": swept.blocks,
    }
    show.summary(result)
    return result


if __name__ == "__main__":
    sys.exit(run(json="--json" in sys.argv))
