"""Measure the path itself with iperf3, run where the agents run."""

from __future__ import annotations

import asyncio
import dataclasses
import json

from benchmarks.network import Link
from migrated.errors import HostError
from migrated.waiting import within

PORT = 7460
SECONDS = 2


@dataclasses.dataclass(frozen=True)
class Limit:
    """Throughput of iperf3, and the processor time of both its sides."""

    bytes_per_second: float
    cpu_seconds_per_gigabyte: float


async def measure(link: Link, streams: int) -> Limit:
    """Measure what arrives at the target's side over ``streams`` connections."""
    server = await asyncio.create_subprocess_exec(
        *link.target_prefix,
        *("iperf3", "--server", "--one-off", "--port", str(PORT), "--forceflush"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        if server.stdout is None:
            raise HostError("iperf3 has no output")
        async with within(10, "iperf3 to listen"):
            while b"listening" not in (line := await server.stdout.readline()):
                if not line:
                    raise HostError("iperf3 did not start to listen")
        client = await asyncio.create_subprocess_exec(
            *link.source_prefix,
            *("iperf3", "--client", link.target_address, "--port", str(PORT), "--json"),
            *("--parallel", str(streams), "--time", str(SECONDS)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await asyncio.wait_for(client.communicate(), SECONDS + 20)
        finally:
            if client.returncode is None:
                client.kill()
    finally:
        if server.returncode is None:
            server.kill()
        await server.wait()
    report = json.loads(output)
    if "end" not in report or "sum_received" not in report["end"]:
        raise HostError(f"iperf3: {report.get('error', 'no result')}")
    end = report["end"]
    speed = float(end["sum_received"]["bits_per_second"]) / 8
    used = end["cpu_utilization_percent"]
    return Limit(speed, (used["host_total"] + used["remote_total"]) / 100 / speed * 1e9)
