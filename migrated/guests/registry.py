"""Hold the guests that an agent's configuration names.

The registry loads the driver of each guest and makes one driver object for each migration.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from migrated.errors import GuestRefusedError
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
    from collections.abc import Coroutine
    from pathlib import Path

    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest, TargetGuest
    from migrated.options import DomainOptions


def _process_guests(config: AgentConfig) -> dict[str, ProcessSourceConfig]:
    return {name: table for name, table in config.guests.items() if isinstance(table, ProcessSourceConfig)}


class GuestRegistry:
    """The guests of one agent's configuration.

    An async context manager: co-operative guests can connect while it is entered, long before any migration.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._stack = contextlib.AsyncExitStack()
        self._hubs: dict[str, ProcessHub] = {}

    def run_dir(self, name: str) -> Path:
        """Return the directory of a guest's sockets and logs."""
        path = self.config.state_dir / "guests" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_run_dir(self, name: str) -> None:
        """Remove the directory of a finished migration, unless something is kept there."""
        if name not in self._hubs:  # a hub keeps it for good
            with contextlib.suppress(OSError):
                (self.config.state_dir / "guests" / name).rmdir()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(guest_log.kept_short(self.config.state_dir / "guests"))
        self._stack.push_async_callback(self._close_hubs, self._hubs)
        for name in _process_guests(self.config):
            self._hubs[name] = await self._new_hub(name, self.config).__aenter__()
        return self

    def replace(self, config: AgentConfig) -> Coroutine[Any, Any, None]:
        """Take over another configuration at once; await the result, which closes and opens sockets.

        A co-operative guest whose table has changed must connect again.  Raises HostError, and changes nothing, if this
        host lacks pages of a size that a new table asks for.
        """
        former, guests = _process_guests(self.config), _process_guests(config)
        new = {name: self._new_hub(name, config) for name, table in guests.items() if former.get(name) != table}
        old = {name: self._hubs.pop(name) for name, table in former.items() if guests.get(name) != table}
        self._hubs.update(new)
        self.config = config
        return self._reopen(old, new)

    async def _reopen(self, old: dict[str, ProcessHub], new: dict[str, ProcessHub]) -> None:
        await self._close_hubs(old)  # first: an old hub and a new one may have the same socket
        for hub in new.values():
            await hub.__aenter__()

    @staticmethod
    def _new_hub(name: str, config: AgentConfig) -> ProcessHub:
        return ProcessHub(name, _process_guests(config)[name], config.timeouts)

    @staticmethod
    async def _close_hubs(hubs: dict[str, ProcessHub]) -> None:
        for hub in hubs.values():
            await hub.__aexit__(None, None, None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def source_guest(self, name: str, requested: DomainOptions | None = None) -> SourceGuest:
        """Return a driver object for one migration away from here.

        Raises GuestRefusedError ``not-of-libvirt`` if options for libvirt's guests were requested for another.
        """
        table = self.config.guest_table(name)
        if requested is not None and requested.requested() and not isinstance(table, LibvirtSourceConfig):
            raise GuestRefusedError(
                f"guest {name} is not libvirt's, and {', '.join(requested.requested())} is for libvirt's guests",
                code="not-of-libvirt",
                hint="leave the option out",
            )
        if isinstance(table, QemuSourceConfig):
            return QemuSource(name, table, self.config.timeouts)
        if isinstance(table, LibvirtSourceConfig):
            return LibvirtSource(name, table, self.config.timeouts, requested)
        return ProcessSource(name, self._hubs[name])

    def target_guest(self, name: str) -> TargetGuest:
        """Return a driver object for one migration to here."""
        table = self.config.guest_table(name)
        if isinstance(table, QemuTargetConfig):
            return QemuTarget(name, table, self.run_dir(name), self.config.timeouts)
        if isinstance(table, LibvirtTargetConfig):
            return LibvirtTarget(name, table, self.run_dir(name), self.config.timeouts)
        assert isinstance(table, ProcessTargetConfig)
        return ProcessTarget(name, table, self.run_dir(name), self.config.timeouts)
