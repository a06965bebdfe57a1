"""Clients that hold connections without asking, ask slowly, or do not read: none of them keeps others from the agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from migrated.agent.requests import StartRequest
from migrated.http import access, control, guard, reading
from tests.unit.http_cli.served import Served, serving

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = StartRequest.model_validate({"guest": "vm1", "to": "b:1"})
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def raw(served: Served, *, host: str = "127.0.0.1", socket: bool = False) -> AsyncIterator[Ends]:
    """A connection to the status site from ``host``, or to the control socket."""
    if socket:
        reader, writer = await asyncio.open_unix_connection(str(served.settings.control_socket))
    else:
        port = int(served.status_url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> None:
    """Until the agent has ended the connection."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while await reader.read(1 << 16):
                pass


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answered(ends: Ends) -> None:
    reader, writer = ends
    writer.write(GET)
    async with asyncio.timeout(60):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b'"reasons":[]}')


async def test_a_host_that_takes_every_connection_takes_its_own(
    short_dir: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_WAITING", 8)
    async with serving(short_dir, "source", unused_port) as served, contextlib.AsyncExitStack() as stack:
        monitor = await stack.enter_async_context(raw(served, host="127.0.0.3"))
        await answered(monitor)
        silent = [await stack.enter_async_context(raw(served, host="127.0.0.2")) for _ in range(40)]
        for reader, _ in silent[:33]:  # with the monitor's, 8 stay
            await ended(reader)
        await answered(monitor)
        await answered(await stack.enter_async_context(raw(served, host="127.0.0.4")))
        await answered(silent[-1])
        assert len(asyncio.all_tasks()) < 40  # aiohttp has one for each connection


@pytest.mark.parametrize("socket", [False, True], ids=["status", "control"])
@pytest.mark.parametrize(
    "sent", [b"", GET[:20], b"POST /v1/migrations HTTP/1.1\r\nHost: agent\r\nContent-Length: 9\r\n\r\n{"]
)
async def test_a_client_that_does_not_finish_its_request_is_left(
    short_dir: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes, *, socket: bool
) -> None:
    for module, name in ((guard, "FIRST_REQUEST_SECONDS"), (guard, "NEXT_REQUEST_SECONDS"), (control, "BODY_SECONDS")):
        monkeypatch.setattr(module, name, 0.2)
    async with serving(short_dir, "source", unused_port) as served, raw(served, socket=socket) as (reader, writer):
        writer.write(sent)
        await ended(reader)


async def test_a_request_byte_by_byte_takes_no_longer(
    short_dir: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "FIRST_REQUEST_SECONDS", 0.3)
    async with serving(short_dir, "source", unused_port) as served, raw(served) as (reader, writer):
        end = asyncio.create_task(ended(reader))
        for _ in range(100_000):
            writer.write(b"GET / "[:1])
            await asyncio.wait({end}, timeout=0.001)
            if end.done():
                break
        await end


async def test_a_client_that_does_not_read_its_answers_is_left(
    short_dir: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "NEXT_REQUEST_SECONDS", 0.2)
    async with serving(short_dir, "source", unused_port) as served, raw(served) as (reader, writer):
        lost = asyncio.create_task(asyncio.sleep(60))
        reader._transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's own
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing() and not lost.done():
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
                await asyncio.wait({lost}, timeout=0.001)
        assert not lost.done()
        lost.cancel()


@pytest.mark.parametrize("events", ["/v1/migrations/vm1/events", "/v1/events"])
async def test_a_watcher_that_does_not_read_is_left(
    source: Served, monkeypatch: pytest.MonkeyPatch, events: str
) -> None:
    monkeypatch.setattr(reading, "UNREAD_SECONDS", 0.2)
    monkeypatch.setattr(reading, "MAX_WATCHERS", 1)
    record = await source.agent.start(START)
    record.driver = "x" * (16 << 20)  # more than any socket buffers
    async with raw(source) as (reader, writer):
        writer.write(f"GET {events} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        reader._transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's own
        async with source.status() as http, asyncio.timeout(60):
            while True:  # until its place is free
                async with http.get(events) as answer:
                    if answer.status == 200:
                        break
                await asyncio.sleep(0.01)


async def test_one_address_cannot_take_every_event_stream(source: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_WATCHERS_OF_ONE", 1)
    await source.agent.start(START)
    events = "/v1/migrations/vm1/events"
    connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
    async with (
        source.status() as http,
        aiohttp.ClientSession(source.status_url, connector=connector) as other,
        http.get(events) as first,
        http.get(events) as second,
        other.get(events) as third,
    ):
        assert (first.status, second.status, third.status) == (200, 503, 200)


async def test_what_clients_get_wrong_leaves_no_traceback(source: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: " + b"x" * 9000 + b"\r\n\r\n",
    ):
        for socket in (False, True):
            async with raw(source, socket=socket) as (reader, writer):
                writer.write(garbage)
                writer.write_eof()
                await ended(reader)
    assert caplog.records == []


@pytest.mark.root
async def test_a_reader_has_only_so_many_requests(
    short_dir: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_OF_A_READER", 1)
    monkeypatch.setattr(access.Access, "right", lambda *_: access.Right.READ)
    async with serving(short_dir, "source", unused_port) as served, served.control() as http:
        await served.agent.start(START)
        async with http.get("/v1/migrations/vm1/events") as first, http.get("/v1/agent") as second:
            assert (first.status, second.status) == (200, 429)
        async with asyncio.timeout(60):
            while True:
                async with http.get("/v1/agent") as third:
                    if third.status == 200:
                        break
                await asyncio.sleep(0.01)
