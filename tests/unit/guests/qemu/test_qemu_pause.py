"""Stopping a QEMU and saving its devices: the two commands are given together where their order is certain."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrated.errors import GuestError
from migrated.guests.qemu.config import QemuSourceConfig
from migrated.guests.qemu.qmp import MonitorCommands
from migrated.guests.qemu.source import QemuSource
from migrated.settings import Timeouts

REFUSED = GuestError("QEMU refused stop", code="qmp-failed")


class Slow:
    """A monitor, and a state file behind it, whose ``stop`` and save are answered when a test says so."""

    def __init__(self, *, keeps_order: bool) -> None:
        self.keeps_order = keeps_order
        self.told: list[str] = []
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.saved: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.guest = QemuSource("vm", QemuSourceConfig(qmp="/nowhere"), Timeouts())

    async def execute(self, command: str, _: Mapping[str, object] | None = None, *, limit: float | None = None) -> Any:
        assert limit
        self.told.append(command)
        await self.stopped

    def forget_events(self) -> None: ...

    async def save(self, limit: float) -> bytes:
        assert limit
        self.told.append("save")
        return await self.saved

    def stop_and_save(self) -> asyncio.Task[bytes]:
        monitor = cast("MonitorCommands", self)
        return asyncio.ensure_future(self.guest._stop_and_save(monitor, cast("Any", SimpleNamespace(save=self.save))))

    @staticmethod
    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.mark.parametrize("keeps_order", [True, False], ids=["qmp", "libvirt"])
async def test_the_save_is_given_before_the_answer_to_stop_only_if_it_cannot_overtake(keeps_order: bool) -> None:
    slow = Slow(keeps_order=keeps_order)
    working = slow.stop_and_save()
    await slow.turns()
    assert slow.told == (["stop", "save"] if keeps_order else ["stop"])
    slow.stopped.set_result(None)
    await slow.turns()
    assert slow.told == ["stop", "save"]
    assert slow.guest.stopped_at is not None
    slow.saved.set_result(b"state")
    assert await working == b"state"


@pytest.mark.parametrize("keeps_order", [True, False], ids=["qmp", "libvirt"])
async def test_a_stop_that_is_refused_fails_even_if_the_state_was_saved(keeps_order: bool) -> None:
    slow = Slow(keeps_order=keeps_order)
    working = slow.stop_and_save()
    await slow.turns()
    slow.saved.set_result(b"of a running guest")
    slow.stopped.set_exception(REFUSED)
    with pytest.raises(GuestError, match="refused stop"):
        await working
    assert slow.guest.stopped_at is None


@pytest.mark.parametrize("keeps_order", [True, False], ids=["qmp", "libvirt"])
async def test_an_abort_leaves_neither_command_behind(keeps_order: bool) -> None:
    slow = Slow(keeps_order=keeps_order)
    before = asyncio.all_tasks()
    working = slow.stop_and_save()
    await slow.turns()
    working.cancel()
    await asyncio.wait({working})
    assert working.cancelled()
    assert asyncio.all_tasks() == before
