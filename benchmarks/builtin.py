"""Migrate the same guest on the same memory with QEMU's own pre-copy or post-copy."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient, QMPError

from benchmarks.guest import LOADS, MIB, Watched, guest_at_work
from benchmarks.meter import Meter
from benchmarks.network import Link
from benchmarks.sample import Sample
from migrated.demo.qemu_guest import Memory
from migrated.errors import MigratedError
from migrated.waiting import within

PORT = 7450
POLL_SECONDS = 0.02
#: Effectively unlimited: QEMU's default limit would slow it down.
BANDWIDTH = 10 << 30
CAPABILITIES = {
    "qemu-precopy": ("events",),
    "qemu-postcopy": ("events", "postcopy-ram", "postcopy-preempt", "return-path"),
}


class Machine:
    """The monitor of a QEMU, which records what QEMU reports, with its time stamps.

    Nothing asks QEMU for its state while it migrates: that would cost processor time, and end each figure at a question.
    """

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._events = EventListener(("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS"))
        client.register_listener(self._events)
        self.status = ""  # of the migration
        self.passes = 0  # over memory, including the active one
        self._seen: dict[str, float] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, path: Path, limit_seconds: float = 20) -> AsyncIterator[Machine]:
        """Connect to a QEMU that may still be starting."""
        client = QMPClient("bench")
        async with within(limit_seconds, f"QEMU on {path}"):
            while True:
                try:
                    await client.connect(str(path))
                    break
                except (QMPError, OSError):
                    await asyncio.sleep(POLL_SECONDS)
        try:
            yield cls(client)
        finally:
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                await asyncio.wait_for(client.disconnect(), 5)

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Execute one command."""
        return await asyncio.wait_for(self._client.execute(command, arguments), 20)

    async def prepare(self, system: str, downtime_limit_ms: float, streams: int | None, *, tls: str = "") -> None:
        """Set capabilities and limits, which must be the same on both sides.  ``tls``: id of the side's credentials."""
        wanted = [*CAPABILITIES[system]]
        parameters: dict[str, object] = {"max-bandwidth": BANDWIDTH, "downtime-limit": int(downtime_limit_ms)}
        if streams is not None:
            wanted.append("multifd")
            parameters["multifd-channels"] = streams
        if tls:
            parameters["tls-creds"] = tls
        capabilities = [{"capability": name, "state": True} for name in wanted]
        await self.execute("migrate-set-capabilities", {"capabilities": capabilities})
        await self.execute("migrate-set-parameters", parameters)

    async def follow(self) -> None:
        """Wait for an event.  Raises MigratedError if the migration has failed."""
        event: Any = await self._events.get()
        name, data, stamp = event["event"], event.get("data", {}), event["timestamp"]
        if name == "MIGRATION_PASS":
            self.passes = data["pass"]
        elif name == "MIGRATION":
            self.status = data["status"]
            name = self.status
        self._seen[name] = stamp["seconds"] + stamp["microseconds"] / 1e6
        if self.status in ("failed", "cancelled"):
            report = await self.execute("query-migrate")
            raise MigratedError(f"QEMU's migration {self.status}: {report.get('error-desc', '')}")

    async def when(self, event: str, limit_seconds: float = 10) -> float:
        """Wait for STOP, RESUME or a status of the migration, and return its wall clock time."""
        async with within(limit_seconds, f"QEMU's {event}"):
            while event not in self._seen:
                await self.follow()
        return self._seen[event]


