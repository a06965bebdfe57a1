"""The messages between a co-operative guest and an agent.  docs/process-guests.md describes them for people.

Guests import this module, so it uses the standard library only.  Every message is a 12-byte header and a payload,
little-endian.  The guest speaks first (HELLO); from then on the agent asks and the guest answers (REPLY or FAIL, with
the request's sequence number).  Descriptors travel as SCM_RIGHTS with the first byte of their message's header.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

VERSION = 1
HEADER = struct.Struct("<IHHI")  # payload bytes, kind, descriptors, sequence
MAX_PAYLOAD_BYTES = 64 << 20
MAX_REGIONS = 64
MAX_NAME_BYTES = 255

HELLO_PRESENTS = 1  # memory from an earlier connection: a descriptor for each region comes along
HELLO_DIRECT_IO = 2  # the guest reads files or devices with O_DIRECT into its memory
HELLO_PAUSED = 4

_HELLO = struct.Struct("<III")  # version, flags, regions
_REGION = struct.Struct("<QQQH")  # size, page size, address (both 0 unless presented), bytes of the name
_MEMORY = struct.Struct("<II")  # incoming, regions


class Kind(enum.IntEnum):
    """Kinds of message: up to 15 from the guest, from 16 on from the agent."""

    HELLO = 1
    REPLY = 2
    FAIL = 3  # why, as text
    MEMORY = 16  # map this (or go on with what you have); the reply holds the addresses
    UFFD = 17  # make a userfaultfd and send it
    FORGET = 18  # close the userfaultfd
    PAUSE = 19  # reach a safe point; the reply confirms that nothing writes to the memory any more
    RUN = 20
    STATE = 21  # the reply holds the state that is not in the memory
    RESTORE = 22  # the payload is what STATE returned on the other host
    END = 23  # the guest runs elsewhere: exit
    REFUSE = 24  # why, as text; no reply
    LEAVE = 25  # connect to this path from now on; to none if it is empty.  No reply.


class WireError(Exception):
    """The peer sent something invalid."""


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """The header of the message that follows it."""

    payload_bytes: int
    kind: Kind
    descriptors: int
    sequence: int

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Parse a header.  Raises WireError."""
        length, kind, descriptors, sequence = HEADER.unpack(data)
        if length > MAX_PAYLOAD_BYTES or descriptors > MAX_REGIONS:
            raise WireError(f"a message of {length} bytes and {descriptors} descriptors")
        try:
            return cls(length, Kind(kind), descriptors, sequence)
        except ValueError:
            raise WireError(f"message kind {kind} is unknown") from None


def message(kind: Kind, payload: bytes = b"", *, sequence: int = 0, descriptors: int = 0) -> bytes:
    """Return a message: header and payload."""
    return HEADER.pack(len(payload), kind, descriptors, sequence) + payload


@dataclasses.dataclass(frozen=True, slots=True)
class HelloRegion:
    """A region as the guest names it; page size and address are 0 unless the memory is presented."""

    name: str
    size_bytes: int
    page_bytes: int = 0
    address: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a connection."""

    flags: int
    regions: tuple[HelloRegion, ...]
    version: int = VERSION

    def encode(self) -> bytes:
        """Return the payload."""
        out = bytearray(_HELLO.pack(self.version, self.flags, len(self.regions)))
        for region in self.regions:
            name = region.name.encode()
            out += _REGION.pack(region.size_bytes, region.page_bytes, region.address, len(name)) + name
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Parse the payload.  Raises WireError.  In a HELLO of another version only the version is parsed."""
        try:
            version, flags, count = _HELLO.unpack_from(data)
            if version != VERSION:
                return cls(0, (), version)
            if not 1 <= count <= MAX_REGIONS:
                raise WireError(f"{count} regions")
            at = _HELLO.size
            regions = []
            for _ in range(count):
                size, page, address, length = _REGION.unpack_from(data, at)
                at += _REGION.size
                name = data[at : at + length].decode()
                if len(data) < at + length or not 1 <= length <= MAX_NAME_BYTES:
                    raise WireError("a region's name is cut short, empty or too long")
                at += length
                regions.append(HelloRegion(name, size, page, address))
        except (struct.error, UnicodeDecodeError) as error:
            raise WireError(f"a broken HELLO: {error}") from None
        if at != len(data) or len({region.name for region in regions}) != len(regions):
            raise WireError("a HELLO with bytes left over, or two regions of one name")
        return cls(flags, tuple(regions))


def encode_memory(page_bytes: tuple[int, ...], *, incoming: bool) -> bytes:
    """Return the payload of MEMORY."""
    return _MEMORY.pack(int(incoming), len(page_bytes)) + struct.pack(f"<{len(page_bytes)}Q", *page_bytes)


def decode_memory(data: bytes) -> tuple[bool, tuple[int, ...]]:
    """Return ``(incoming, page sizes)``.  Raises WireError."""
    try:
        incoming, count = _MEMORY.unpack_from(data)
        return bool(incoming), struct.unpack(f"<{count}Q", data[_MEMORY.size :])
    except struct.error as error:
        raise WireError(f"a broken MEMORY: {error}") from None


def decode_addresses(data: bytes, count: int) -> tuple[int, ...]:
    """Return the addresses in the reply to MEMORY.  Raises WireError."""
    if len(data) != count * 8:
        raise WireError(f"{len(data)} bytes of addresses for {count} regions")
    return struct.unpack(f"<{count}Q", data)
