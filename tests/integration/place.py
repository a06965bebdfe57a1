"""Two agents on this machine, guests that co-operate, and the command line: what an operator has before him."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from migrated.demo.console import GuestConsole
from migrated.demo.pair import AgentPair, AgentProcess, free_port, short_directory
from migrated.guests.process.client import ENVIRONMENT
from migrated.waiting import within
from tests.rig import supervisor

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
#: Nothing waits this long unless something is broken.
PATIENCE_SECONDS = 60.0
#: Guests of the configuration and what they do: blocks written a second, where (the idle one touches nothing unasked).
NAMES = {
    "g0": ("--rate", "2000"),
    "g1": ("--rate", "2000", "--pattern", "hot"),
    "g2": ("--rate", "500"),
    "idle": ("--pattern", "idle"),
    "busy": ("--rate", "max", "--pattern", "dense"),
    "python": ("--rate", "1000"),
}
#: So slow that a migration is under way for as long as a test likes.
CRAWL = "500KB"
TIMEOUTS = {"handshake": 2.0, "connect": 3.0, "abort": 5.0, "shutdown": 5.0, "reconnect_interval": 0.1}


def build_guest(directory: Path) -> Path:
    """Compile the example guest in C; raises CalledProcessError, FileNotFoundError without a compiler."""
    program = directory / "process_guest"
    includes = (f"-I{ROOT / 'native/include'}", f"-I{ROOT / 'migrated/demo/images'}")
    source = ROOT / "native/examples/process_guest.c"
    subprocess.run(
        ["cc", "-std=gnu11", "-O2", "-pthread", *includes, "-o", str(program), str(source)], check=True, timeout=120
    )
    return program


class Cli:
    """What a command said and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> dict[str, Any]:
        """The last line of its output."""
        table: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return table

    def __repr__(self) -> str:
        return f"status {self.code}\n{self.out}\n{self.err}"


