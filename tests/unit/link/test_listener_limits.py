"""Strangers on the target's port: they may take every place, and keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from migrated.address import Address
from migrated.errors import RemoteProtocolError
from migrated.link.control_link import ControlLink
from migrated.link.listener import Listener
from migrated.memory.channel import Channel
from migrated.protocol.messages import SESSION_BYTES, TOKEN_BYTES, Hello, Inquire, Resume
from migrated.protocol.preamble import MAGIC, Preamble, Purpose, encode
from migrated.settings import Timeouts

SESSION, TOKEN = bytes(SESSION_BYTES), bytes(TOKEN_BYTES)
LIMIT = 8
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Sessions:
    """One session is known; its page connections are held until `release`."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[int] = asyncio.Queue()
        self.release = asyncio.Event()

    def find(self, preamble: Preamble) -> Sessions | None:
        if preamble.token != TOKEN:
            raise RemoteProtocolError("the token is not this session's")
        return self if preamble.session == SESSION else None

    async def add_stream(self, stream: int, connection: int | Channel) -> None:
        assert isinstance(connection, int)
        self.streams.put_nowait(stream)
        await self.release.wait()
        os.close(connection)

    async def dialled(self, link: ControlLink) -> None:
        await link.close()

    async def begin(self, link: ControlLink, first: Hello | Resume | Inquire) -> None:
        del first
        await link.close()


@contextlib.asynccontextmanager
async def listening(sessions: Sessions, **timeouts: float) -> AsyncIterator[Listener]:
    listener = Listener(
        Address("127.0.0.1", 0),
        sessions,
        timeouts=Timeouts(**timeouts),
        max_connections=LIMIT,
        setting="listen",
        credentials=None,
    )
    await listener.open()
    serving = asyncio.create_task(listener.serve())
    try:
        yield listener
    finally:
        serving.cancel()
        tasks = list(listener.connections)
        listener.close()
        await asyncio.wait({serving, *tasks})


@contextlib.asynccontextmanager
async def connected(listener: Listener, sent: bytes = b"", host: str = "127.0.0.2") -> AsyncIterator[Ends]:
    reader, writer = await asyncio.open_connection(*listener.address, local_addr=(host, 0))
    try:
        writer.write(sent)
        yield reader, writer
    finally:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while await reader.read(1 << 16):
                pass


BULK = encode(Preamble(Purpose.BULK, SESSION, TOKEN, 3))


async def test_whoever_knows_the_token_gets_in_past_a_host_that_takes_every_place() -> None:
    sessions = Sessions()
    async with listening(sessions) as listener, contextlib.AsyncExitStack() as stack:
        with capture_logs() as logs:
            slow, writer = await stack.enter_async_context(connected(listener, BULK[:40], host="127.0.0.3"))
            strangers = [await stack.enter_async_context(connected(listener)) for _ in range(100)]
            for reader, _ in strangers[: 101 - LIMIT]:
                await ended(reader)
            writer.write(BULK[40:])
            async with asyncio.timeout(60):
                assert await sessions.streams.get() == 3
            assert len(listener.connections) == LIMIT
        assert 1 <= sum(entry["event"] == "too many connections" for entry in logs) < 50
        # It counts as a stranger's no more, and loses its place to nobody.
        more = [await stack.enter_async_context(connected(listener, host="127.0.0.3")) for _ in range(3 * LIMIT)]
        for reader, _ in more[: 2 * LIMIT]:
            await ended(reader)
        sessions.release.set()
        await ended(slow)


@pytest.mark.parametrize("sent", [b"", MAGIC, BULK[:63]])
async def test_a_connection_that_does_not_say_what_it_is_ends(sent: bytes) -> None:
    async with listening(Sessions(), handshake=0.2) as listener, connected(listener, sent) as (reader, _):
        await ended(reader)


async def test_a_first_message_that_does_not_come_ends_the_connection() -> None:
    hello = encode(Preamble(Purpose.CONTROL, bytes([1] * SESSION_BYTES), TOKEN))
    for rest in (b"", b"\0\0\x10\0", b"\0\0\x10\0half of it"):
        async with listening(Sessions(), handshake=0.2) as listener, connected(listener, hello + rest) as (reader, _):
            await ended(reader)


async def test_preambles_byte_by_byte_take_no_longer() -> None:
    async with listening(Sessions(), handshake=0.3) as listener, connected(listener) as (reader, writer):
        end = asyncio.create_task(ended(reader))
        sent = 0
        while not end.done() and sent < 60:  # fewer than a preamble has
            writer.write(MAGIC[sent % 4 :][:1])
            sent += 1
            await asyncio.wait({end}, timeout=0.01)
            if writer.is_closing():
                break
        await end
