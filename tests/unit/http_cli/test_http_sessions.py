"""Whole HTTP sessions, spoilt: each ends alone, changes nothing that it may not change, and finds no mistake of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from migrated.agent.record import State
from migrated.agent.requests import StartRequest
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

SESSIONS = int(os.environ.get("HTTP_SESSIONS", "300"))
SEED = int(os.environ.get("HTTP_SEED", "20261126"))
AT_ONCE = 8

#: What the command line, a browser, Prometheus and an operator with curl send, as they send it.
HEAD = b"Host: localhost\r\nAccept: */*\r\nUser-Agent: Python/3.13 aiohttp/3.14\r\n"
JSON = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


def post(path: bytes, body: bytes) -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\n" + HEAD + JSON % (len(body), body)


def get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\n" + HEAD + b"\r\n"


REQUESTS: Sequence[bytes] = (
    get(b"/v1/agent"),
    get(b"/v1/guests"),
    get(b"/v1/migrations?ended=false"),
    get(b"/v1/migrations/vm1"),
    get(b"/v1/migrations/vm1/events"),
    get(b"/v1/openapi.json"),
    get(b"/v1/events"),
    get(b"/v1/evacuations"),
    get(b"/v1/migrations/vm1/map"),
    get(b"/v1/migrations/vm1/series"),
    get(b"/v1/migrations/vm1/log"),
    get(b"/status"),
    get(b"/metrics"),
    get(b"/healthz"),
    get(b"/"),
    b"HEAD /readyz HTTP/1.0\r\n\r\n",
    post(b"/v1/migrations", b'{"guest":"other","to":"host-b:7440","mode":"precopy","streams":2}'),
    post(b"/v1/migrations/vm1/set", b'{"max_bandwidth":"10Gbit","downtime_limit_ms":5}'),
    post(b"/v1/migrations/nobody/abort", b""),
    post(b"/v1/migrations/vm1/abandon", b'{"confirm":"other"}'),
    post(b"/v1/migrations/vm1/force-run", b"{}"),
    b"POST /v1/migrations/vm1/set HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n1a\r\n"
    b'{"max_bandwidth":"1Gbit"}\n\r\n0\r\n\r\n',
    b"GET /v1/migrations/vm1/events HTTP/1.1\r\n" + HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST /v1/migrations/vm1/set HTTP/1.1\r\n" + HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
)
#: Put in anywhere: what parsers trip over.
WORDS: Sequence[bytes] = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"%00", b"%2e%2e/", b"//", b"?", b"#", b"\xff\xfe", b"\r\n\r\n"),
    *(b"Content-Length: 0\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"Content-Encoding: deflate\r\n", b"Host: \r\n", b"Host: evil.example\r\n", b"Expect: 100-continue\r\n"),
    *(b"ffffffffffffffff\r\n", b"-1\r\n", b"{", b"[[[[[[[[", b'"', b"\\ud800", b"1e999", b"null", b"NaN"),
    *(b"A" * 9000, b"a: b\r\n" * 200, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n", b"HTTP/9.9"),
)


def spoil(data: bytes, draw: random.Random) -> bytes:
    """One or a few mistakes."""
    made = bytearray(data)
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        at = draw.randrange(len(made) + 1)
        match draw.randrange(6):
            case 0 if made:
                made[min(at, len(made) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                made[at:at] = draw.choice(WORDS)
            case 2:
                del made[at : at + draw.choice((1, 2, 16))]
            case 3:
                made[at : at + draw.randrange(16)] = draw.choice(WORDS)
            case 4:
                made[at:at] = made[draw.randrange(len(made) + 1) :][: draw.randrange(200)]
            case _:
                made[at:at] = draw.randbytes(draw.randrange(20))
    return bytes(made)


async def speak(served: Served, draw: random.Random, *, socket: bool) -> None:
    """One session: a few requests on one connection, in pieces, to its end or not."""
    if socket:
        reader, writer = await asyncio.open_unix_connection(str(served.settings.control_socket))
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(served.status_url.rpartition(":")[2]))
    data = b"".join(spoil(draw.choice(REQUESTS), draw) for _ in range(draw.choice((1, 1, 2, 4))))
    with contextlib.suppress(OSError, TimeoutError):
        while data:
            piece = draw.choice((1, 50, len(data)))
            writer.write(data[:piece])
            await writer.drain()
            data = data[piece:]
            await asyncio.sleep(0)
        if draw.random() < 0.5:
            writer.write_eof()
        if draw.random() < 0.7:
            async with asyncio.timeout(0.05):
                await reader.read(1 << 16)
    writer.transport.abort()


@pytest.mark.parametrize("socket", [False, True], ids=["status", "control"])
async def test_spoilt_http_sessions(source: Served, caplog: pytest.LogCaptureFixture, *, socket: bool) -> None:
    caplog.set_level(logging.WARNING)
    record = await source.agent.start(StartRequest.model_validate({"guest": "vm1", "to": "host-b:7440"}))
    before = (record.state, record.max_bandwidth_bytes_per_second, record.peer)
    for first in range(0, SESSIONS, AT_ONCE):
        with capture_logs() as logs:
            await asyncio.gather(
                *(
                    speak(source, random.Random(f"{SEED}/{socket}/{number}"), socket=socket)
                    for number in range(first, first + AT_ONCE)
                )
            )
            async with source.control() as http, http.get("/v1/agent") as answer:
                assert answer.status == 200
        where = f"sessions {first} to {first + AT_ONCE} of seed {SEED}"
        assert [entry for entry in logs if entry["log_level"] == "error"] == [], where
        assert [entry.getMessage() for entry in caplog.records if entry.name != "asyncio"] == [], where
        if not socket:
            assert source.agent.all == [record], where
            assert (record.state, record.max_bandwidth_bytes_per_second, record.peer) == before, where
        ended = [one for one in source.agent.all if one.ended]
        assert all(one.state in (State.ABORTED, State.FAILED) for one in ended), where
