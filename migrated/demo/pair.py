"""Run two agents on this machine as separate daemons.

Like an operator, this module drives them over their control sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import aiohttp

from migrated.errors import HostError, MigratedError, TimeoutExceededError
from migrated.waiting import within

START_SECONDS = 30
STOP_SECONDS = 30
_FIRST_PORT, _PORTS = 20000, 12000

#: In an order of its own in each process, so that two that run at once are unlikely to meet.
_ports = itertools.cycle(random.sample(range(_FIRST_PORT, _FIRST_PORT + _PORTS), _PORTS))


def free_port() -> int:
    """Return a TCP port of the loopback address on which nobody listens.

    An agent binds it later, and again after a restart.  Until then neither the kernel nor another call may hand it out: it is
    below the ports that Linux assigns to connections by default, and no call returns a port twice.
    """
    while True:
        port = next(_ports)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class AgentProcess:
    """One agent: its configuration file, its process, its control socket."""

    def __init__(
        self,
        role: str,
        directory: Path,
        table: dict[str, Any],
        *,
        prefix: tuple[str, ...] = (),
        program: tuple[str, ...] = (sys.executable, "-P", "-m", "migrated"),
    ) -> None:
        self.role = role
        self.directory = directory
        self.state_dir = directory / role
        self.config_path = directory / f"{role}.toml"
        self.log_path = directory / f"{role}.log"
        self.table = table
        self.process: asyncio.subprocess.Process | None = None
        self._command = (*prefix, *program)  # prefix: such as ("ip", "netns", "exec", "ns1")

    @property
    def socket(self) -> Path:
        """The control socket."""
        return self.state_dir / "control.sock"

    @property
    def pid(self) -> int:
        """The pid of the running agent."""
        if self.process is None:
            raise MigratedError(f"the {self.role} agent is not running")
        return self.process.pid

    async def start(self) -> None:
        """Start the agent and wait until it is ready."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(to_toml({"agent": {"state_dir": str(self.state_dir)}, **self.table}))
        with self.log_path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._command,
                *(self.role, "--config", str(self.config_path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        async with within(START_SECONDS, f"the {self.role} agent to be ready ({self.log_path})"):
            while not await self._ready():
                if self.process.returncode is not None:
                    raise HostError(
                        f"the {self.role} agent exited at once with status {self.process.returncode}:\n{self.log_tail()}"
                    )
                await asyncio.sleep(0.02)

    def log_tail(self, lines: int = 12) -> str:
        """Return the end of the agent's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    async def _ready(self) -> bool:
        try:
            return bool((await self.request("GET", "/v1/agent"))["ready"])
        except (OSError, aiohttp.ClientError):
            return False

    async def stop(self) -> int:
        """Send SIGTERM and wait; return the exit status (-9 if the agent had to be killed)."""
        process, self.process = self.process, None
        if process is None:
            return 0
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with within(STOP_SECONDS, f"the {self.role} agent to end"):
                    await process.wait()
            except TimeoutExceededError:
                process.kill()
                await process.wait()
        return int(process.returncode or 0)

    async def kill(self) -> None:
        """Send SIGKILL, to simulate a crash."""
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call the control API once; MigratedError with the agent's message if it refuses."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session,
            session.request(method, f"http://agent{path}", json=body) as answer,
        ):
            data: dict[str, Any] = await answer.json()
            if answer.status >= 400:
                error = data.get("error", {})
                raise MigratedError(
                    str(error.get("message", answer.status)), code=error.get("code"), hint=error.get("hint", "")
                )
            return data

    async def record(self, migration_id: str) -> dict[str, Any]:
        """Return a migration's record."""
        return await self.request("GET", f"/v1/migrations/{migration_id}")

    async def events(self, migration_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the records as they change, until the migration has ended."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket)), timeout=timeout) as session,
            session.get(f"http://agent/v1/migrations/{migration_id}/events") as answer,
        ):
            async for line in answer.content:
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])

    async def wait(
        self, migration_id: str, *states: str, limit_seconds: float = 120, ended: bool = True
    ) -> dict[str, Any]:
        """Wait until the migration is in one of these states (or, with ``ended``, has ended)."""
        what = f"{self.role} migration {migration_id} to be {' or '.join(states) or 'over'}"
        async with within(limit_seconds, what):
            async for record in self.events(migration_id):
                over = record["state"] in ("completed", "aborted", "failed")
                if record["state"] in states or (ended and over):
                    return record
        return await self.record(migration_id)


def to_toml(table: dict[str, Any]) -> str:
    """Return enough TOML for a configuration: tables of tables, strings, numbers, booleans, lists of strings."""
    lines: list[str] = []

    def emit(path: tuple[str, ...], entries: dict[str, Any]) -> None:
        plain = {key: value for key, value in entries.items() if not isinstance(value, dict)}
        if path and (plain or not entries):
            lines.append("[" + ".".join(json.dumps(part) for part in path) + "]")
        lines.extend(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in plain.items())
        for key, value in entries.items():
            if isinstance(value, dict):
                emit((*path, key), value)

    emit((), table)
    return "\n".join(lines) + "\n"


class AgentPair:
    """A source and a target agent in one directory, which must have a short path (Unix sockets live there)."""

    def __init__(
        self,
        directory: Path,
        *,
        source_guests: dict[str, dict[str, Any]],
        target_guests: dict[str, dict[str, Any]],
        source_prefix: tuple[str, ...] = (),
        target_prefix: tuple[str, ...] = (),
        listen_host: str = "127.0.0.1",
        extra: dict[str, Any] | None = None,
    ) -> None:
        port = free_port() if listen_host == "127.0.0.1" else 7440
        self.address = f"{listen_host}:{port}"
        tls = {"insecure": True, "trusted_network": listen_host != "127.0.0.1"}
        common: dict[str, Any] = {"tls": tls, "http": {"status": ""}, **(extra or {})}
        self.source = AgentProcess("source", directory, {**common, "guests": source_guests}, prefix=source_prefix)
        self.target = AgentProcess(
            "target",
            directory,
            {**common, "listen": {"address": self.address}, "guests": target_guests},
            prefix=target_prefix,
        )

    async def __aenter__(self) -> Self:
        await self.target.start()
        await self.source.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.source.stop()
        await self.target.stop()

    async def start(self, guest: str, **options: Any) -> str:
        """Start a migration; return its id."""
        body = {"guest": guest, "to": self.address, **options}
        return str((await self.source.request("POST", "/v1/migrations", body))["id"])

    async def migrate(self, guest: str, *, limit_seconds: float = 120, **options: Any) -> dict[str, Any]:
        """Migrate and wait for the end on both sides; return the source's record, with the target's faults."""
        migration = await self.start(guest, **options)
        record = await self.source.wait(migration, limit_seconds=limit_seconds)
        if record["state"] == "completed":
            other = await self.target.wait(migration, limit_seconds=limit_seconds)
            record["faults"], record["fault_seconds"] = other["faults"], other["fault_seconds"]
            record["target"] = other
        return record


def short_directory() -> str:
    """Return where to make a temporary directory: a long TMPDIR would make socket paths too long."""
    return "/tmp" if len(os.environ.get("TMPDIR", "")) > 20 else os.environ.get("TMPDIR", "/tmp")  # noqa: S108 - sockets need short paths
