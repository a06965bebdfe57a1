"""Dirty tracking and injection through their Python faces, on a process that knows nothing of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from migrated.errors import GuestError, MigratedError
from migrated.memory import maps, native, probe
from migrated.memory.engine import SourceEngine
from migrated.memory.native import lib
from migrated.memory.regions import Region, SourceMemory
from migrated.memory.tracker import Tracker
from tests.unit.memory.child import Child
from tests.unit.memory.tracked import pages, track

SIZE = 1 << 20
SYS_CLOSE, SYS_GETPID = 3, 39

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not probe.features().can_track, reason="this kernel cannot track writes from outside"),
]


@pytest.fixture
def layout(child: Callable[[int, int], Child]) -> Iterator[tuple[Child, SourceMemory]]:
    memory = os.memfd_create("guest")
    os.ftruncate(memory, SIZE)
    process = child(memory, SIZE)
    yield (
        process,
        SourceMemory(
            process.pid, (Region("ram", SIZE, 4096),), maps.find_mappings(process.pid, memory), (memory,), (0,)
        ),
    )
    os.close(memory)


@pytest.fixture
def guest(layout: tuple[Child, SourceMemory]) -> Iterator[tuple[Child, Tracker]]:
    process, memory = layout
    tracker = track(memory)
    yield process, tracker
    tracker.close()


def test_an_unmodified_process_is_tracked_from_outside(guest: tuple[Child, Tracker]) -> None:
    process, tracker = guest
    process.write(0, 4096)
    tracker.arm()
    assert pages(tracker.scan()) == set()
    process.write(4096 * 7, 4096 * 200 + 5)
    assert pages(tracker.scan()) == {7, 200}
    assert pages(tracker.scan()) == set()
    assert pages(tracker.present()) == {0, 1, 7, 200}
    tracker.disarm()
    tracker.disarm()
    process.write(0)
    assert process.end() == 0


def test_a_write_to_a_paused_guest_is_an_error(
    layout: tuple[Child, SourceMemory], guest: tuple[Child, Tracker]
) -> None:
    process, tracker = guest
    tracker.arm()
    engine = SourceEngine(layout[1], (4096,), 1, os.urandom(lib.MGD_SECRET_BYTES))
    try:
        process.write(4096 * 7)
        assert engine.scan_last(tracker) == 4096
        engine.freeze()
        engine.require_unwritten(tracker)
        process.write(4096 * 7)  # marked: the target gets it as it is then
        engine.require_unwritten(tracker)
        process.write(4096 * 200 + 5)
        with pytest.raises(GuestError, match=r"4 KiB .* the first at 0xc8000 in region 0") as caught:
            engine.require_unwritten(tracker)
    finally:
        engine.destroy()
    assert caught.value.code == "written-while-paused"
    tracker.disarm()


def test_scanning_needs_arming(guest: tuple[Child, Tracker]) -> None:
    _process, tracker = guest
    with pytest.raises(MigratedError, match="not registered") as caught:
        tracker.scan()
    assert caught.value.code == "no-rights"


def test_a_guest_that_died_is_no_obstacle(guest: tuple[Child, Tracker]) -> None:
    process, tracker = guest
    tracker.arm()
    process.process.kill()
    process.process.communicate()
    tracker.disarm()
    tracker.close()
    tracker.close()
    with pytest.raises(MigratedError, match="closed"):
        tracker.scan()


def test_arming_a_dead_guest_says_so(guest: tuple[Child, Tracker]) -> None:
    process, tracker = guest
    process.process.kill()
    process.process.communicate()
    with pytest.raises(GuestError) as caught:
        tracker.arm()
    assert caught.value.code == "guest-gone"


def test_a_system_call_answers_as_the_process_would(guest: tuple[Child, Tracker]) -> None:
    process, _tracker = guest
    assert native.inject_syscall(process.pid, SYS_GETPID).result == process.pid
    assert native.inject_syscall(process.pid, SYS_CLOSE, [999]).result == -9
    process.write(1)
    assert process.end() == 0
    with pytest.raises(GuestError):
        native.inject_syscall(process.pid, SYS_GETPID)
