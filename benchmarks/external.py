"""Migrate a guest with `migrated`: two agents, a guest, and the cost of the migration."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.guest import LOADS, MIB, Watched, arrived_pids, guest_at_work
from benchmarks.meter import Meter
from benchmarks.network import Link
from benchmarks.sample import Sample
from migrated.demo.pair import AgentPair
from migrated.demo.qemu_guest import Memory
from migrated.errors import MigratedError

#: Fields of the source's record that are kept.
_KEPT = ("round", "stale_pages", "faults", "fault_seconds", "faults_by_kind_us", "bytes_by_kind", "timeline", "error")


async def move(
    link: Link,
    load: str,
    *,
    memory_bytes: int,
    memory: Memory = "memfd",
    page_bytes: int = 2 * MIB,
    target_page_bytes: int | None = None,
    limit_seconds: float = 120,
    guest_load: dict[str, Any] | None = None,
    before: Callable[[], Awaitable[None]] | None = None,
    **options: Any,
) -> Sample:
    """Migrate a guest under ``load`` once; ``options`` are those of `migrated start`; ``before`` runs while the guest works."""
    sample = Sample(system="migrated", path=link.name, load=load, memory_bytes=memory_bytes)
    async with (
        guest_at_work(
            link,
            guest_load or LOADS[load],
            memory_bytes=memory_bytes,
            memory=memory,
            page_bytes=page_bytes,
            target_page_bytes=target_page_bytes,
        ) as watched,
        AgentPair(
            watched.guest.directory,
            source_guests={watched.guest.name: watched.guest.source_table()},
            target_guests={watched.guest.name: watched.guest.target_table()},
            source_prefix=link.source_prefix,
            target_prefix=link.target_prefix,
            listen_host=link.target_address,
        ) as pair,
    ):
        try:
            if before is not None:
                await before()
            await _move(sample, watched, pair, link, options, limit_seconds)
        except (MigratedError, OSError, TimeoutError) as error:
            sample.outcome = f"{type(error).__name__}: {error}"
            sample.details["target_log"] = pair.target.log_tail(8)
            sample.details["source_log"] = pair.source.log_tail(8)
    return sample


async def _move(
    sample: Sample, watched: Watched, pair: AgentPair, link: Link, options: dict[str, Any], limit_seconds: float
) -> None:
    await watched.observe()
    sample.operations_before = watched.operations_before
    attach = asyncio.ensure_future(watched.console.attach(watched.guest.target_serial(), 60))
    meter, agent = Meter(), Meter()
    agent.watch(pair.source.pid)
    meter.watch(pair.source.pid)
    meter.watch(pair.target.pid)
    meter.watch(watched.pid)
    wire = link.wire_bytes(pair.source.pid)
    try:
        async with meter, agent:
            identity = await pair.start(watched.guest.name, **options)
            await pair.source.wait(identity, "precopy", "switchover", "postcopy", limit_seconds=60)
            began = time.monotonic()
            for pid in arrived_pids(watched.guest.directory):
                with contextlib.suppress(OSError):
                    meter.watch(pid)
            await pair.source.wait(identity, "switchover", "postcopy", limit_seconds=limit_seconds)
            switched = time.monotonic()
            record = await pair.source.wait(identity, limit_seconds=limit_seconds)
            meter.sample()
        if record["state"] != "completed":
            error = record.get("error") or {}
            raise MigratedError(f"{record['state']}: {error.get('code')}: {error.get('message')}")
        sample.wire_bytes = link.wire_bytes(pair.source.pid) - wire
        other = await pair.target.wait(identity, limit_seconds=limit_seconds)
        await attach
    finally:
        attach.cancel()
    at = {change["state"]: change["at"] for change in reversed(record["timeline"])}  # the first of each
    arrived = next(change["at"] for change in other["timeline"] if change["state"] == "completed")
    sample.total_seconds = (
        arrived - at["precopy"]
    )  # the source then ends the old QEMU, which QEMU's own migration leaves
    sample.setup_seconds = at["precopy"] - at["setup"]
    sample.downtime_seconds = record["downtime_seconds"]
    sample.stall_seconds = await watched.stall_seconds(sample.downtime_seconds)
    sample.operations_during = watched.console.operations_per_second(began, switched)
    sample.cpu_seconds = meter.cpu_seconds
    sample.extra_memory_bytes = meter.peak_memory_bytes
    sample.details = {key: record[key] for key in _KEPT if key in record}
    sample.details |= {key: other[key] for key in ("faults", "fault_seconds", "faults_by_kind_us")}
    sample.details["precopy_seconds"] = at["switchover"] - at["precopy"]
    sample.details["end_seconds"] = at["completed"] - arrived
    sample.details["rounds"] = rounds(pair.source.log_path)
    sample.details["steps"] = record["downtime_breakdown"]
    sample.details["source_agent_bytes"] = agent.peak_memory_bytes
    sample.details["transferred_bytes"] = record["transferred_bytes"]
    sample.verified = await watched.verify()
    with contextlib.suppress(MigratedError):
        await watched.console.command("quit")


def rounds(log: Path) -> list[dict[str, Any]]:
    """Return the pre-copy rounds that the source agent logged."""
    return [
        {key: entry[key] for key in ("number", "dirty_bytes", "sent", "seconds", "written", "changed")}
        for entry in _entries(log)
        if entry.get("event") == "round"
    ]


def _entries(log: Path) -> list[dict[str, Any]]:
    found = []
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
