"""Whole sessions, recorded and then spoilt: what a hostile or broken peer sends, drawn from a seed.

A recording is what one side of a real migration sent on each of its connections.  `spoil` makes a session out of it that is
wrong somewhere: bytes flipped, frames left out, doubled, exchanged, cut short, made up, or the fields of a frame changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable

import msgspec

from migrated.protocol.framing import LENGTH_BYTES
from migrated.protocol.preamble import MAGIC, PREAMBLE_BYTES, PREFACE_BYTES, TLS_MAGIC, Preamble, Purpose, encode

SESSION_BYTES, TOKEN_BYTES = 16, 32
NUMBERS = (0, 1, -1, 255, 4096, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)


@dataclasses.dataclass
class Recording:
    """Frames of the control connection, and what went over each page connection."""

    session: bytes
    token: bytes
    control: list[bytes]
    pages: dict[tuple[Purpose, int], bytes]


def frame(body: bytes) -> bytes:
    """With its length."""
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def renamed(recording: Recording, draw: random.Random) -> Recording:
    """The same for a session of its own."""
    session, token = draw.randbytes(SESSION_BYTES), draw.randbytes(TOKEN_BYTES)

    def change(data: bytes) -> bytes:
        return data.replace(recording.session, session).replace(recording.token, token)

    return Recording(session, token, [change(one) for one in recording.control], dict(recording.pages))


def _fields(one: bytes, draw: random.Random) -> bytes:
    """A field of a control frame with another value."""
    with contextlib.suppress(msgspec.DecodeError, ValueError, KeyError, TypeError, OverflowError, IndexError):
        message = msgspec.msgpack.decode(one[LENGTH_BYTES:])
        key = draw.choice([key for key in message if key != "t"])
        value = message[key]
        choices: list[object] = [None, "", b"", [], {}, draw.choice(NUMBERS), draw.randbytes(draw.randrange(1 << 12))]
        if isinstance(value, bytes):
            choices += [value[:-1], value + b"\0", bytes(len(value)), b"\xff" * len(value)]
        message[key] = draw.choice(choices)
        return frame(msgspec.msgpack.encode(message))
    return one


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 32))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _length(one: bytes, draw: random.Random) -> bytes:
    wrong = draw.choice((0, 1, len(one), 1 << 24, (1 << 24) + 1, 0xFFFFFFFF))
    return wrong.to_bytes(LENGTH_BYTES, "big") + one[LENGTH_BYTES:]


def _made_up(one: bytes, draw: random.Random) -> bytes:
    del one
    return frame(draw.randbytes(draw.randrange(1, 300)))


OF_ONE: tuple[Callable[[bytes, random.Random], bytes], ...] = (_fields, _fields, _fields, _flip, _length, _made_up)


def spoil(recording: Recording, draw: random.Random) -> Recording:
    """One or a few mistakes."""
    made = renamed(recording, draw)
    frames = made.control
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(frames)) if frames else 0
        match draw.randrange(7):
            case 0 | 1 | 2 if frames:
                frames[at] = draw.choice(OF_ONE)(frames[at], draw)
            case 3 if frames:
                frames.insert(at, draw.choice(frames))
            case 4 if frames:
                del frames[at]
            case 5 if frames:
                other = draw.randrange(len(frames))
                frames[at], frames[other] = frames[other], frames[at]
            case _ if made.pages:
                which = draw.choice(list(made.pages))
                data = made.pages[which]
                cut = draw.randrange(len(data) + 1)
                made.pages[which] = draw.choice(
                    (_flip(data, draw), data[:cut], data[cut:], data[:cut] + draw.randbytes(99))
                )
            case _:
                pass
    return made


class Peer:
    """A source that says what it was made to say, and does not listen."""

    def __init__(self, address: tuple[str, int], recording: Recording, draw: random.Random) -> None:
        self._address = address
        self._recording = recording
        self._draw = draw

    async def run(self) -> None:
        """One session, at most a few seconds of it."""
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(3), contextlib.AsyncExitStack() as stack:
                reader, writer = await stack.enter_async_context(self._dial(Purpose.CONTROL, 0))
                for number, one in enumerate(self._recording.control):
                    writer.write(one)
                    await writer.drain()
                    if number == 0:
                        # Whatever it answers: Ready, an Abort, the end.
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(reader.read(1 << 16), 0.5)
                        for which in self._recording.pages:
                            await self._pages(stack, which)
                if self._draw.random() < 0.5 and writer.can_write_eof():  # not with Python's TLS
                    writer.write_eof()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1 << 16), 0.2)

    async def _pages(self, stack: contextlib.AsyncExitStack, which: tuple[Purpose, int]) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            _, writer = await stack.enter_async_context(self._dial(*which))
            writer.write(self._recording.pages[which])
            await asyncio.wait_for(writer.drain(), 0.5)

    @contextlib.asynccontextmanager
    async def _dial(  # in the clear; see TlsPeer
        self, purpose: Purpose, stream: int
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            preamble = encode(Preamble(purpose, self._recording.session, self._recording.token, stream))
            if self._draw.random() < 0.02:
                preamble = draw_preamble(self._draw)
            writer.write(preamble)
            yield reader, writer
        finally:
            writer.transport.abort()


class TlsPeer(Peer):
    """One that has a certificate which the target accepts, and says the same inside TLS; or spoils TLS itself."""

    def __init__(
        self, address: tuple[str, int], recording: Recording, draw: random.Random, context: ssl.SSLContext
    ) -> None:
        super().__init__(address, recording, draw)
        self._context = context

    async def run(self) -> None:
        """One session."""
        if self._draw.random() < 0.7:
            await super().run()
            return
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(3):
                await self._spoil_tls()

    @contextlib.asynccontextmanager
    async def _dial(
        self, purpose: Purpose, stream: int
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            preamble = encode(Preamble(purpose, self._recording.session, self._recording.token, stream))
            writer.write(TLS_MAGIC + preamble[len(TLS_MAGIC) : PREFACE_BYTES])
            await writer.start_tls(self._context, server_hostname=self._address[0])
            writer.write(draw_preamble(self._draw) if self._draw.random() < 0.02 else preamble)
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _spoil_tls(self) -> None:
        """Change what TLS sends, in the handshake or after it."""
        draw, recording = self._draw, self._recording
        purpose = draw.choice([*Purpose])
        preamble = encode(Preamble(purpose, recording.session, recording.token))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(incoming, outgoing, server_hostname=self._address[0])
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            writer.write(TLS_MAGIC + preamble[len(TLS_MAGIC) : PREFACE_BYTES])
            for _ in range(4):
                with contextlib.suppress(ssl.SSLError):
                    tls.do_handshake()
                    tls.write(preamble + b"".join(recording.control)[: 1 << 16])
                data = outgoing.read()
                match draw.randrange(6):
                    case 0:
                        data = _flip(data, draw)
                    case 1:
                        data = data[: draw.randrange(len(data) + 1)]
                    case 2:
                        data += draw.randbytes(draw.randrange(200))
                    case 3:
                        data *= 2
                    case _:
                        pass
                writer.write(data)
                got = await asyncio.wait_for(reader.read(1 << 16), 0.2)
                if not got:
                    break
                incoming.write(got)
        finally:
            writer.transport.abort()


def draw_preamble(draw: random.Random) -> bytes:
    """64 bytes, or fewer, that are not what they should be."""
    data = draw.choice((MAGIC, b"GET ", b"\x16\x03\x01\x02")) + os.urandom(PREAMBLE_BYTES - 4)
    return data[: draw.choice((1, 4, 63, 64, 64))]
