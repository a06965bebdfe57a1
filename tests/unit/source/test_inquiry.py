"""A source asks a target what it has room for: a real target agent on loopback, which nothing of it changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migrated import config
from migrated.address import Address
from migrated.errors import ConnectionLostError, MigratedError, PeerError
from migrated.link.dialing import DialTerms
from migrated.memory import memfd
from migrated.protocol import messages, preamble
from migrated.protocol.messages import MAX_ASKED, AskedGuest, PagePool
from migrated.settings import Timeouts
from migrated.source.agent import SourceAgent
from migrated.source.inquiry import ask
from migrated.target.agent import TargetAgent
from tests.rig.pki import Pki

TERMS = DialTerms(Timeouts(connect=10.0, handshake=10.0))
PATIENCE_SECONDS = 30.0
MIB = 1 << 20


@contextlib.asynccontextmanager
async def target(directory: Path, **tables: Any) -> AsyncIterator[tuple[TargetAgent, Address]]:
    """A target agent, and where it listens."""
    table = {
        "agent": {"state_dir": str(directory)},
        "tls": {"insecure": True},
        "http": {"status": ""},
        "listen": {"address": "127.0.0.1:0"},
        "guests": {
            "small": {"driver": "process", "command": ["guest"], "page_size": "4K"},
            "large": {"driver": "process", "command": ["guest"], "reserve": False},
        },
        **tables,
    }
    agent, stop = TargetAgent(config.decode(table, "target")), asyncio.Event()
    running = asyncio.ensure_future(agent.run(stop))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not agent.health().ready:  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.01)
        yield agent, agent._listener.address
    finally:
        stop.set()
        await running


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def process_guests(*names: str) -> list[AskedGuest]:
    return [AskedGuest(name, "process") for name in names]


async def test_a_target_says_what_it_has_and_whom_it_would_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = [memfd.Pool(2 * MIB, total=40, free=30, reserved=10, overcommit=0, surplus=0)]
    monkeypatch.setattr(memfd, "pools", lambda: pools)
    monkeypatch.setattr(memfd, "available_bytes", lambda: 512 * MIB)
    async with target(tmp_path, limits={"max_migrations": 5}) as (agent, address):
        before = files(tmp_path)
        asked = [*process_guests("small", "large", "stranger"), AskedGuest("small", "qemu")]
        answer = await ask(address, asked, TERMS)
        assert agent.records() == []
        assert files(tmp_path) == before
    assert answer.memory_bytes == 512 * MIB
    assert answer.pools == (PagePool(2 * MIB, 20),)
    assert (answer.migrations, answer.max_migrations) == (0, 5)
    small, large, stranger, other = answer.guests
    assert (small.page_bytes, small.reserve, small.refusal) == (4096, True, None)
    assert (large.page_bytes, large.reserve, large.refusal) == (0, False, None)
    assert stranger.refusal is not None
    assert stranger.refusal.code == "unknown-guest"
    assert "[guests.stranger]" in stranger.refusal.hint
    assert other.refusal is not None
    assert other.refusal.code == "drivers-differ"


async def test_more_guests_than_one_question_may_name(tmp_path: Path) -> None:
    async with target(tmp_path) as (_, address):
        names = [f"g{number}" for number in range(2 * MAX_ASKED)]
        answer = await ask(address, process_guests(*names, "small"), TERMS)
        refused = [verdict.refusal.message for verdict in answer.guests if verdict.refusal is not None]
        assert refused == [f"no guest {name!r} is configured on the target" for name in names]
        assert answer.guests[-1].refusal is None
        assert (await ask(address, [], TERMS)).guests == ()


async def test_nobody_there_is_said_with_the_address() -> None:
    with pytest.raises(ConnectionLostError, match=r"127\.0\.0\.1:1 cannot be reached") as caught:
        await ask(Address("127.0.0.1", 1), [], TERMS)
    assert caught.value.code == "target-unreachable"


async def test_another_version_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = preamble.encode

    def older(sent: preamble.Preamble) -> bytes:
        data = layout(sent)
        return data[:4] + (messages.PROTOCOL_VERSION - 1).to_bytes(2, "big") + data[6:]

    monkeypatch.setattr("migrated.link.dialing.encode", older)
    async with target(tmp_path) as (_, address):
        with pytest.raises(PeerError, match="we speak") as caught:
            await ask(address, process_guests("small"), TERMS)
    assert caught.value.code == "version-mismatch"


async def test_a_target_that_stops_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with target(tmp_path) as (agent, address):
        monkeypatch.setattr(agent, "_stopping", True)
        with pytest.raises(PeerError) as caught:
            await ask(address, process_guests("small"), TERMS)
    assert caught.value.code == "shutting-down"


async def test_strangers_end_only_their_own_question(tmp_path: Path) -> None:
    async with target(tmp_path) as (_, address):
        opening = preamble.encode(preamble.Preamble(preamble.Purpose.CONTROL, bytes(16), bytes(32)))
        for said in (b"", b"\x00\x00\x00\x02\x81\xa1", b"\x00\x00\x00\x09" + os.urandom(9), b"\xff" * 64):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(opening + said)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    assert await reader.read() == b""
            writer.close()
        assert (await ask(address, process_guests("small"), TERMS)).guests[0].refusal is None


async def test_an_answer_for_other_guests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def for_nobody(*arguments: Any, **named: Any) -> messages.Capacity:
        return messages.Capacity("migrated", 1, (), 0, 1, ())

    monkeypatch.setattr("migrated.target.agent.capacity", for_nobody)
    async with target(tmp_path) as (_, address):
        with pytest.raises(MigratedError, match="answered for 0 guests, 1 were asked about"):
            await ask(address, process_guests("small"), TERMS)


async def test_the_question_goes_over_tls_like_everything_else(tmp_path: Path) -> None:
    tls = Pki(tmp_path / "pki").tables()
    table = {"agent": {"state_dir": str(tmp_path / "source")}, "tls": tls["source"]}
    terms = SourceAgent(config.decode(table, "source")).dial_terms
    assert terms.credentials is not None
    async with target(tmp_path / "target", tls=tls["target"]) as (_, address):
        assert (await ask(address, process_guests("small"), terms)).guests[0].refusal is None
        with pytest.raises(MigratedError) as caught:
            await ask(address, process_guests("small"), TERMS)
        assert "tls" in f"{caught.value.code} {caught.value.message}".lower()
