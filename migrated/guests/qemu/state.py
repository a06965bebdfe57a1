"""Carry a QEMU guest's device state: saved into a memfd of ours, sent to the target, fed to an ordinary incoming QEMU.

``xen-save-devices-state`` (no Xen is needed) writes the state of the devices and no RAM, whatever memory the guest has.
Its output is a migration stream that lacks three things, which the target adds:

    QEVM, version 3
    configuration section   07, be32 length, machine type
    RAM section             01, be32 id, "ram", instance 0, version 4, the used length of each block; no pages
    … the devices, as QEMU saved them, up to the end mark
    VM description          06, be32 0: only keeps QEMU from warning that it is missing

The RAM section resizes resizable blocks (ACPI tables) as on the source.  By then the memory itself is in place or is
fetched on demand.  The layout is that of QEMU's migration/savevm.c and migration/ram.c (7.2 to 11.1).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import Self

import msgspec

from migrated.errors import GuestError, RemoteProtocolError
from migrated.guests.qemu.qmp import MonitorCommands

STREAM_HEAD = b"QEVM\0\0\0\3"
END = b"\6\0\0\0\0"

_CONFIGURATION = 0x07
_SECTION_START, _SECTION_PART, _SECTION_FOOTER = 0x01, 0x02, 0x7E
_RAM_VERSION = 4
_MEM_SIZE, _PAGE, _EOS = 0x04, 0x08, 0x10
#: Later parts of a section refer to its id: this is one that QEMU gives to nothing else.
_RAM_SECTION = 1 << 16
_END_OF_SECTION = struct.pack(">QBI", _EOS, _SECTION_FOOTER, _RAM_SECTION)

_HEAD = struct.Struct(">4sHI")
_MAGIC = b"MGQS"
_VERSION = 2
_HEADER_MAX_BYTES = 1 << 17


class StateHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the source's driver sends before the state.

    It says whether the guest is to run, its machine type, and the used length of each block.
    """

    runs: bool
    machine: str
    used_bytes: dict[str, int]


def encode_header(header: StateHeader) -> bytes:
    """Encode the header for the channel."""
    body = msgspec.msgpack.encode(header)
    return _HEAD.pack(_MAGIC, _VERSION, len(body)) + body


class HeaderDecoder:
    """Collects the bytes of the state; `header` and `rest` are valid once `feed` has returned true."""

    def __init__(self) -> None:
        self.header: StateHeader | None = None
        self.rest = b""

    def feed(self, data: bytes) -> bool:
        """Add bytes; return whether the header and the head of QEMU's stream are complete.

        Raises RemoteProtocolError.
        """
        self.rest += data
        if len(self.rest) < _HEAD.size:
            return False
        magic, version, length = _HEAD.unpack_from(self.rest)
        if magic != _MAGIC or version != _VERSION or length > _HEADER_MAX_BYTES:
            raise RemoteProtocolError("the guest state does not begin with the header of a QEMU guest")
        end = _HEAD.size + length
        if len(self.rest) < end + len(STREAM_HEAD):
            return False
        try:
            self.header = msgspec.msgpack.decode(self.rest[_HEAD.size : end], type=StateHeader)
        except msgspec.DecodeError as error:
            raise RemoteProtocolError(f"the header of the guest state is malformed: {error}") from error
        if self.rest[end : end + len(STREAM_HEAD)] != STREAM_HEAD:
            raise RemoteProtocolError("the guest state is not a QEMU migration stream of version 3")
        self.rest = self.rest[end + len(STREAM_HEAD) :]
        return True


def stream_begin(machine: str) -> bytes:
    """Return the beginning of QEMU's stream, up to the RAM section."""
    name = machine.encode()
    return STREAM_HEAD + struct.pack(">BI", _CONFIGURATION, len(name)) + name


def ram_section(used_bytes: dict[str, int]) -> bytes:
    """Return a section that sets the used lengths of RAM blocks and holds no pages.

    ``used_bytes`` are by block id, as the incoming QEMU names its blocks.
    """
    parts = [struct.pack(">BI", _SECTION_START, _RAM_SECTION), b"\3ram", struct.pack(">II", 0, _RAM_VERSION)]
    parts.append(struct.pack(">Q", sum(used_bytes.values()) | _MEM_SIZE))
    for ident, used in used_bytes.items():
        parts += [_counted(ident), struct.pack(">Q", used)]
    parts.append(_END_OF_SECTION)
    return b"".join(parts)


def ram_pages(pages: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return a further part of the RAM section: pages by block id and offset."""
    parts = [struct.pack(">BI", _SECTION_PART, _RAM_SECTION)]
    for ident, offset, data in pages:
        parts += [struct.pack(">Q", offset | _PAGE), _counted(ident), data]
    parts.append(_END_OF_SECTION)
    return b"".join(parts)


def _counted(ident: str) -> bytes:
    encoded = ident.encode()
    return struct.pack(">B", len(encoded)) + encoded


class StateFile:
    """A memfd into which QEMU writes its device state.  Make it with `open` before the pause; `close` it.

    QEMU gets a write-only descriptor in a descriptor set: a path would need rights that a confined QEMU lacks, and
    nothing on a disk can block its monitor.
    """

    def __init__(self, monitor: MonitorCommands, fd: int, filename: str) -> None:
        self._monitor = monitor
        self._fd = fd
        self._filename = filename

    @classmethod
    async def open(cls, monitor: MonitorCommands) -> Self:
        """Hand an empty file to QEMU.  Raises GuestError."""
        fd = os.memfd_create("migrated-device-state", os.MFD_CLOEXEC)
        try:
            writable = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                filename = await monitor.share(writable)
            finally:
                os.close(writable)
        except BaseException:
            os.close(fd)
            raise
        return cls(monitor, fd, filename)

    async def save(self, limit_seconds: float) -> bytes:
        """Have the paused QEMU save its devices; return the state without RAM, from `STREAM_HEAD` on.

        Raises GuestError.

        ``live``: QEMU releases the locks of its disks, as at the end of a migration; `cont` takes them again.
        """
        arguments = {"filename": self._filename, "live": True}
        await self._monitor.execute("xen-save-devices-state", arguments, limit=limit_seconds)
        state = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if not state.startswith(STREAM_HEAD):
            raise GuestError(
                f"guest {self._monitor.guest}: QEMU saved a device state of a version that is not known: {state[:8]!r}",
                code="guest-state",
            )
        return state

    def close(self) -> None:
        """Close our descriptor.  QEMU keeps its own until `Monitor.remove_fds`."""
        os.close(self._fd)
