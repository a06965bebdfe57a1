"""A source host with many small guests that check themselves, and target hosts for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

from migrated.demo.pair import AgentProcess, short_directory
from migrated.demo.qemu_guest import QemuGuest, RunningQemu
from migrated.demo.run import cache_directory
from migrated.waiting import within
from tests.integration.place import Cli, Guest, Place
from tests.rig import supervisor, traces
from tests.rig.host import Host

MIB = 1 << 20
#: Nothing waits this long unless something is broken, or the machine very busy.
PATIENCE_SECONDS = 150.0


class Home:
    """What a `Guest` asks of its place."""

    def __init__(self, site: Site, name: str) -> None:
        self.directory = site.directory
        self.memory_bytes = site.sizes_mib[name] * MIB
        self.command = site.command
        self.socket = site.socket
        self.arrival = site.arrival


class Site:
    """``hosts[0]`` is to be evacuated to the others.  Guests have 4 KiB pages."""

    def __init__(
        self,
        directory: Path,
        program: Path,
        hosts: Sequence[Host],
        sizes_mib: dict[str, int],
        rate: int,
        qemus_mib: dict[str, int],
    ) -> None:
        self.directory = directory
        self.hosts = hosts
        self.sizes_mib = sizes_mib
        self.guests: dict[str, Guest] = {}
        self.commands: list[asyncio.subprocess.Process] = []
        self._program = program
        self._rate = rate
        self._where: dict[str, Host] = {}  # of guests that have arrived
        self.qemus = [
            RunningQemu(
                QemuGuest(
                    directory=directory,
                    cache=cache_directory(),
                    name=name,
                    kind="boot",
                    memory_bytes=size * MIB,
                    page_bytes=4096,
                    load={"rate": 2000, "pattern": "hot", "sweep_seconds": 0},
                )
            )
            for name, size in qemus_mib.items()
        ]
        for qemu in self.qemus:
            hosts[0].source_guests[qemu.guest.name] = qemu.guest.source_table()
            for index, host in enumerate(hosts[1:], 1):
                host.target_guests[qemu.guest.name] = qemu.guest.target_table(index)
        for name in sizes_mib:
            hosts[0].source_guests[name] = {"driver": "process", "socket": str(self.socket(name)), "page_size": "4K"}
            for host in hosts[1:]:
                host.target_guests[name] = {
                    "driver": "process",
                    "page_size": "4K",
                    "command": self.command(name, self._console(name, host)),
                }

    @property
    def to(self) -> str:
        """The value of --to."""
        return ",".join(host.address for host in self.hosts[1:])

    def socket(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def _console(self, name: str, host: Host) -> Path:
        return self.directory / f"{name}.{host.name}.tty"

    def arrival(self, name: str) -> Path:
        return self._console(name, self._where[name])

    def command(self, name: str, console: Path) -> list[str]:
        size = ("--size", str(self.sizes_mib[name]))
        return [str(self._program), *size, "--rate", str(self._rate), "--console", str(console)]

    # ------------------------------------------------------------ life

    async def start(self) -> AgentProcess:
        """Start the agents and the guests; return the source agent."""
        await asyncio.gather(*(qemu.start() for qemu in self.qemus))
        source, *_ = await asyncio.gather(self.hosts[0].source(), *(host.target() for host in self.hosts[1:]))
        for name in self.sizes_mib:
            self.guests[name] = Guest(cast("Place", Home(self, name)), name)
        await asyncio.gather(*(guest.start() for guest in self.guests.values()))
        async with within(PATIENCE_SECONDS, "the guests to be connected"):
            while not await self._all_movable(source):  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.05)
        return source

    async def _all_movable(self, source: AgentProcess) -> bool:
        return all(guest["migratable"] for guest in (await source.request("GET", "/v1/guests"))["guests"])

    async def end(self) -> None:
        """Whatever state things are in."""
        for command in self.commands:
            if command.returncode is None:
                command.kill()
                await command.communicate()
        for host in self.hosts:
            await host.stop()
        for guest in self.guests.values():
            await guest.stop()
        for qemu in self.qemus:
            await qemu.stop()
        traces.end_processes(self.directory)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def processes(self, name: str = "") -> list[int]:
        """Processes of a guest, or of all."""
        mark = os.fsencode(str(self.directory / (name and f"{name}.")))
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0") if entry.isdigit() else []
                if words[:1] == [os.fsencode(self._program)] and any(word.startswith(mark) for word in words):
                    found.append(int(entry))
        return found

    # ------------------------------------------------------------ evacuations

    def arguments(self, *arguments: str) -> tuple[str, ...]:
        state_dir = str(self.hosts[0].directory / "source")
        return (sys.executable, "-m", "migrated", "evacuate", *arguments, "--agent", state_dir)

    async def command_line(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start ``migrated evacuate``."""
        process = await asyncio.create_subprocess_exec(
            *self.arguments(*arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.commands.append(process)
        return process

    async def evacuate(self, *arguments: str) -> Cli:
        """Run ``migrated evacuate`` to its end."""
        return await self.over(await self.command_line(*arguments))

    async def over(self, process: asyncio.subprocess.Process) -> Cli:
        """Wait for the end of the command."""
        async with within(PATIENCE_SECONDS, "migrated evacuate to end"):
            out, err = await process.communicate()
        assert process.returncode is not None
        assert b"Traceback" not in err, err.decode()
        return Cli(process.returncode, out.decode(), err.decode())

    async def now(self) -> dict[str, Any]:
        """The last evacuation as it is."""
        source = await self.hosts[0].source()
        evacuations = (await source.request("GET", "/v1/evacuations"))["evacuations"]
        return dict(evacuations[-1]) if evacuations else {"guests": [], "ended_at": None}

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the last evacuation fits; AssertionError if it ends before."""
        async with within(PATIENCE_SECONDS, "the evacuation to go on"):
            while not condition(evacuation := await self.now()):
                assert evacuation["ended_at"] is None, self.explain(evacuation)
                await asyncio.sleep(0.05)
        return evacuation

    async def verify(self, evacuation: dict[str, Any]) -> None:
        """Every guest runs in one place, where the evacuation says, with all that it has written."""
        qemus = {qemu.guest.name: qemu for qemu in self.qemus}
        for move in evacuation["guests"]:
            if move["guest"] in qemus:
                assert move["state"] == "completed"
                await self._verify_qemu(qemus[move["guest"]], move["target"])
        await asyncio.gather(*(self._verify(move) for move in evacuation["guests"] if move["guest"] in self.guests))

    async def _verify_qemu(self, qemu: RunningQemu, target: str) -> None:
        (index,) = [number for number, host in enumerate(self.hosts) if host.address == target]
        await qemu.console.attach(qemu.guest.target_serial(index), PATIENCE_SECONDS)
        before = await qemu.console.stats(PATIENCE_SECONDS)
        swept = await qemu.console.sweep(PATIENCE_SECONDS)
        after = await qemu.console.stats(PATIENCE_SECONDS)
        assert (swept.wrong, swept.errors, after.errors, qemu.console.corrupt) == (0, 0, 0, [])
        assert swept.blocks * 4096 > qemu.guest.memory_bytes // 4
        assert after.operations > before.operations

    async def _verify(self, move: dict[str, Any]) -> None:
        guest = self.guests[move["guest"]]
        if move["state"] == "completed":
            self._where[guest.name] = next(host for host in self.hosts if host.address == move["target"])
            await guest.arrived()
        else:
            await guest.assert_sound()
        async with within(PATIENCE_SECONDS, f"other processes of {guest.name} to end"):
            while len(self.processes(guest.name)) != 1:  # noqa: ASYNC110 - nobody reports it
                await asyncio.sleep(0.05)

    async def migrations(self, guest: str) -> list[dict[str, Any]]:
        """The source's records of a guest."""
        source = await self.hosts[0].source()
        records = (await source.request("GET", "/v1/migrations"))["migrations"]
        return [record for record in records if record["guest"] == guest]

    def explain(self, evacuation: dict[str, Any]) -> str:
        """An unexpected evacuation, and the last words of all agents."""
        told = [json.dumps(evacuation, indent=1)]
        for host in self.hosts:
            for role in ("source", "target"):
                told += [f"{host.name} {role}: {event}" for event in host.events(role)[-15:]]
        return "\n".join(told)

    def complaints(self) -> list[str]:
        """What the agents have logged as errors."""
        return [str(event) for host in self.hosts for event in host.complaints()]


@contextlib.asynccontextmanager
async def site(
    program: Path,
    sizes_mib: dict[str, int],
    *,
    hosts: Sequence[dict[str, Any]] = ({}, {}, {}),
    rate: int = 500,
    qemus_mib: dict[str, int] | None = None,
    **config: Any,
) -> AsyncIterator[Site]:
    """Agents and guests, all up.  ``hosts``: arguments of `Host`; ``config``: sections for all agents."""
    with supervisor.directory("mge-", short_directory()) as directory:
        common = {"timeouts": {"shutdown": 5.0, "reconnect_interval": 0.1}, **config}
        made = [
            Host(directory, name, **{**arguments, "config": {**common, **arguments.get("config", {})}})
            for name, arguments in zip("abcdefgh", hosts, strict=False)
        ]
        here = Site(directory, program, made, sizes_mib, rate, qemus_mib or {})
        try:
            await here.start()
            yield here
        finally:
            await here.end()
