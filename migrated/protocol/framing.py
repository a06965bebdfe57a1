"""Control messages as bytes: a 32-bit length, big end first, then one msgpack map."""

from __future__ import annotations

from collections.abc import Iterator

from migrated.protocol.messages import AnyMessage

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 16 * 1024 * 1024


def encode(message: AnyMessage) -> bytes:
    """The frame of a message.  Raises LocalProtocolError when a field is out of range."""
    raise NotImplementedError


class FrameDecoder:
    """Bytes in, messages out."""

    def feed(self, data: bytes) -> Iterator[AnyMessage]:
        """Take bytes (kept at once); iterate over the messages that are whole.

        The iterator raises RemoteProtocolError at the first malformed frame, after the good messages before it; from then on
        every call raises it again.  Messages not fetched stay for the next call.
        """
        raise NotImplementedError
