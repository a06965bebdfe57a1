"""The first 64 bytes of every connection to the target's port: what it is for, and the right to it.

    offset  size
       0      4   magic "MGRT"
       4      2   version, big end first
       6      1   purpose: 0 control, 1 bulk, 2 urgent
       7      1   stream (bulk: 0 … 15; otherwise 0)
       8     16   session
      24     32   token
      56      8   zero

Magic and version stay where they are in every version to come; the rest is the version's own.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import Final

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.protocol import bounds, framing
from migrated.protocol.messages import (
    MAX_STREAMS,
    PROTOCOL_VERSION,
    SESSION_BYTES,
    TOKEN_BYTES,
    VERSION_MISMATCH,
)

PREAMBLE_BYTES = 64
MAGIC: Final = b"MGRT"

_LAYOUT: Final = struct.Struct(">4sHBB16s32s8s")
_ZERO: Final = bytes(8)
_SHOWN_BYTES = 12


class Purpose(enum.IntEnum):
    """What a connection is for."""

    CONTROL = 0
    BULK = 1
    URGENT = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Preamble:
    """Session (16 bytes) and token (32 bytes) are those of the Hello; on control, of the Hello or Resume that follows."""

    purpose: Purpose
    session: bytes
    token: bytes
    stream: int = 0
    version: int = PROTOCOL_VERSION


class VersionMismatchError(RemoteProtocolError):
    """The peer speaks another version; answer a control connection with `refusal`, then close."""

    default_code = VERSION_MISMATCH


def encode(preamble: Preamble) -> bytes:
    """The 64 bytes.  Raises LocalProtocolError when a field is out of range."""
    problem = _problem(preamble)
    if problem:
        raise LocalProtocolError(f"preamble: {problem}", hint="this is a bug: please report it")
    return _LAYOUT.pack(
        MAGIC,
        preamble.version,
        preamble.purpose,
        preamble.stream,
        preamble.session,
        preamble.token,
        _ZERO,
    )


def decode(data: bytes) -> Preamble:
    """Check and read exactly 64 bytes.  Raises VersionMismatchError, or RemoteProtocolError naming what is wrong.

    Fewer bytes (the peer closed early) are a RemoteProtocolError too.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        shown = bytes(data[:_SHOWN_BYTES])
        raise RemoteProtocolError(
            f"not a migrated connection: got {shown!r}",
            code="not-migrated",
            hint="something else connects to this port: check the address it was given",
        )
    if len(data) != PREAMBLE_BYTES:
        raise RemoteProtocolError(f"the connection ended in its preamble: {len(data)} of {PREAMBLE_BYTES} bytes")
    _, version, purpose, stream, session, token, padding = _LAYOUT.unpack(data)
    if version != PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"the peer speaks protocol version {version}, we speak {PROTOCOL_VERSION}",
            hint="run the same version of migrated on both hosts",
        )
    if purpose not in Purpose.__members__.values():
        raise RemoteProtocolError(f"preamble: unknown purpose {purpose}", code="malformed")
    preamble = Preamble(Purpose(purpose), session, token, stream, version)
    problem = _problem(preamble) or ("" if padding == _ZERO else f"padding must be zero, not {padding!r}")
    if problem:
        raise RemoteProtocolError(f"preamble: {problem}", code="malformed")
    return preamble


def refusal(error: RemoteProtocolError) -> bytes:
    """The Abort frame that answers a preamble that was not accepted (a wrong version, an unknown session), then close.

    Its form is the same in all versions, so that any peer can read it.
    """
    return framing.encode(bounds.abort_of(error))


def _problem(preamble: Preamble) -> str:
    streams = MAX_STREAMS if preamble.purpose is Purpose.BULK else 1
    if not 0 <= preamble.stream < streams:
        return f"stream must be from 0 to {streams - 1} on a {preamble.purpose.name.lower()} connection, not {preamble.stream}"
    if len(preamble.session) != SESSION_BYTES:
        return f"session must be {SESSION_BYTES} bytes, not {len(preamble.session)}"
    if len(preamble.token) != TOKEN_BYTES:
        return f"token must be {TOKEN_BYTES} bytes, not {len(preamble.token)}"
    return ""
