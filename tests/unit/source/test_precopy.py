"""When pre-copy ends, seen from the guest: what it writes until the pause counts."""

from __future__ import annotations

import asyncio
import types
from typing import Any

import pytest

from migrated.errors import MigratedError
from migrated.protocol.messages import BarrierAck
from migrated.source import precopy as module
from migrated.source.precopy import PreCopy

GIB = 1 << 30
MIB = 1 << 20


class Guest:
    """Writes what the test says before each scan, and never uses direct I/O."""

    needs_quiesced_scans = False

    def __init__(self, *writes: int) -> None:
        self.writes = list(writes)


class Engine:
    """Sends 1 GiB a second, by a clock of its own.  Everything that is marked has changed."""

    def __init__(self, guest: Guest, rounds_done: asyncio.Queue[int]) -> None:
        self.guest = guest
        self.rounds_done = rounds_done
        self.now = 0.0
        self.marked = self.sent = self.rounds = self.barriers = 0

    def stats(self) -> Any:
        return types.SimpleNamespace(dirty_bytes=self.marked, wire_bytes=self.sent)

    def mark_populated(self, _tracker: object) -> None:
        self.marked = GIB

    def marked_maps(self) -> list[Any]:
        return []

    def start_round(self, number: int) -> None:
        self.now += self.marked / GIB
        self.sent += self.marked
        self.marked = 0
        self.rounds = number
        self.rounds_done.put_nowait(number)

    def scan(self, _tracker: object, *, quiesced: bool) -> int:
        assert quiesced
        written = self.guest.writes.pop(0)
        self.marked += written
        return written

    def sample(self, _blocks: int) -> float:
        return 1.0

    def barrier(self, number: int) -> None:
        self.barriers = number


class Link:
    """Acknowledges each barrier."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def send(self, _message: object) -> None: ...

    async def expect(self, kind: type, **_: object) -> object:
        assert kind is BarrierAck
        return BarrierAck(self.engine.barriers)


async def precopy_of(
    monkeypatch: pytest.MonkeyPatch, *writes: int, mode: str = "precopy", max_rounds: int = 8
) -> tuple[bool, Engine]:
    """Run the pre-copy of a guest with 50 ms of downtime; return what it decided, and the engine."""
    guest, rounds_done = Guest(*writes), asyncio.Queue[int]()
    engine = Engine(guest, rounds_done)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: engine.now))
    nothing: Any = types.SimpleNamespace(info=lambda *_, **__: None, round=lambda *_, **__: None, dirty=lambda *_: None)
    record: Any = types.SimpleNamespace(guest="vm1", round=0)
    options: Any = types.SimpleNamespace(mode=mode, downtime_limit_seconds=0.05, max_rounds=max_rounds)
    made: dict[str, Any] = {
        "engine": engine,
        "guest": guest,
        "link": Link(engine),
        "options": options,
        "record": record,
    }
    unused = dict.fromkeys(("tracker", "rates", "trace", "log"), nothing)
    precopy = PreCopy(**made, **unused, rounds_done=rounds_done, switch_now=asyncio.Event(), barrier_seconds=1)
    return await precopy.run(), engine


async def test_what_fits_before_and_after_the_barrier_is_sent_while_the_guest_is_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish, engine = await precopy_of(monkeypatch, 4 * MIB, 4 * MIB)
    assert finish
    assert (engine.rounds, engine.barriers) == (1, 1)


async def test_a_guest_that_writes_on_until_the_barrier_gets_another_round(monkeypatch: pytest.MonkeyPatch) -> None:
    finish, engine = await precopy_of(monkeypatch, 4 * MIB, 300 * MIB, 4 * MIB, 0)
    assert finish
    assert (engine.rounds, engine.barriers) == (2, 2)
    assert engine.marked == 4 * MIB


async def test_after_the_last_round_it_gives_up_rather_than_exceed_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MigratedError) as failed:
        await precopy_of(monkeypatch, 4 * MIB, 300 * MIB, max_rounds=1)
    assert failed.value.code == "not-converging"


async def test_hybrid_mode_sends_the_rest_after_the_switchover_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    finish, engine = await precopy_of(monkeypatch, 4 * MIB, 300 * MIB, mode="hybrid", max_rounds=1)
    assert not finish
    assert (engine.rounds, engine.barriers) == (1, 1)
