"""What cannot be done is said, by name, and leaves the guest as it was; strangers on the port disturb nobody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrated.demo.pair import free_port
from migrated.errors import MigratedError
from migrated.protocol import framing
from migrated.protocol.messages import PROTOCOL_VERSION, Abort
from migrated.protocol.preamble import PREAMBLE_BYTES, Preamble, Purpose, encode
from migrated.waiting import within
from tests.integration.place import PATIENCE_SECONDS, Guest, Place
from tests.unit.link.ends import HELLO

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def failed(here: Place, migration: str) -> dict[str, Any]:
    """The error it ended with."""
    record = await here.over(migration)
    assert record["state"] == "failed", record
    error: dict[str, Any] = record["error"]
    assert error["message"]
    assert error["hint"]
    return error


# ---------------------------------------------------------------- migrations that cannot be


async def test_a_target_that_cannot_be_reached(here: Place, guest: Guest) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    done = await here.cli("start", guest.name, "--to", nowhere, "--wait", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "target-unreachable"
    assert nowhere in done.json["error"]["message"]
    await guest.assert_sound()


async def test_an_error_is_the_same_on_the_command_line_over_http_in_the_log_and_in_the_metrics(
    here: Place, guest: Guest
) -> None:
    failed = {"migrated_migrations_failed_total": {"code": "target-unreachable"}}
    refused = {"migrated_requests_refused_total": {"code": "unknown-guest"}}
    before = await counted(here, **failed, **refused)
    done = await here.cli("start", guest.name, "--to", f"127.0.0.1:{free_port()}", "--wait", "--json")
    error = done.json["error"]
    migration = done.json["id"]
    assert error["code"] == "target-unreachable"
    assert error["hint"]
    assert (await here.source.record(migration))["error"] == error
    summary = " ".join((await here.cli("status", migration)).out.split())
    assert f"{error['message']} [{error['code']}]" in summary
    assert error["hint"] in summary
    lines = [line for line in here.logged("source", "warning") if line.get("migration") == migration]
    assert {line["event"] for line in lines} == {"migration failed, rolling back", "state"}
    for line in lines:
        assert {"code": line["code"], "message": line["error"], "hint": line["hint"]} == error
    # A command that is refused has no migration: the answer is all there is, and it is counted.
    with pytest.raises(MigratedError) as refusal:
        await here.start("stranger")
    command = await here.cli("start", "stranger", "--to", here.address, "--json")
    assert command.json["error"] == refusal.value.as_dict()
    after = await counted(here, **failed, **refused)
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 2]


async def counted(here: Place, **wanted: dict[str, str]) -> list[float]:
    """The source's counters with these labels."""
    families = [*text_string_to_metric_families(await here.get("/metrics"))]
    samples = [sample for family in families for sample in family.samples]
    return [
        sum(sample.value for sample in samples if (sample.name, sample.labels) == (name, labels))
        for name, labels in wanted.items()
    ]


