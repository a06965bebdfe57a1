"""The life of an engine, as Python sees it."""

from __future__ import annotations

import asyncio
import os

from migrated.memory import memfd
from migrated.memory.engine import TargetEngine, ledger_bytes
from migrated.memory.native import lib
from migrated.memory.regions import Region, TargetMemory

SIZE = 64 << 20
LIVES = 50


async def test_figures_may_be_asked_for_until_the_very_end() -> None:
    """Watchers ask at every change of state, the last one among them: just when the engine is being taken down."""
    for _ in range(LIVES):
        fd = memfd.allocate(SIZE, 4096, "ram")
        memory = (TargetMemory(Region("ram", SIZE, 4096), fd),)
        ledger = os.memfd_create("ledger")
        os.ftruncate(ledger, ledger_bytes(memory))
        engine = TargetEngine(memory, 2, ledger, os.urandom(lib.MGD_SECRET_BYTES))
        closing = asyncio.ensure_future(engine.close())
        while not closing.done():
            if engine.alive:
                assert engine.stats().pages == SIZE // 4096
            await asyncio.sleep(0)
        await closing
        os.close(fd)
        os.close(ledger)
