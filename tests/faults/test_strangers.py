"""Ten thousand hostile connections during migrations: they complete, and nothing of the strangers is left."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from migrated.waiting import within
from tests.faults.rig import LIMIT_SECONDS, Rig, guest_mappings, rig
from tests.faults.strangers import ON_STATUS, ON_TARGET
from tests.rig.pki import Pki

pytestmark = [pytest.mark.root, pytest.mark.slow]

#: Far from what two busy processors need, since the strangers use them, too.
TIMEOUTS = dict.fromkeys(
    ("connect", "handshake", "guest_start", "guest_command", "guest_pause", "guest_state", "switchover"), 20.0
) | {"abort": 20.0, "release": 20.0, "heartbeat_limit": 10.0}


async def monitor(made: Rig) -> None:
    """What a monitoring system does, each time on a new connection."""
    while True:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http,
            http.get(f"http://{made.status}/healthz") as answer,
        ):
            assert answer.status == 200, await answer.text()
        await asyncio.sleep(0.02)


async def released(made: Rig) -> None:
    """Until the target agent has let go of the guest's memory: before, a new migration of it is refused."""
    async with within(LIMIT_SECONDS, "the target agent to release the guest's memory"):
        while guest_mappings(made.target.pid):  # noqa: ASYNC110 - the kernel is asked
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def strangers(made: Rig, session: str) -> AsyncIterator[asyncio.Task[bytes]]:
    """All of them; the task ends when the last has connected."""
    host, port = made.proxy.target
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.faults.strangers", f"{host}:{port}", made.status, session),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield asyncio.create_task(process.stdout.readline())
        await process.communicate(b"")  # ends its input
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_ten_thousand_hostile_connections_do_not_disturb_a_running_migration(
    guest_program: Path, tmp_path: Path
) -> None:
    tls = Pki(tmp_path).tables()
    async with rig(guest_program, prove=False, target_status=True, timeouts=TIMEOUTS, rate=500, tls=tls) as made:
        # Slow migrations, so that the strangers have the processors.
        options = {"to": "{}:{}".format(*made.proxy.target), "downtime_limit_ms": 300.0, "max_bandwidth": "10MB"}
        assert (await made.migrate(mode="hybrid", **options))["state"] == "completed", made.logs()
        await made.settle_baseline()
        guest = await made.sound()
        monitoring = asyncio.create_task(monitor(made))
        session = await made.begin(mode="hybrid", **options)
        async with strangers(made, session) as through:
            migrations = [await made.over()]
            # All that each of these needs, control and page connections, is dialled among strangers.
            while not through.done() or len(migrations) < 3:
                assert not monitoring.done(), monitoring.result()
                await released(made)
                mode = ("precopy", "postcopy", "hybrid")[len(migrations) % 3]
                migrations.append(await made.migrate(mode=mode, **options))
            assert (await through).decode() == f"{ON_TARGET} and {ON_STATUS}\n"
        for result in migrations:
            assert result["state"] == "completed", f"{result}\n{made.logs()}"
        assert not monitoring.done(), monitoring.result()
        monitoring.cancel()
        assert await made.sound() != guest  # every byte, in one place; no descriptor left