class Guest:
    """One guest, wherever it is.  Its memory is small, its blocks check themselves."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        self.console = GuestConsole(name)
        self._place = place
        self._process: asyncio.subprocess.Process | None = None
        self._moves = 0

    async def start(self) -> None:
        """Start it below the source agent; returns when its memory is filled and it runs."""
        console = self._place.directory / f"{self.name}.tty"
        with (self._place.directory / f"{self.name}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._place.command(self.name, console),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, ENVIRONMENT: str(self._place.socket(self.name))},
                start_new_session=True,
            )
        await self.console.attach(console, PATIENCE_SECONDS)
        await self.console.stats(PATIENCE_SECONDS)  # which it says only once its memory is filled

    async def arrived(self) -> None:
        """It has moved: talk to it where it is now."""
        await self.console.attach(self._place.arrival(self.name), PATIENCE_SECONDS)
        await self.assert_sound()

    async def assert_sound(self) -> None:
        """It runs, it goes on working, and all of its memory is what it wrote."""
        before = await self.console.stats(PATIENCE_SECONDS)
        swept = await self.console.sweep(PATIENCE_SECONDS)
        after = await self.console.stats(PATIENCE_SECONDS)
        assert (swept.wrong, swept.errors, after.errors, self.console.corrupt) == (0, 0, 0, [])
        assert swept.blocks == self._place.memory_bytes // 4096
        assert after.seconds > before.seconds

    async def ended(self) -> int:
        """Wait until the process that was started first has ended: how."""
        assert self._process is not None
        async with within(PATIENCE_SECONDS, f"{self.name} to end"):
            return await self._process.wait()

    async def stop(self) -> None:
        with contextlib.suppress(Exception):
            await self.console.command("quit")
        await self.console.close()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Place:
    """The agents, their guests' tables, and everything's directory."""

    def __init__(
        self,
        directory: Path,
        program: Path,
        *,
        memory_bytes: int,
        timeouts: dict[str, float],
        tls: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.directory = directory
        self.memory_bytes = memory_bytes
        self._program = program
        self._guests: list[Guest] = []
        self.pair = AgentPair(
            directory,
            source_guests={
                name: {"driver": "process", "socket": str(self.socket(name)), "page_size": "4K"} for name in NAMES
            }
            | {"nobody": {"driver": "process", "socket": str(directory / "nobody.sock"), "page_size": "4K"}},
            target_guests={
                name: {"driver": "process", "page_size": "4K", "command": self.command(name, self.arrival(name))}
                for name in NAMES
            },
            extra={"timeouts": timeouts},
        )
        self.status_ports = {}
        for agent in (self.source, self.target):
            self.status_ports[agent.role] = free_port()
            agent.table["http"] = {"status": f"127.0.0.1:{self.status_ports[agent.role]}"}
            if tls is not None:
                agent.table["tls"] = tls[agent.role]

    @property
    def source(self) -> AgentProcess:
        return self.pair.source

    @property
    def target(self) -> AgentProcess:
        return self.pair.target

    @property
    def address(self) -> str:
        return self.pair.address

    def socket(self, name: str) -> Path:
        """Where the source listens for a guest."""
        return self.directory / f"{name}.sock"

    def arrival(self, name: str) -> Path:
        """The console of a guest that has arrived."""
        return self.directory / f"{name}.1.tty"

    def command(self, name: str, console: Path) -> list[str]:
        program = [sys.executable, "-m", "migrated.demo.example"] if name == "python" else [str(self._program)]
        return [*program, "--size", str(self.memory_bytes // MIB), *NAMES[name], "--console", str(console)]

    async def guest(self, name: str = "g0") -> Guest:
        """A new guest below the source."""
        guest = Guest(self, name)
        self._guests.append(guest)
        await guest.start()
        return guest

    async def without_guests(self) -> None:
        """End all of them, and what has arrived of them."""
        while self._guests:
            await self._guests.pop().stop()

    async def cli(self, verb: str, *arguments: str, agent: str = "source") -> Cli:
        """Run a command against an agent."""
        state_dir = (self.source if agent == "source" else self.target).state_dir
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "migrated", verb, *arguments, "--agent", str(state_dir)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with within(PATIENCE_SECONDS, f"migrated {verb}"):
                out, err = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        assert b"Traceback" not in err, err.decode()
        return Cli(process.returncode, out.decode(), err.decode())

    async def start(self, name: str = "g0", **options: Any) -> str:
        """Start a migration; its id."""
        return await self.pair.start(name, **options)

    async def precopying(self, name: str = "g0", **options: Any) -> str:
        """Start one that crawls, and wait until pages are on their way; its id."""
        migration = await self.start(name, **{"max_bandwidth": CRAWL, **options})
        await self.until(migration, lambda record: record["state"] == "precopy" and record["transferred_bytes"] > 0)
        return migration

    async def until(self, migration: str, condition: Any, agent: str = "source") -> dict[str, Any]:
        """The first record that fits; an AssertionError when it ends before."""
        side = self.source if agent == "source" else self.target
        async with (
            within(PATIENCE_SECONDS, f"{migration} on the {agent}"),
            contextlib.aclosing(
                side.events(migration)  # type: ignore[type-var]
            ) as events,
        ):
            async for record in events:
                if condition(record):
                    return dict(record)
        raise AssertionError(await side.record(migration))

    async def over(self, migration: str, agent: str = "source") -> dict[str, Any]:
        """The record once it has ended."""
        side = self.source if agent == "source" else self.target
        return await side.wait(migration, limit_seconds=PATIENCE_SECONDS)

    async def get(self, path: str, agent: str = "source") -> str:
        """From the status site."""
        url = f"http://127.0.0.1:{self.status_ports[agent]}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.text()

    def logged(self, agent: str, level: str) -> list[dict[str, Any]]:
        """What an agent said at this level."""
        side = self.source if agent == "source" else self.target
        lines = [json.loads(line) for line in side.log_path.read_text().splitlines()]
        return [line for line in lines if line["level"] == level]

    def left_of(self, name: str) -> list[int]:
        """Processes that run as the arriving side of a guest."""
        mark = os.fsencode(self.arrival(name))
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and mark in Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry))
        return found


@contextlib.asynccontextmanager
async def place(
    program: Path,
    *,
    memory_bytes: int = 16 * MIB,
    timeouts: dict[str, float] | None = None,
    prepare: Callable[[Place], None] = lambda _: None,
    tls: dict[str, dict[str, Any]] | None = None,
) -> AsyncIterator[Place]:
    """Both agents up, after ``prepare``; in the end they must have had nothing to complain of.

    ``tls``: a table [tls] for each role.
    """
    with supervisor.directory("mgi-", short_directory()) as directory:
        limits = {**TIMEOUTS, **(timeouts or {})}
        here = Place(directory, program, memory_bytes=memory_bytes, timeouts=limits, tls=tls)
        prepare(here)
        try:
            async with here.pair:
                try:
                    yield here
                finally:
                    await here.without_guests()
        finally:
            for name in NAMES:
                for pid in here.left_of(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
        for agent in ("source", "target"):
            assert here.logged(agent, "error") == []
