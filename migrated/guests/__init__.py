"""Drivers: how we talk to each kind of guest (driver.py is the contract), and the guests a configuration names."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from migrated.config import decode_guest
from migrated.errors import ConfigError
from migrated.guests import guest_log
from migrated.units import parse_size

if TYPE_CHECKING:
    from pathlib import Path

    from migrated.config import AgentConfig
    from migrated.guests.driver import SourceGuest, TargetGuest
    from migrated.guests.process.source import ProcessHub

DRIVERS = ("qemu", "process")


def page_bytes(table: dict[str, Any], *, where: str) -> int | None:
    """The page size a guest's table asks for, in bytes; None: the best to be had.  ConfigError names ``where``."""
    text = table.get("page_size")
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where}.page_size: not a string", hint='give "4K", "2M" or "1G"')
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{where}.page_size: {error.message}", hint='give "4K", "2M" or "1G"') from error


def reserves(table: dict[str, Any]) -> bool:
    """Whether all of an incoming guest's memory is to be reserved before it is started: unless its table says not to."""
    return bool(table.get("reserve", True))


class Residents:
    """The guests of one agent's configuration.

    Tables are checked when the object is made.  An async context manager: co-operative guests connect to us long before
    anything is migrated, and while it is entered they can.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._hubs: dict[str, ProcessHub] = {}
        for name, table in config.guests.items():
            self._check(name, table)

    def _check(self, name: str, table: dict[str, Any]) -> None:
        source = self._config.role == "source"
        path = self._config.path
        where = f"{path}: guests.{name}"
        match table["driver"]:
            case "qemu":
                from migrated.guests.qemu import config as qemu

                decode_guest(path, name, table, qemu.QemuSourceConfig if source else qemu.QemuTargetConfig)
            case "process":
                from migrated.guests.process import config as process

                decode_guest(path, name, table, process.ProcessSourceConfig if source else process.ProcessTargetConfig)
            case other:
                raise ConfigError(f"{where}.driver: {other!r} is unknown", hint=f"one of {', '.join(DRIVERS)}")
        page_bytes(table, where=where)

    def run_dir(self, name: str) -> Path:
        """Where a guest's sockets and logs are."""
        path = self._config.state_dir / "guests" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def tidy(self, name: str) -> None:
        """A migration is over: its directory goes, unless something is kept there."""
        if name not in self._hubs:  # a hub has it for life
            with contextlib.suppress(OSError):
                (self._config.state_dir / "guests" / name).rmdir()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(guest_log.kept_short(self._config.state_dir / "guests"))
        if self._config.role == "source":
            for name, table in self._config.guests.items():
                if table["driver"] == "process":
                    await self._stack.enter_async_context(self._hub(name, table))
        return self

    def _hub(self, name: str, table: dict[str, Any]) -> ProcessHub:
        from migrated.guests.process.source import ProcessHub

        hub = self._hubs[name] = ProcessHub(name, table, self.run_dir(name), self._config.timeouts)
        return hub

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def source_guest(self, name: str) -> SourceGuest:
        """A driver object for one migration away from here."""
        table = self._config.guests[name]
        if table["driver"] == "process":
            from migrated.guests.process.source import ProcessSource

            return ProcessSource(name, self._hubs[name])
        from migrated.guests.qemu import config as qemu
        from migrated.guests.qemu.source import QemuSource

        config = qemu.decode_config(name, table, qemu.QemuSourceConfig)
        return QemuSource(name, config, self.run_dir(name), self._config.timeouts)

    def target_guest(self, name: str) -> TargetGuest:
        """A driver object for one migration to here."""
        table = self._config.guests[name]
        if table["driver"] == "process":
            from migrated.guests.process import config as process
            from migrated.guests.process.target import ProcessTarget

            target = process.decode_config(name, table, process.ProcessTargetConfig)
            return ProcessTarget(name, target, self.run_dir(name), self._config.timeouts)
        from migrated.guests.qemu import config as qemu
        from migrated.guests.qemu.target import QemuTarget

        return QemuTarget(
            name, qemu.decode_config(name, table, qemu.QemuTargetConfig), self.run_dir(name), self._config.timeouts
        )