async def test_a_guest_the_source_does_not_know(here: Place) -> None:
    done = await here.cli("start", "stranger", "--to", here.address, "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "unknown-guest"
    assert "g0" in done.json["error"]["hint"]


async def test_a_guest_the_target_does_not_know(here: Place) -> None:
    """And nobody is connected as it here either: whichever is found first is said."""
    error = await failed(here, await here.start("nobody"))
    assert error["code"] in {"unknown-guest", "guest-not-connected"}


async def test_a_guest_that_is_moving_already(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    again = await here.cli("start", guest.name, "--to", here.address, "--json")
    assert again.code == 2
    assert again.json["error"]["code"] == "guest-migrating"
    assert migration in again.json["error"]["message"]
    assert (await here.cli("abort", migration)).code == 0
    await here.over(migration)
    await guest.assert_sound()


async def test_a_guest_that_writes_faster_than_can_be_sent(here: Place) -> None:
    guest = await here.guest("busy")
    error = await failed(here, await here.start("busy", mode="precopy", max_bandwidth="20MB", downtime_limit_ms=1))
    assert error["code"] == "not-converging"
    assert "hybrid" in error["hint"]
    assert here.left_of(guest.name) == []
    await guest.assert_sound()


async def test_options_that_make_no_sense(here: Place, guest: Guest) -> None:
    for wrong in ({"mode": "live"}, {"streams": 99}, {"max_bandwidth": "fast"}, {"to": "nowhere"}):
        with pytest.raises(MigratedError) as caught:
            await here.start(**wrong)
        assert caught.value.code == "bad-request"
    with pytest.raises(MigratedError, match="target agent"):
        await here.target.request("POST", "/v1/migrations", {"guest": guest.name, "to": here.address})


# ---------------------------------------------------------------- strangers on the port


@contextlib.asynccontextmanager
async def stranger(here: Place) -> AsyncIterator[socket.socket]:
    host, _, port = here.address.rpartition(":")
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        yield sock


async def said(sock: socket.socket) -> bytes:
    """Everything until the other side closes (a reset is an end, too)."""
    data = b""
    async with within(PATIENCE_SECONDS, "the agent to close the connection"):
        with contextlib.suppress(ConnectionResetError):
            while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
                data += piece
    return data


async def test_another_version_is_refused_in_words_it_can_read(here: Place) -> None:
    for _ in range(10):  # what has been sent already must not take the answer away
        async with stranger(here) as sock:
            preamble = bytearray(encode(Preamble(Purpose.CONTROL, HELLO.session, HELLO.token)))
            preamble[4:6] = (PROTOCOL_VERSION + 1).to_bytes(2, "big")
            await asyncio.get_running_loop().sock_sendall(sock, bytes(preamble) + framing.encode(HELLO))
            (message,) = framing.FrameDecoder().feed(await said(sock))
        assert isinstance(message, Abort)
        assert message.code == "version-mismatch"
        assert f"version {PROTOCOL_VERSION + 1}" in message.message
        assert message.hint


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 10, b"\x16\x03\x01" + bytes(500), b"MGRT" + b"\xff" * 200, bytes(64)],
    ids=["http", "tls", "magic-only", "zeros"],
)
async def test_garbage_on_the_port_ends_only_itself(here: Place, guest: Guest, garbage: bytes) -> None:
    before = await standing(here)
    async with stranger(here) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, garbage)
        await said(sock)
    assert await standing(here) == before


@pytest.mark.parametrize(
    "first",
    [b"\xff" * 100, framing.encode(Abort("x", "y")), framing.encode(HELLO)[:-1] + b"\x00"],
    ids=["no-frame", "abort", "broken-hello"],
)
async def test_a_stranger_who_says_hello_wrongly_ends_only_itself(here: Place, guest: Guest, first: bytes) -> None:
    before = await standing(here)
    async with stranger(here) as sock:
        preamble = encode(Preamble(Purpose.CONTROL, HELLO.session, HELLO.token))
        await asyncio.get_running_loop().sock_sendall(sock, preamble + first)
        await said(sock)
    assert await standing(here) == before
    await guest.assert_sound()


async def standing(here: Place) -> tuple[int, bool, list[Any]]:
    """The target agent's process, its health and every migration it knows of."""
    about = await here.target.request("GET", "/v1/agent")
    known = await here.target.request("GET", "/v1/migrations")
    return about["pid"], about["healthy"], known["migrations"]


async def test_page_connections_of_nobody_are_closed(here: Place) -> None:
    for purpose in (Purpose.BULK, Purpose.URGENT):
        async with stranger(here) as sock:
            await asyncio.get_running_loop().sock_sendall(sock, encode(Preamble(purpose, HELLO.session, HELLO.token)))
            assert await said(sock) == b""


async def test_a_token_that_is_wrong_opens_nothing(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    session = bytes.fromhex(migration)  # all that outsiders are ever shown of it
    async with stranger(here) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, encode(Preamble(Purpose.URGENT, session, bytes(32))))
        assert await said(sock) == b""
    assert (await here.source.record(migration))["state"] == "precopy"
    assert (await here.cli("abort", migration)).code == 0
    await here.over(migration)
    await guest.assert_sound()


async def test_guests_move_while_strangers_hold_connections(here: Place, guest: Guest) -> None:
    async with contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(stranger(here)) for _ in range(50)]
        half = await stack.enter_async_context(stranger(here))
        await asyncio.get_running_loop().sock_sendall(
            half, encode(Preamble(Purpose.CONTROL, HELLO.session, HELLO.token))[:31]
        )
        migration = await here.start()
        assert (await here.over(migration))["state"] == "completed"
        await guest.arrived()
        assert await said(half) == b""  # after timeouts.handshake
        assert await asyncio.gather(*(said(sock) for sock in idle)) == [b""] * 50
    assert len(encode(Preamble(Purpose.CONTROL, HELLO.session, HELLO.token))) == PREAMBLE_BYTES