async def move(
    link: Link,
    load: str,
    *,
    system: str,
    memory_bytes: int,
    memory: Memory = "memfd",
    page_bytes: int = 2 * MIB,
    limit_seconds: float = 60,
    downtime_limit_ms: float = 50,
    streams: int | None = None,
    guest_load: dict[str, Any] | None = None,
    extra: tuple[str, ...] = (),
    tls: Path | None = None,
    before: Callable[[Watched], Awaitable[Any]] | None = None,
) -> Sample:
    """Migrate a guest under ``load`` once.

    ``streams``: multifd with so many channels, None: one connection; ``extra``: options of QEMU; ``tls``: directory of both
    sides' certificates.
    """
    if tls is not None:
        for end in ("client", "server"):
            extra = (*extra, "-object", f"tls-creds-x509,id={end},dir={tls},endpoint={end},verify-peer=on")
    sample = Sample(system=system, path=link.name, load=load, memory_bytes=memory_bytes)
    async with guest_at_work(
        link, guest_load or LOADS[load], memory_bytes=memory_bytes, memory=memory, page_bytes=page_bytes, extra=extra
    ) as watched:
        if before is not None:
            await before(watched)
        incoming = dataclasses.replace(watched.guest, name="in", extra=(*watched.guest.extra, "-incoming", "defer"))
        log = watched.guest.directory / "in.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *link.target_prefix,
                *incoming.source_command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            async with (
                Machine.connected(watched.guest.source_qmp) as source,
                Machine.connected(incoming.source_qmp) as target,
            ):
                for machine, end in ((source, "client"), (target, "server")):
                    await machine.prepare(system, downtime_limit_ms, streams, tls=end if tls is not None else "")
                await watched.console.attach(watched.guest.source_serial)
                await _move(sample, watched, incoming.source_serial, source, target, process.pid, link, limit_seconds)
        except (MigratedError, QMPError, OSError, TimeoutError) as error:
            sample.outcome = f"{type(error).__name__}: {error}"
            sample.details["target_log"] = log.read_text(errors="replace")[-1000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.wait_for(process.wait(), 10)
    return sample


async def _move(
    sample: Sample,
    watched: Watched,
    arrived: Path,
    source: Machine,
    target: Machine,
    target_pid: int,
    link: Link,
    limit_seconds: float,
) -> None:
    await watched.observe()
    sample.operations_before = watched.operations_before
    await target.execute("migrate-incoming", {"uri": f"tcp:{link.target_address}:{PORT}"})
    await watched.console.attach(arrived)
    meter = Meter()
    meter.watch(watched.pid)
    meter.watch(target_pid)
    wire = link.wire_bytes(watched.pid)
    began, began_wall = time.monotonic(), time.time()
    async with meter:
        await source.execute("migrate", {"uri": f"tcp:{link.target_address}:{PORT}"})
        switched, report = await _follow(sample, source, limit_seconds)
        if report["status"] != "completed":
            sample.wire_bytes = link.wire_bytes(watched.pid) - wire
            sample.outcome = f"no end in {limit_seconds:g} s"
            sample.details["ram"] = report.get("ram")
            sample.cpu_seconds = meter.cpu_seconds
            return
        # The incoming side finishes slightly after the source.
        ends = await source.when("completed"), await target.when("completed", limit_seconds)
    sample.total_seconds = max(ends) - began_wall
    sample.wire_bytes = link.wire_bytes(watched.pid) - wire
    sample.downtime_seconds = await target.when("RESUME") - await source.when("STOP")
    sample.stall_seconds = await watched.stall_seconds(sample.downtime_seconds)
    sample.operations_during = watched.console.operations_per_second(began, switched)
    sample.cpu_seconds = meter.cpu_seconds
    sample.extra_memory_bytes = meter.peak_memory_bytes
    if watched.guest.memory == "private":  # where the meter counts the guest's own memory on the target as well
        sample.extra_memory_bytes -= sample.memory_bytes
    sample.details = {key: report.get(key) for key in ("total-time", "downtime", "setup-time", "ram")}
    sample.verified = await watched.verify()


async def _follow(sample: Sample, source: Machine, limit_seconds: float) -> tuple[float, dict[str, Any]]:
    """Wait for the end, and start post-copy after the first pass if requested.

    Returns the time at which pre-copy ended, and QEMU's last report.
    """
    switched = 0.0
    try:
        async with asyncio.timeout(limit_seconds) as limit:
            while source.status != "completed":
                await source.follow()
                if (
                    sample.system == "qemu-postcopy"
                    and not switched
                    and source.status == "active"
                    and source.passes > 1
                ):
                    await source.execute("migrate-start-postcopy")
                    switched = time.monotonic()
    except TimeoutError:
        if not limit.expired():
            raise
    return switched or time.monotonic(), await source.execute("query-migrate")
