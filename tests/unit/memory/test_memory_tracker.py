"""Dirty tracking and injection through their Python faces, on a process that knows nothing of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest

from migrated.errors import GuestError, MigratedError
from migrated.guests.driver import Region, SourceMemory
from migrated.memory import maps, native, probe
from migrated.memory.tracker import Tracker
from tests.unit.memory.child import Child

SIZE = 1 << 20
SYS_CLOSE, SYS_GETPID, SYS_USERFAULTFD, SYS_PIDFD_GETFD = 3, 39, 323, 438

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not probe.features().can_track, reason="this kernel cannot track writes from outside"),
]


def take_fd(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        return int(ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, number, 0))
    finally:
        os.close(pidfd)


@pytest.fixture
def guest(child: Callable[[int, int], Child]) -> Iterator[tuple[Child, Tracker]]:
    memory = os.memfd_create("guest")
    os.ftruncate(memory, SIZE)
    process = child(memory, SIZE)
    injected = native.inject_syscall(process.pid, SYS_USERFAULTFD, [os.O_CLOEXEC | os.O_NONBLOCK])
    assert injected.result >= 0
    assert injected.stopped_seconds > 0
    uffd = take_fd(process.pid, injected.result)
    native.uffd_api(uffd, faults=False, tracking=True)
    layout = SourceMemory(
        process.pid, (Region("ram", SIZE, 4096),), maps.find_mappings(process.pid, memory), (memory,), (0,)
    )
    tracker = Tracker(layout, uffd)
    os.close(uffd)
    yield process, tracker
    tracker.close()
    os.close(memory)


def pages(bitmaps: list[bytes]) -> set[int]:
    (bitmap,) = bitmaps
    number = int.from_bytes(bitmap, "little")
    return {page for page in range(SIZE // 4096) if number >> page & 1}


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
