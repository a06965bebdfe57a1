"""A host of a test: its own directory, optionally a network namespace, and both agents."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from migrated.demo.pair import AgentProcess, free_port

PROGRAM = (sys.executable, "-P", "-m", "migrated")


class Host:
    """``name`` under ``directory`` (a short path, because it holds sockets).  Agents start on first use.

    ``prefix`` goes before the agents' commands (``ip netns exec …``, ``setpriv …``).  ``program`` runs as the target agent
    instead of ``migrated``.  ``config`` has sections for both agents, ``source`` and ``target`` for one.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        prefix: tuple[str, ...] = (),
        program: tuple[str, ...] = PROGRAM,
        listen: str = "127.0.0.1",
        config: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        target: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir()
        self.prefix = prefix
        self.address = f"{listen}:{free_port() if listen == '127.0.0.1' else 7440}"
        self.source_guests: dict[str, dict[str, Any]] = {}
        self.target_guests: dict[str, dict[str, Any]] = {}
        tls = {"insecure": True, "trusted_network": True}  # some hosts are namespaces with a network of their own
        common: dict[str, Any] = {"tls": tls, "http": {"status": ""}, **(config or {})}
        self._source = AgentProcess(
            "source", self.directory, {**common, **(source or {}), "guests": self.source_guests}, prefix=prefix
        )
        self._target = AgentProcess(
            "target",
            self.directory,
            {**common, **(target or {}), "listen": {"address": self.address}, "guests": self.target_guests},
            prefix=prefix,
            program=program,
        )

    def qmp(self, guest: str) -> Path:
        """Path of the QMP socket of a guest that arrived on this host."""
        return self._target.state_dir / "guests" / guest / f"{guest}.qmp"

    async def source(self) -> AgentProcess:
        """Return the source agent; start it if necessary."""
        if self._source.process is None:
            await self._source.start()
        return self._source

    async def target(self) -> AgentProcess:
        """Return the target agent; start it if necessary."""
        if self._target.process is None:
            await self._target.start()
        return self._target

    async def stop(self) -> None:
        """Stop both agents as a service manager does."""
        await self._source.stop()
        await self._target.stop()

    def events(self, role: str) -> list[dict[str, Any]]:
        """Return what an agent has logged so far.  A line that is not JSON becomes ``{"event": line, "level": "error"}``."""
        agent = self._source if role == "source" else self._target
        if not agent.log_path.exists():
            return []
        return [_event(line) for line in agent.log_path.read_text(errors="replace").splitlines() if line]

    def complaints(self) -> list[dict[str, Any]]:
        """Return everything that either agent logged as an error.

        The QMP library's own lines are excluded, because it reports every failed connection as an error.
        """
        told = [event for role in ("source", "target") for event in self.events(role) if event["level"] == "error"]
        return [event for event in told if not str(event.get("logger", "")).startswith("qemu.qmp")]


def _event(line: str) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return {"event": line, "level": "error"}
    return {"level": "", **event}
