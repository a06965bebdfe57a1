"""The first 64 bytes of every connection to the target's port: what it is for, and the right to it.

    offset  size
       0      4   magic "MGRT"
       4      2   version, big end first
       6      1   purpose: 0 control, 1 bulk, 2 urgent
       7      1   stream (bulk: 0 … 15; otherwise 0)
       8     16   session
      24     32   token
      56      8   zero
"""

from __future__ import annotations

import dataclasses
import enum

from migrated.errors import RemoteProtocolError
from migrated.protocol.messages import PROTOCOL_VERSION

PREAMBLE_BYTES = 64


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

    default_code = "version-mismatch"


def encode(preamble: Preamble) -> bytes:
    """The 64 bytes.  Raises LocalProtocolError when a field is out of range."""
    raise NotImplementedError


def decode(data: bytes) -> Preamble:
    """Check and read exactly 64 bytes.  Raises VersionMismatchError, or RemoteProtocolError naming what is wrong.

    Fewer bytes (the peer closed early) are a RemoteProtocolError too.
    """
    raise NotImplementedError


def refusal(error: VersionMismatchError) -> bytes:
    """The Abort frame that answers a wrong version: its form is the same in all versions, so that any peer can read it."""
    raise NotImplementedError
