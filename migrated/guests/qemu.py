"""The `qemu` driver: what its two sides share (configuration, capabilities, what travels before QEMU's own stream).

An unmodified QEMU, reached by QMP and by injection.  The memory stays out of QEMU's stream (``x-ignore-shared``); the
stream, device state and small private blocks such as video memory, runs through a socket pair handed to QEMU with
``getfd`` and from there over the agents' own connection.  See docs/qemu.md.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, TypeVar

import msgspec

from migrated.errors import ConfigError, RemoteProtocolError
from migrated.guests.qmp import Monitor

#: On the source.  ``pause-before-switchover``: the only moment at which the guest's I/O is known to be drained.
SOURCE_CAPABILITIES = frozenset({"x-ignore-shared", "events", "return-path", "pause-before-switchover"})
#: On the target.  ``late-block-activate``: disks stay the source's until `cont`.
TARGET_CAPABILITIES = frozenset({"x-ignore-shared", "events", "return-path", "late-block-activate"})

#: QEMU's stream is short and must not be what the guest waits for: no limit that counts, switch over at once.
#: tls-creds would wrap a socket pair that never leaves this host.
SOURCE_PARAMETERS: dict[str, object] = {"downtime-limit": 2_000_000, "max-bandwidth": 1 << 40, "tls-creds": ""}

#: QEMU's own (5.2 and newer), for a guest whose former values are not known any more.
DEFAULT_PARAMETERS: dict[str, object] = {"downtime-limit": 300, "max-bandwidth": 128 << 20}

_PREFACE = struct.Struct("<4sBBH")
_PREFACE_MAGIC = b"MGQS"
_PREFACE_VERSION = 1
PREFACE_BYTES = _PREFACE.size


class QemuSourceConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``[guests.NAME]`` of a source: an existing QEMU, by its QMP socket.

    ``on_release``: what becomes of the QEMU that is left when the guest runs elsewhere.  Its process still holds the old
    memory, and one `cont` would run the guest twice: so it quits, unless told to ``keep``.
    """

    driver: Literal["qemu"] = "qemu"
    qmp: str
    on_release: Literal["quit", "keep"] = "quit"

    def __post_init__(self) -> None:
        if not self.qmp.startswith("/"):
            raise ValueError("qmp must be the absolute path of the guest's QMP socket")


class QemuTargetConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``[guests.NAME]`` of a target: how to start the incoming QEMU.

    ``reserve``: false where the host has less than all of its memory; its backends need ``reserve=off`` then.
    ``command``: ``{memory:ID}`` becomes the path of the memory made for backend ID, ``{qmp}`` that of the QMP socket.
    """

    driver: Literal["qemu"] = "qemu"
    command: list[str]
    page_size: str = "2M"
    reserve: bool = True

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command must name the QEMU program and its arguments")


C = TypeVar("C", QemuSourceConfig, QemuTargetConfig)


def decode_config(name: str, table: dict[str, Any], kind: type[C]) -> C:
    """A guest's table of the configuration.  Raises ConfigError naming the key."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"guests.{name}: {error}") from error


def preface(*, runs: bool) -> bytes:
    """What goes before QEMU's stream: whether the guest is to run on arrival, or was paused by its owner."""
    return _PREFACE.pack(_PREFACE_MAGIC, _PREFACE_VERSION, int(runs), 0)


def parse_preface(data: bytes) -> bool:
    """The ``runs`` of `preface`.  Raises RemoteProtocolError."""
    magic, version, runs, _ = _PREFACE.unpack(data)
    if magic != _PREFACE_MAGIC or version != _PREFACE_VERSION or runs > 1:
        raise RemoteProtocolError(f"the guest state does not begin as a QEMU guest's does: {data!r}")
    return bool(runs)


class MigrationSettings:
    """QEMU's capabilities and parameters, set for us and put back."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._capabilities: dict[str, bool] = {}
        self._parameters: dict[str, object] = {}

    async def apply(self, capabilities: frozenset[str], parameters: dict[str, object]) -> None:
        """Exactly these capabilities on, all others off (a user's multifd would change the stream)."""
        await self.restore()
        present = {c["capability"]: bool(c["state"]) for c in await self._monitor.execute("query-migrate-capabilities")}
        if missing := capabilities - present.keys():
            raise ConfigError(
                f"guest {self._monitor.guest}: this QEMU lacks the migration capability {', '.join(sorted(missing))}",
                code="qemu-too-old",
                hint="QEMU 4.2 or newer is needed",
            )
        wrong = {name: state for name, state in present.items() if state != (name in capabilities)}
        if wrong:
            await self._set_capabilities({name: not state for name, state in wrong.items()})
            self._capabilities = wrong
        if parameters:
            now = await self._monitor.execute("query-migrate-parameters")
            old = {name: now[name] for name, value in parameters.items() if name in now and now[name] != value}
            if old:
                await self._monitor.execute("migrate-set-parameters", {name: parameters[name] for name in old})
                self._parameters = old

    async def undo_unknown(self) -> None:
        """Put QEMU's defaults in place of what an agent that died left set.

        Left alone, x-ignore-shared would make a later migration by hand arrive without its memory.
        """
        states = {c["capability"]: bool(c["state"]) for c in await self._monitor.execute("query-migrate-capabilities")}
        if states.get("x-ignore-shared"):
            self._capabilities = {name: False for name in SOURCE_CAPABILITIES if states.get(name)}
        now = await self._monitor.execute("query-migrate-parameters")
        if now.get("downtime-limit") == SOURCE_PARAMETERS["downtime-limit"]:
            self._parameters = dict(DEFAULT_PARAMETERS)
        await self.restore()

    async def restore(self, monitor: Monitor | None = None) -> None:
        """Put back what `apply` changed; ``monitor``: a new session, where the old one was lost."""
        self._monitor = monitor or self._monitor
        capabilities, self._capabilities = self._capabilities, {}
        parameters, self._parameters = self._parameters, {}
        if capabilities:
            await self._set_capabilities(capabilities)
        if parameters:
            await self._monitor.execute("migrate-set-parameters", parameters)

    async def _set_capabilities(self, states: dict[str, bool]) -> None:
        # Switching off before switching on: some exclude each other.
        ordered = sorted(states.items(), key=lambda item: item[1])
        await self._monitor.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": state} for name, state in ordered]},
        )
