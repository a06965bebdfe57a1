"""Drivers: how we talk to each kind of guest (driver.py is the contract), and the guests a configuration names.

A co-operative guest imports its client through this package: what an agent needs is imported where it is used.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest, TargetGuest
    from migrated.guests.process.source import ProcessHub


class GuestRegistry:
    """The guests of one agent's configuration.

    An async context manager: co-operative guests connect to us long before anything is migrated, and while it is entered
    they can.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._hubs: dict[str, ProcessHub] = {}

    def run_dir(self, name: str) -> Path:
        """Where a guest's sockets and logs are."""
        path = self._config.state_dir / "guests" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_run_dir(self, name: str) -> None:
        """A migration is over: its directory goes, unless something is kept there."""
        if name not in self._hubs:  # a hub has it for life
            with contextlib.suppress(OSError):
                (self._config.state_dir / "guests" / name).rmdir()

    async def __aenter__(self) -> Self:
        from migrated.guests import guest_log
        from migrated.guests.process.config import ProcessSourceConfig

        await self._stack.enter_async_context(guest_log.kept_short(self._config.state_dir / "guests"))
        for name, table in self._config.guests.items():
            if isinstance(table, ProcessSourceConfig):
                from migrated.guests.process.source import ProcessHub

                self._hubs[name] = ProcessHub(name, table, self._config.timeouts)
                await self._stack.enter_async_context(self._hubs[name])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def source_guest(self, name: str) -> SourceGuest:
        """A driver object for one migration away from here."""
        from migrated.guests.libvirt.config import LibvirtSourceConfig
        from migrated.guests.qemu.config import QemuSourceConfig

        table = self._config.guest_table(name)
        if isinstance(table, QemuSourceConfig):
            from migrated.guests.qemu.source import QemuSource

            return QemuSource(name, table, self._config.timeouts)
        if isinstance(table, LibvirtSourceConfig):
            from migrated.guests.libvirt.source import LibvirtSource

            return LibvirtSource(name, table, self._config.timeouts)
        from migrated.guests.process.source import ProcessSource

        return ProcessSource(name, self._hubs[name])

    def target_guest(self, name: str) -> TargetGuest:
        """A driver object for one migration to here."""
        from migrated.guests.libvirt.config import LibvirtTargetConfig
        from migrated.guests.process.config import ProcessTargetConfig
        from migrated.guests.qemu.config import QemuTargetConfig

        table = self._config.guest_table(name)
        if isinstance(table, QemuTargetConfig):
            from migrated.guests.qemu.target import QemuTarget

            return QemuTarget(name, table, self.run_dir(name), self._config.timeouts)
        if isinstance(table, LibvirtTargetConfig):
            from migrated.guests.libvirt.target import LibvirtTarget

            return LibvirtTarget(name, table, self.run_dir(name), self._config.timeouts)
        from migrated.guests.process.target import ProcessTarget

        assert isinstance(table, ProcessTargetConfig)
        return ProcessTarget(name, table, self.run_dir(name), self._config.timeouts)
