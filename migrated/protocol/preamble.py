"""The preamble: the first 64 bytes of every connection to the target's port.  It gives the purpose and the token.

    offset  size
       0      4   magic "MGRT"
       4      2   version, big-endian
       6      1   purpose: 0 control, 1 bulk, 2 urgent
       7      1   stream (bulk: 0 … 15; otherwise 0)
       8     16   session
      24     32   token
      56      8   zero

With TLS, the first 8 of these bytes come before the handshake, with the magic "MGRS" and unprotected: the preface.  The
64 bytes follow inside TLS, and only they count; a preface that differs from them was changed on its way.

Magic and version keep their place in every future version; the rest may change with the version.
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
PREFACE_BYTES = 8
MAGIC: Final = b"MGRT"
TLS_MAGIC: Final = b"MGRS"

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
    """``session`` (16 bytes) and ``token`` (32 bytes) are those of Hello, or of the Resume that follows on control."""

    purpose: Purpose
    session: bytes
    token: bytes
    stream: int = 0
    version: int = PROTOCOL_VERSION


class VersionMismatchError(RemoteProtocolError):
    """The peer speaks another version.  Answer a control connection with `refusal`, then close it."""

    default_code = VERSION_MISMATCH


def encode(preamble: Preamble) -> bytes:
    """Return the 64 bytes.  Raises LocalProtocolError if a field is out of range."""
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


def preface(preamble: Preamble) -> bytes:
    """Return the 8 bytes that come before the TLS handshake."""
    return TLS_MAGIC + encode(preamble)[len(MAGIC) : PREFACE_BYTES]


def goes_on_in_tls(first: bytes) -> bool:
    """Whether a connection that begins with these 8 bytes uses TLS.  Raises RemoteProtocolError as `decode` does."""
    if not first or first[: len(MAGIC)] not in (MAGIC[: len(first)], TLS_MAGIC[: len(first)]):
        raise _not_migrated(first)
    if len(first) != PREFACE_BYTES:
        raise _ended(first)
    return first.startswith(TLS_MAGIC)


def _not_migrated(data: bytes) -> RemoteProtocolError:
    shown = bytes(data[:_SHOWN_BYTES])
    return RemoteProtocolError(
        f"not a migrated connection: got {shown!r}",
        code="not-migrated",
        hint="something else connects to this port: check the address it was given",
    )


def _ended(data: bytes) -> RemoteProtocolError:
    return RemoteProtocolError(f"the connection ended in its preamble: {len(data)} of {PREAMBLE_BYTES} bytes")


def decode(data: bytes, *, preface: bytes = b"") -> Preamble:
    """Check and decode exactly 64 bytes.  Raises VersionMismatchError, or RemoteProtocolError that names the problem.

    Fewer bytes (the peer closed early) also raise RemoteProtocolError.  With TLS, ``preface`` is what came before it.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise _not_migrated(data)
    if len(data) != PREAMBLE_BYTES:
        raise _ended(data)
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
    if preface and preface[len(MAGIC) :] != data[len(MAGIC) : PREFACE_BYTES]:
        raise RemoteProtocolError(
            f"the preface {preface!r} differs from the preamble inside TLS: it was changed on its way",
            code="preface-differs",
            hint="something between the hosts changes connections",
        )
    return preamble


def refusal(error: RemoteProtocolError) -> bytes:
    """Return the Abort frame to send before closing on a refused preamble (a wrong version, TLS or its absence).

    Its format is the same in all versions, so that any peer can decode it.
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
