"""Private memory of a process: tracked and read from outside, also what is on swap."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrated.memory import probe
from migrated.memory.engine import SourceEngine
from migrated.memory.native import lib
from migrated.memory.regions import Mapping, Region, SourceMemory
from migrated.memory.tracker import Tracker
from tests.rig import swap
from tests.unit.memory.child import Child
from tests.unit.memory.tracked import pages, track

SIZE = 4 << 20
PAGE = 4096

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not probe.features().can_track, reason="this kernel cannot track writes from outside"),
]


@pytest.fixture
def guest(child: Callable[[int, int], Child]) -> Iterator[tuple[Child, SourceMemory, Tracker]]:
    process = child(-1, SIZE)
    memory = SourceMemory(
        pid=process.pid,
        regions=(Region("ram", SIZE, PAGE),),
        mappings=(Mapping(0, process.address, 0, SIZE),),
        memory_fds=(os.open(f"/proc/{process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC),),
        file_offsets=(process.address,),
        private=(True,),
    )
    tracker = track(memory)
    yield process, memory, tracker
    tracker.close()
    os.close(memory.memory_fds[0])


def marked_bytes(memory: SourceMemory, tracker: Tracker) -> int:
    """What the first round would read."""
    engine = SourceEngine(memory, [PAGE], 1, bytes(lib.MGD_SECRET_BYTES))
    try:
        engine.mark_populated(tracker)
        return engine.stats().dirty_bytes
    finally:
        engine.destroy()


def test_private_memory_is_tracked(guest: tuple[Child, SourceMemory, Tracker]) -> None:
    process, memory, tracker = guest
    process.write(0, PAGE)
    tracker.arm()
    assert pages(tracker.scan()) == set()
    assert marked_bytes(memory, tracker) == 2 * PAGE
    process.write(PAGE, PAGE * 200 + 5)
    assert pages(tracker.scan()) == {1, 200}
    assert pages(tracker.present()) == {0, 1, 200}
    tracker.disarm()
    process.write(0)
    assert process.end() == 0


def test_a_private_mapping_of_a_file_is_read_whole(guest: tuple[Child, SourceMemory, Tracker]) -> None:
    process, memory, _tracker = guest
    process.write(0)
    behind = SourceMemory(
        memory.pid,
        memory.regions,
        memory.mappings,
        memory.memory_fds,
        memory.file_offsets,
        private=(True,),
        file_behind=(True,),
    )
    tracker = track(behind)
    tracker.arm()
    assert marked_bytes(behind, tracker) == SIZE
    process.write(PAGE * 3)
    assert pages(tracker.scan()) == {3}
    tracker.disarm()
    tracker.close()


def swap_out(process: Child) -> None:
    """The kernel does not promise to take everything away at once."""
    while "VmSwap:\t       0 kB" in Path(f"/proc/{process.pid}/status").read_text():
        process.page_out()


def test_memory_on_swap_is_guest_memory(guest: tuple[Child, SourceMemory, Tracker]) -> None:
    process, memory, tracker = guest
    written = [PAGE * page for page in range(10, 20)]
    try:
        with swap.zram(64 << 20):
            process.write(*written)
            swap_out(process)
            tracker.arm()
            assert marked_bytes(memory, tracker) == len(written) * PAGE
            assert pages(tracker.scan()) == set()
            process.write(PAGE * 12)  # from swap, protected while it was there
            assert pages(tracker.scan()) == {12}
            process.write(PAGE * 13, PAGE * 30)
            process.page_out()  # written, then taken away
            assert pages(tracker.scan()) == {13, 30}
            assert pages(tracker.scan()) == set()
            assert pages(tracker.present()) == {*range(10, 20), 30}
            for page, value in ((10, 1), (12, 2), (13, 2), (30, 1), (31, 0)):
                assert os.pread(memory.memory_fds[0], 1, process.address + page * PAGE) == bytes([value])
            tracker.disarm()
            assert process.end() == 0
    except swap.SwapUnavailableError as error:
        pytest.skip(str(error))
