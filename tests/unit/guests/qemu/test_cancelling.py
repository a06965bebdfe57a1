"""A cancellation is never lost: not even one that comes together with the answer that was waited for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from qemu.qmp import QMPClient

from migrated.guests.qemu.qmp import Monitor


class Answers(QMPClient):
    """Answers a command when a test says so."""

    def __init__(self) -> None:
        super().__init__("vm")
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def execute(self, *_: object, **__: object) -> object:
        return await self.answer


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Answers]:
    yield Answers()


@pytest.mark.parametrize("turns", range(6))
async def test_an_abort_that_comes_together_with_qemus_answer_ends_the_wait(client: Answers, turns: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        monitor = Monitor("vm", Path("vm.qmp"), client, sock)

        async def work() -> None:
            await monitor.execute("stop")
            await asyncio.Event().wait()  # the rest of a migration

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        client.answer.set_result({})
        for _ in range(turns):  # the answer is so far on its way
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=2)
        assert done, "the cancellation was lost"
        assert task.cancelled()
