"""Hold the guests that an agent's configuration names.

The registry loads the driver of each guest and makes one driver object for each migration.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Self

from migrated.guests import guest_log
from migrated.guests.libvirt.config import LibvirtSourceConfig, LibvirtTargetConfig
from migrated.guests.libvirt.source import LibvirtSource
from migrated.guests.libvirt.target import LibvirtTarget
from migrated.guests.process.config import ProcessSourceConfig, ProcessTargetConfig
from migrated.guests.process.source import ProcessHub, ProcessSource
from migrated.guests.process.target import ProcessTarget
from migrated.guests.qemu.config import QemuSourceConfig, QemuTargetConfig
from migrated.guests.qemu.source import QemuSource
from migrated.guests.qemu.target import QemuTarget

if TYPE_CHECKING:
    from pathlib import Path

    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest, TargetGuest


class GuestRegistry:
    """The guests of one agent's configuration.

    An async context manager: co-operative guests can connect while it is entered, long before any migration.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._hubs: dict[str, ProcessHub] = {}

    def run_dir(self, name: str) -> Path:
        """Return the directory of a guest's sockets and logs."""
        path = self._config.state_dir / "guests" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_run_dir(self, name: str) -> None:
        """Remove the directory of a finished migration, unless something is kept there."""
        if name not in self._hubs:  # a hub keeps it for good
            with contextlib.suppress(OSError):
                (self._config.state_dir / "guests" / name).rmdir()

    async def __aenter__(self) -> Self:

        await self._stack.enter_async_context(guest_log.kept_short(self._config.state_dir / "guests"))
        for name, table in self._config.guests.items():
            if isinstance(table, ProcessSourceConfig):
                self._hubs[name] = ProcessHub(name, table, self._config.timeouts)
                await self._stack.enter_async_context(self._hubs[name])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def source_guest(self, name: str) -> SourceGuest:
        """Return a driver object for one migration away from here."""
        table = self._config.guest_table(name)
        if isinstance(table, QemuSourceConfig):
            return QemuSource(name, table, self._config.timeouts)
        if isinstance(table, LibvirtSourceConfig):
            return LibvirtSource(name, table, self._config.timeouts)
        return ProcessSource(name, self._hubs[name])

    def target_guest(self, name: str) -> TargetGuest:
        """Return a driver object for one migration to here."""
        table = self._config.guest_table(name)
        if isinstance(table, QemuTargetConfig):
            return QemuTarget(name, table, self.run_dir(name), self._config.timeouts)
        if isinstance(table, LibvirtTargetConfig):
            return LibvirtTarget(name, table, self.run_dir(name), self._config.timeouts)
        assert isinstance(table, ProcessTargetConfig)
        return ProcessTarget(name, table, self.run_dir(name), self._config.timeouts)
