"""A hostile peer ends its own session only: the agent lives on, migrations beside it are unharmed, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from pathlib import Path

import pytest

from migrated.protocol.framing import LENGTH_BYTES
from migrated.protocol.preamble import Preamble, Purpose, encode
from tests.faults.conftest import Rigs
from tests.faults.hostile import Peer, Recording, TlsPeer, draw_preamble, renamed, spoil
from tests.faults.proxy import UP
from tests.faults.rig import Rig, is_alive, rig
from tests.rig.pki import Pki

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "25"))
SEED = int(os.environ.get("HOSTILE_SEED", "20240901"))


async def record(rig: Rig, mode: str) -> Recording:
    """What the source says in a real migration."""
    rig.proxy.tape.clear()
    rig.proxy.taping = True
    try:
        assert (await rig.migrate(mode=mode, downtime_limit_ms=300.0))["state"] == "completed"
        await rig.sound()
    finally:
        rig.proxy.taping = False
    tape = rig.proxy.tape
    control = [data for preamble, way, data in tape if preamble.purpose is Purpose.CONTROL and way == UP]
    first = next(preamble for preamble, _, _ in tape)
    pages: dict[tuple[Purpose, int], bytes] = {}
    for preamble, way, data in tape:
        if preamble.purpose is not Purpose.CONTROL and way == UP:
            key = (preamble.purpose, preamble.stream)
            pages[key] = (pages.get(key, b"") + data)[: 1 << 20]
    return Recording(first.session, first.token, control, pages)


async def moves(rig: Rig) -> None:
    guest = await rig.sound()
    result = await rig.migrate(mode="hybrid", downtime_limit_ms=300.0)
    assert result["state"] == "completed", f"{result}\n{rig.logs()}"
    assert await rig.sound() != guest


async def test_spoilt_sessions_do_no_harm_to_a_target(rigs: Rigs) -> None:
    rig = await rigs.get(size_mib=4)
    try:
        recordings = [await record(rig, mode) for mode in ("hybrid", "precopy", "postcopy")]
        rig.guest = await rig.sound()
        pid = rig.target.pid
        until = time.monotonic() + SECONDS
        number = 0
        while time.monotonic() < until:
            draw = random.Random(f"{SEED}/{number}")
            made = spoil(draw.choice(recordings), draw)
            await Peer(rig.proxy.target, made, draw).run()
            assert is_alive(pid), f"the target died of session {number} of seed {SEED}\n{rig.logs()}"
            number += 1
            # A session that got as far as COMMIT is a guest of the target's, as it should be: end it.
            await rig.end_strays()
        await rig.over()
        await moves(rig)
    except BaseException:
        await rigs.drop(rig)
        raise


async def test_spoilt_sessions_inside_tls_do_no_harm_to_a_target(
    rigs: Rigs, guest_program: Path, tmp_path: Path
) -> None:
    plain = await rigs.get(size_mib=4)
    try:
        recordings = [await record(plain, mode) for mode in ("hybrid", "postcopy")]
    except BaseException:
        await rigs.drop(plain)
        raise
    pki = Pki(tmp_path)
    files = pki.write("source", place="hostile")
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    async with rig(guest_program, prove=False, size_mib=4, tls=pki.tables()) as made:
        direct = "{}:{}".format(*made.proxy.target)
        options = {"mode": "hybrid", "to": direct, "downtime_limit_ms": 300.0}
        assert (await made.migrate(**options))["state"] == "completed", made.logs()
        await made.settle_baseline()
        made.guest = await made.sound()
        pid = made.target.pid
        until = time.monotonic() + SECONDS / 2
        number = 0
        while time.monotonic() < until:
            draw = random.Random(f"{SEED}/tls/{number}")
            await TlsPeer(made.proxy.target, spoil(draw.choice(recordings), draw), draw, context).run()
            assert is_alive(pid), f"the target died of session {number} of seed {SEED}\n{made.logs()}"
            number += 1
            await made.end_strays()
        await made.over()
        known = (await made.target.request("GET", "/v1/migrations"))["migrations"]
        assert len(known) > 1  # theirs too: their certificate is good
        assert (await made.migrate(**options))["state"] == "completed", made.logs()
        assert await made.sound() != made.guest


async def test_strangers_beside_a_migration_do_it_no_harm(rigs: Rigs) -> None:
    rig = await rigs.get(size_mib=4)
    try:
        real = await record(rig, "hybrid")
        draw = random.Random(SEED)
        for mode in ("hybrid", "postcopy"):
            guest = await rig.sound()
            rig.proxy.expect(None)
            running = asyncio.ensure_future(rig.migrate(mode=mode, downtime_limit_ms=300.0, max_bandwidth="20MB"))
            await rig.proxy.dialled.wait()
            session = next(iter(rig.proxy.sessions))
            stray = renamed(real, draw)
            while not running.done():
                wrong = draw.choice(
                    (
                        draw_preamble(draw),
                        # Their session, a token that is not theirs, for every purpose.
                        encode(Preamble(Purpose.CONTROL, session, draw.randbytes(32))) + real.control[0],
                        encode(Preamble(Purpose.BULK, session, draw.randbytes(32))) + draw.randbytes(5000),
                        encode(Preamble(Purpose.URGENT, session, draw.randbytes(32))) + draw.randbytes(100),
                        # A session of its own for the guest that is being moved.
                        encode(Preamble(Purpose.CONTROL, stray.session, stray.token)) + stray.control[0],
                        encode(Preamble(Purpose.CONTROL, stray.session, stray.token)) + b"\0\0\0\x05hello",
                    )
                )
                _, writer = await asyncio.open_connection(*rig.proxy.target)
                writer.write(wrong)
                await asyncio.wait({running}, timeout=0.02)
                writer.transport.abort()
            result = await running
            assert result["state"] == "completed", f"{result}\n{rig.logs()}"
            assert await rig.sound() != guest
    except BaseException:
        await rigs.drop(rig)
        raise


async def test_a_hostile_target_cannot_hurt_a_source_or_its_guest(rigs: Rigs) -> None:
    rig = await rigs.get(size_mib=4)
    try:
        guest = await rig.sound()
        rig.proxy.tape.clear()
        rig.proxy.taping = True
        assert (await rig.migrate(mode="hybrid", downtime_limit_ms=300.0))["state"] == "completed"
        rig.proxy.taping = False
        guest = await rig.sound()
        # Before COMMIT only: a target that lies after it has the guest's word that it has it.
        answers = [data for p, way, data in rig.proxy.tape if p.purpose is Purpose.CONTROL and way != UP]
        answers = [one for one in answers if b"loaded" not in one and b"running" not in one and b"done" not in one]
        until = time.monotonic() + SECONDS / 2
        number = 0
        while time.monotonic() < until:
            draw = random.Random(f"{SEED}/target/{number}")
            number += 1
            made = spoil(Recording(bytes(16), bytes(32), list(answers), {}), draw)

            async def answer(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, frames: list[bytes] = made.control
            ) -> None:
                await reader.read(1 << 16)
                for one in frames:
                    writer.write(one[: LENGTH_BYTES + (1 << 20)])
                await asyncio.wait({asyncio.ensure_future(reader.read(1 << 20))}, timeout=0.3)
                writer.transport.abort()

            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            result = await rig.migrate(mode="hybrid", to=f"127.0.0.1:{port}")
            server.close()
            assert result["state"] == "failed", f"session {number - 1} of seed {SEED}: {result}\n{rig.logs()}"
            assert await rig.sound() == guest
        await moves(rig)
    except BaseException:
        await rigs.drop(rig)
        raise
