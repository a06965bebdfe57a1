from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from migrated import config, daemon
from tests.unit.http_cli.fake_agent import FakeAgent


class Served:
    """A fake agent behind the daemon's real sites, in this process; the command line as a process of its own."""

    def __init__(self, agent: FakeAgent, settings: config.AgentConfig, status_port: int) -> None:
        self.agent = agent
        self.settings = settings
        self.status_url = f"http://127.0.0.1:{status_port}"

    async def cli(self, *arguments: str, agent: str | None = None) -> tuple[int, str, str]:
        process = await self.cli_process(*arguments, agent=agent)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode is not None
        assert "Traceback" not in err.decode()
        return process.returncode, out.decode(), err.decode()

    async def cli_process(self, *arguments: str, agent: str | None = None) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "migrated", *arguments, "--agent", agent or str(self.settings.state_dir)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    @contextlib.asynccontextmanager
    async def control(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(str(self.settings.control_socket))
        async with aiohttp.ClientSession("http://agent", connector=connector) as session:
            yield session

    @contextlib.asynccontextmanager
    async def status(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(self.status_url) as session:
            yield session


def settings_for(directory: Path, role: config.Role, status: str, **tables: dict[str, Any]) -> config.AgentConfig:
    table: dict[str, Any] = {
        "agent": {"state_dir": str(directory / "state"), "name": "host-a"},
        "http": {"status": status},
        "tls": {"insecure": True},
        "timeouts": {"shutdown": 5},
        **tables,
    }
    return config.decode(table, role)


@contextlib.asynccontextmanager
async def serving(directory: Path, role: config.Role, port: int, **tables: dict[str, Any]) -> AsyncIterator[Served]:
    agent = FakeAgent(role)
    settings = settings_for(directory, role, f"127.0.0.1:{port}", **tables)
    stop = asyncio.Event()
    task = asyncio.create_task(daemon.serve(settings, agent, stop))
    started = asyncio.create_task(agent.started.wait())
    try:
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield Served(agent, settings, port)
    finally:
        started.cancel()
        stop.set()
        await task
