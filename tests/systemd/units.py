"""Agents as units of a booted machine, in place of the processes that `tests.rig.host` starts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from migrated.demo.pair import AgentProcess, to_toml
from migrated.demo.qemu_guest import QemuGuest
from tests.rig.guest import MovingGuest
from tests.rig.host import Host
from tests.systemd.machine import Machine

STATE = Path("/run/migrated")
MIB = 1 << 20
PATIENCE_SECONDS = 60.0


class UnitAgent(AgentProcess):
    """``migrated-ROLE.service`` on its defaults: its files are where they are on a real host."""

    def __init__(self, role: str, machine: Machine, directory: Path, table: dict[str, Any]) -> None:
        super().__init__(role, directory, table)
        self.machine = machine
        self.unit = f"migrated-{role}.service"
        self.state_dir = STATE / role
        self.config_path = machine.path(f"/etc/migrated/{role}.toml")
        self._before = len(self._journal())

    @property
    def socket(self) -> Path:
        return self.machine.path(self.state_dir / "control.sock")

    @property
    def pid(self) -> int:
        """On the machine."""
        return int(self.show("MainPID"))

    def show(self, name: str) -> str:
        """One property of the unit."""
        return self.machine.show(self.unit, name)[name]

    async def start(self, *, configure: bool = True) -> None:
        """Configure and start; systemctl returns once the agent has said READY."""
        if configure:
            self.config_path.write_text(to_toml(self.table))
        try:
            await self._systemctl("start")
        except AssertionError as error:
            said = self.machine.run("journalctl", "--lines=30", "--quiet", f"--unit={self.unit}")
            raise AssertionError(f"{error}\n{said}") from error

    async def reaches(self, state: str) -> None:
        """Wait until the unit is ``active``, ``deactivating``, ``failed`` …"""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.show("ActiveState") != state:  # noqa: ASYNC110 - systemctl cannot wait for this
                await asyncio.sleep(0.05)

    async def stop(self) -> int:
        await self._systemctl("stop")
        self.machine.run("systemctl", "reset-failed", self.unit, check=False)
        return 0

    async def kill(self) -> None:
        """As a crash would; systemd starts it again."""
        await self.signal("KILL")

    async def signal(self, name: str) -> None:
        """Send a signal to the agent alone."""
        await self._systemctl("kill", f"--signal={name}", "--kill-who=main")

    async def restarted(self, former: int) -> None:
        """Wait until systemd runs another process than ``former``, which answers."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.pid in {0, former} or not await self._ready():  # noqa: ASYNC110 - systemctl cannot wait for this
                await asyncio.sleep(0.05)

    async def _systemctl(self, verb: str, *options: str) -> None:
        await asyncio.to_thread(self.machine.run, "systemctl", verb, *options, self.unit)

    # ------------------------------------------------------------ its log

    def _journal(self) -> list[str]:
        # Not --unit: the journal does not know that of a process that has ended already.
        identifier = f"--identifier={self.unit.removesuffix('.service')}"
        return self.machine.run("journalctl", "--output=cat", "--quiet", identifier).splitlines()

    def log_lines(self) -> list[str]:
        """What it has written since this object was made."""
        return self._journal()[self._before :]

    async def says(self, words: str) -> None:
        """Wait until its log holds these words: the journal takes a moment."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while words not in "\n".join(self.log_lines()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.1)

    def log_tail(self, lines: int = 12) -> str:
        return "\n".join(self.log_lines()[-lines:])


class UnitHost(Host):
    """A host whose agents are units of ``machine``."""

    def __init__(self, directory: Path, name: str, machine: Machine, config: dict[str, Any] | None = None) -> None:
        super().__init__(directory, name, prefix=machine.prefix, config=config)
        self.machine = machine
        self.units = {
            agent.role: UnitAgent(agent.role, machine, self.directory, agent.table)
            for agent in (self._source, self._target)
        }

    def qmp(self, guest: str) -> Path:
        return STATE / "target" / "guests" / guest / f"{guest}.qmp"

    async def source(self) -> UnitAgent:
        return await self._up("source")

    async def target(self) -> UnitAgent:
        return await self._up("target")

    async def _up(self, role: str) -> UnitAgent:
        agent = self.units[role]
        if agent.show("ActiveState") in {"inactive", "failed"}:
            await agent.start()
        return agent

    async def stop(self) -> None:
        for agent in self.units.values():
            await agent.stop()

    def events(self, role: str) -> list[dict[str, Any]]:
        found = []
        for line in self.units[role].log_lines():
            try:
                found.append({"level": "", **json.loads(line)})
            except ValueError:
                found.append({"event": line, "level": ""})
        return found


class UnitGuest(MovingGuest):
    """A guest that moves between two such hosts; started on the first as any process of that machine."""

    def __init__(self, guest: QemuGuest, hosts: tuple[UnitHost, UnitHost], page_bytes: int) -> None:
        super().__init__(guest, hosts, (page_bytes, page_bytes))
        self.machine = hosts[0].machine
        self.source, self.target = hosts[0].units["source"], hosts[1].units["target"]

    async def start(self) -> None:
        self.machine.path(self.here.qmp(self.name).parent).mkdir(parents=True, exist_ok=True)
        await self.qemu.start(prefix=self.machine.prefix)
