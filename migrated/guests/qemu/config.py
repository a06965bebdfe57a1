"""The `qemu` driver's configuration, and what its two sides have in common.

QEMU runs unmodified; the driver reaches it through QMP and by injection.  Memory never passes through QEMU: its RAM
blocks are regions of the migration (memory.py).  Only the device state does (state.py).  See docs/qemu.md.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import Field

from migrated.errors import RemoteProtocolError
from migrated.guests.start.config import StartedTable
from migrated.settings import Command, GuestTable, SocketPath


class QemuSourceConfig(GuestTable):
    """``[guests.NAME]`` of a source: a running QEMU, found by its QMP socket."""

    driver: Literal["qemu"] = "qemu"
    qmp: SocketPath = Field(description="the guest's QMP socket")
    #: The process still holds the old memory, and one `cont` would run the guest twice, so it quits by default.
    on_release: Literal["quit", "keep"] = Field(
        default="quit", description="what to do with this QEMU once the guest runs on the target"
    )


class QemuTargetConfig(StartedTable):
    """``[guests.NAME]`` of a target: how to start the incoming QEMU.

    With ``reserve = false``, the memory backends of the command need ``reserve=off``.
    """

    driver: Literal["qemu"] = "qemu"
    command: Command = Field(
        description="the QEMU program and its arguments. `{memory:ID}` becomes the path of the memory made for backend ID, "
        "`{qmp}` that of the QMP socket"
    )


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the source says about a QEMU guest in its hello.

    ``backends``: names of the regions that memory backends provide; the other regions belong to devices and firmware.
    """

    machine: str  # concrete type: pc-q35-7.2
    version: tuple[int, int, int]  # of QEMU
    backends: tuple[str, ...]

    def encode(self) -> dict[str, Any]:
        """Return the description as plain values."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    @classmethod
    def decode(cls, values: dict[str, Any]) -> Description:
        """Decode a peer's description.  Raises RemoteProtocolError."""
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise RemoteProtocolError(f"the description of the QEMU guest is malformed: {error}") from error
