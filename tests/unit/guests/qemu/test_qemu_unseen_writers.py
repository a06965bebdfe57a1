"""Writers that tracking does not see are found: KVM on behalf of nested guests, and disks that pin the guest's buffers."""

from __future__ import annotations

import os
from typing import Any

import pytest

from migrated.errors import GuestError, GuestRefusedError
from migrated.guests.qemu.config import QemuSourceConfig
from migrated.guests.qemu.memory import disks_pin_buffers
from migrated.guests.qemu.source import QemuSource
from migrated.settings import Timeouts


class FakeMonitor:
    """Answers one command; without an answer QEMU does not know it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def execute(self, command: str, arguments: object = None) -> Any:
        assert command in {"query-stats", "query-named-block-nodes"}
        assert arguments
        if self.answer is None:
            raise GuestError("QMP: CommandNotFound")
        return self.answer

    async def status(self) -> str:
        return "running"


def processors(**figures: int) -> Any:
    """What query-stats says of two virtual processors, the first of which has these figures."""
    stats = [{"name": name, "value": value} for name, value in figures.items()]
    return FakeMonitor([{"stats": stats}, {"stats": [{"name": "nested_run", "value": 0}]}])


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> QemuSource:
    found = QemuSource("vm", QemuSourceConfig(qmp="/run/vm.qmp"), Timeouts())

    async def connected() -> Any:
        return processors(nested_run=4, guest_mode=0)

    monkeypatch.setattr(found.qemu, "monitor", connected)
    return found


async def test_a_guest_in_a_nested_guest_is_refused(source: QemuSource) -> None:
    with pytest.raises(GuestRefusedError) as caught:
        await source._refuse_nested_guest(processors(nested_run=1, guest_mode=1))
    assert caught.value.code == "nested-guest"


async def test_nested_guests_that_have_ended_are_only_counted(source: QemuSource) -> None:
    assert await source._refuse_nested_guest(processors(nested_run=7, guest_mode=0)) == 7
    assert await source._refuse_nested_guest(processors()) == 0


async def test_a_qemu_without_statistics_is_not_refused(source: QemuSource) -> None:
    without: Any = FakeMonitor(None)
    assert await source._refuse_nested_guest(without) == 0


async def test_a_nested_guest_that_ran_during_the_migration_ends_it(source: QemuSource) -> None:
    source._nested_runs = 3
    channel: Any = None
    with pytest.raises(GuestRefusedError, match="during the migration") as caught:
        await source.pause(channel)
    assert caught.value.code == "nested-guest"


@pytest.mark.parametrize(
    ("node", "pins"),
    [
        ({"drv": "file", "cache": {"direct": False}}, False),
        ({"drv": "file", "cache": {"direct": True}}, True),
        ({"drv": "host_device", "cache": {"direct": False}}, True),  # behind a scsi-block: SG_IO pins whatever the mode
        ({"drv": "raw"}, True),  # not told
    ],
)
async def test_a_disk_that_may_pin_buffers_asks_for_quiesced_scans(node: dict[str, Any], pins: bool) -> None:
    monitor: Any = FakeMonitor([node])
    assert await disks_pin_buffers(monitor, os.getpid()) is pins


async def test_a_guest_without_disks_pins_nothing() -> None:
    monitor: Any = FakeMonitor([])
    assert not await disks_pin_buffers(monitor, os.getpid())
