"""Encode and decode control messages.  A frame is a big-endian 32-bit length, followed by one msgpack map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgpack
import msgspec

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.protocol import bounds
from migrated.protocol.messages import MAX_REGIONS, MAX_TEXT_CHARACTERS, VERSION_MISMATCH, AnyMessage

T = TypeVar("T")

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 16 * 1024 * 1024

#: Limits on a frame's contents, so that it cannot unpack to many times its size.  A Hello has the most containers: a
#: map of fields, an array of regions, a map for each region, and the driver's description.  The limit is twice that, so
#: that the field's own limit refuses one region too many, with a better message.  msgpack itself limits nesting to
#: 1,024 levels.
MAX_CONTAINERS = 2 * (8 + MAX_REGIONS)
MAX_FIELDS = 16


def encode(message: AnyMessage) -> bytes:
    """Return the frame of a message.  Raises LocalProtocolError if a field is out of range."""
    name = type(message).__name__
    try:
        values = msgspec.to_builtins(message, builtin_types=(bytes,))
        bounds.check(msgspec.convert(values, type(message), builtin_types=(bytes,)))
        body: bytes = msgpack.packb(values)
    except (ValueError, OverflowError) as error:
        raise LocalProtocolError(f"{name}: {error}", hint="this is a bug: please report it") from error
    if len(body) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"{name}: {len(body)} bytes, the limit of a frame is {MAX_FRAME_BYTES}")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def _unpack(body: bytes) -> object:
    """Unpack a frame's body.  Raises ValueError."""
    containers = 0

    def count(container: T) -> T:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} arrays and maps")
        return container

    return msgpack.unpackb(
        body,
        list_hook=count,
        object_hook=count,
        max_str_len=4 * MAX_TEXT_CHARACTERS,
        max_bin_len=MAX_FRAME_BYTES,
        max_array_len=2 * MAX_REGIONS,
        max_map_len=MAX_FIELDS,
        max_ext_len=0,
    )


def _decode(body: bytes) -> AnyMessage:
    try:
        # builtin_types: text in place of bytes is an error, not base64.
        message: AnyMessage = msgspec.convert(_unpack(body), AnyMessage, builtin_types=(bytes,))
    except ValueError as error:
        raise RemoteProtocolError(
            f"malformed control message of {len(body)} bytes: {str(error) or type(error).__name__}", code="malformed"
        ) from error
    try:
        bounds.check(message)
    except bounds.WrongVersionError as error:
        hint = "run the same version of migrated on both hosts"
        raise RemoteProtocolError(str(error), code=VERSION_MISMATCH, hint=hint) from error
    except ValueError as error:
        raise RemoteProtocolError(f"malformed {type(message).__name__}: {error}", code="malformed") from error
    return message


class FrameDecoder:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._error: RemoteProtocolError | None = None

    def feed(self, data: bytes) -> Iterator[AnyMessage]:
        """Buffer the bytes at once; return an iterator over the complete messages.

        The iterator raises RemoteProtocolError at the first malformed frame, after yielding the valid messages before
        it; every later call raises it again.  Messages not consumed remain for the next call.
        """
        if self._error is None:
            self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[AnyMessage]:
        while True:
            message = self.next_message()
            if message is None:
                return
            yield message

    def next_message(self) -> AnyMessage | None:
        """Return the next complete message, or None.  Raises RemoteProtocolError as `feed` does."""
        if self._error is not None:
            raise self._error
        try:
            return self._take()
        except RemoteProtocolError as error:
            self._error = error
            self._buffer.clear()
            raise

    def _take(self) -> AnyMessage | None:
        if len(self._buffer) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if not 0 < length <= MAX_FRAME_BYTES:
            # Raised before the body is buffered: a peer cannot make us hold more than the limit.
            raise RemoteProtocolError(
                f"control frame of {length} bytes, allowed are 1 to {MAX_FRAME_BYTES}: "
                f"the stream starts {bytes(self._buffer[:8])!r}",
                code="malformed",
            )
        end = LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[LENGTH_BYTES:end])
        del self._buffer[:end]
        return _decode(body)
