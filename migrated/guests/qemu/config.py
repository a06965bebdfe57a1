"""The `qemu` driver: its configuration, and what is common to its two sides.

QEMU runs unmodified; the driver reaches it through QMP and by injection.  Memory never passes through QEMU: its RAM blocks are
regions of the migration (memory.py).  Only the devices' state does (state.py).  See docs/qemu.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from migrated.errors import ConfigError, RemoteProtocolError


class QemuSourceConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``[guests.NAME]`` of a source: an existing QEMU, by its QMP socket.

    ``on_release``: what becomes of the QEMU that is left when the guest runs elsewhere.  Its process still holds the old
    memory, and one `cont` would run the guest twice: so it quits, unless told to ``keep``.
    """

    driver: Literal["qemu"] = "qemu"
    qmp: Annotated[str, Meta(description="the absolute path of the guest's QMP socket")]
    on_release: Annotated[Literal["quit", "keep"], Meta(description="quit or keep")] = "quit"

    def __post_init__(self) -> None:
        if not self.qmp.startswith("/"):
            raise ValueError("qmp must be the absolute path of the guest's QMP socket")


class QemuTargetConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``[guests.NAME]`` of a target: how to start the incoming QEMU.

    ``reserve``: false where the host has less than all of its memory; its backends need ``reserve=off`` then.
    ``command``: ``{memory:ID}`` becomes the path of the memory made for backend ID, ``{qmp}`` that of the QMP socket.
    """

    driver: Literal["qemu"] = "qemu"
    command: Annotated[list[str], Meta(description="a list: the QEMU program and its arguments")]
    page_size: Annotated[str, Meta(description='"4K", "2M" or "1G"')] = "2M"
    reserve: Annotated[bool, Meta(description="true or false")] = True

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


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the source says of a QEMU guest in its hello.

    ``backends``: the names of the regions that memory backends provide; the other regions belong to devices and firmware.
    """

    machine: str  # concrete type: pc-q35-7.2
    version: tuple[int, int, int]  # of QEMU
    backends: tuple[str, ...]

    def encode(self) -> dict[str, Any]:
        """As plain values."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    @classmethod
    def decode(cls, values: dict[str, Any]) -> Description:
        """From a peer.  Raises RemoteProtocolError."""
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise RemoteProtocolError(f"the description of the QEMU guest is malformed: {error}") from error
