"""Who maps what."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import pytest

from migrated.errors import GuestError
from migrated.memory import inspection, maps
from migrated.memory.engine import SourceEngine
from migrated.memory.regions import Region, SourceMemory
from tests.unit.memory.child import Child

MIB = 1 << 20


@pytest.fixture
def memory(closing: Callable[[int], int]) -> int:
    fd = closing(os.memfd_create("guest ram"))
    os.ftruncate(fd, 4 * MIB)
    return fd


def test_lines_are_read_whatever_the_path() -> None:
    found = maps.parse(
        "7f05707e8000-7f05707ea000 rw-p 00033000 fe:00 338944                     /usr/lib/ld.so\n"
        "7f0000000000-7f0000400000 rw-s 00200000 00:01 77 /memfd:a b (deleted)\n"
        "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n"
        "7f1000000000-7f1000001000 rw-p 00000000 00:00 0 \n"
    )
    assert [area.shared for area in found] == [False, True, False, False]
    assert found[1] == maps.Area(0x7F0000000000, 0x7F0000400000, "rw-s", 0x200000, "00:01", 77, "/memfd:a b (deleted)")
    assert found[2].path == "[vsyscall]"
    assert found[3].path == ""


def test_what_is_no_maps_file_is_refused() -> None:
    with pytest.raises(ValueError, match="not a line"):
        maps.parse("hello\n")


def test_a_file_is_found_in_a_process(memory: int, child: Callable[[int, int], Child]) -> None:
    process = child(memory, 4 * MIB)
    (mapping,) = maps.find_mappings(process.pid, memory, region=3)
    assert (mapping.region, mapping.offset, mapping.length_bytes) == (3, 0, 4 * MIB)
    (piece,) = maps.find_mappings(process.pid, memory, file_offset=MIB, size_bytes=2 * MIB)
    assert (piece.address - mapping.address, piece.offset, piece.length_bytes) == (MIB, 0, 2 * MIB)


def test_other_processes_that_map_the_file_are_found_by_name(memory: int, child: Callable[[int, int], Child]) -> None:
    guest, other = child(memory, 4 * MIB), child(memory, MIB)
    key = maps.file_key(memory)
    found = maps.mapped_elsewhere({key}, {guest.pid, os.getpid()})
    assert [process.pid for process in found] == [other.pid]
    assert "python" in str(found[0])
    other.end()
    assert maps.mapped_elsewhere({key}, {guest.pid, os.getpid()}) == []


def test_another_file_of_the_same_name_is_not_taken_for_it(
    memory: int, closing: Callable[[int], int], child: Callable[[int, int], Child]
) -> None:
    twin = closing(os.memfd_create("guest ram"))
    os.ftruncate(twin, 4 * MIB)
    child(twin, 4 * MIB)
    assert maps.mapped_elsewhere({maps.file_key(memory)}, {os.getpid()}) == []


@pytest.mark.root
def test_the_file_behind_a_mapping_can_be_opened(
    memory: int, child: Callable[[int, int], Child], closing: Callable[[int], int]
) -> None:
    process = child(memory, 4 * MIB)
    process.write(5, 5)
    area = next(area for area in maps.areas(process.pid) if area.key == maps.file_key(memory))
    fd = closing(maps.open_area(process.pid, area))
    assert os.fstat(fd).st_ino == os.fstat(memory).st_ino
    assert os.pread(fd, 1, 5) == b"\2"


@pytest.mark.root
def test_the_engine_compares_huge_pages_of_such_a_file_in_place(
    memory: int, child: Callable[[int, int], Child], closing: Callable[[int], int]
) -> None:
    key = maps.file_key(memory)
    process = child(memory, 4 * MIB)
    fd = closing(maps.open_area(process.pid, next(area for area in maps.areas(process.pid) if area.key == key)))
    region = Region("ram", 4 * MIB, 2 * MIB)
    source = SourceMemory(process.pid, (region,), (), (fd,), (0,), (False,))
    engine = SourceEngine(source, (2 * MIB,), 1, bytes(range(256)) * 16 + bytes(8))
    try:
        assert [area.permissions for area in maps.areas(os.getpid()) if area.key == key] == ["r--s"]
    finally:
        engine.destroy()


def test_an_ended_process_is_told() -> None:
    with pytest.raises(GuestError) as caught:
        maps.areas(2**22 + 1)
    assert caught.value.code == "guest-gone"


def test_inspecting_tells_what_can_be_moved_and_what_not(memory: int, child: Callable[[int, int], Child]) -> None:
    process = child(memory, 4 * MIB)
    (found,) = inspection.inspect(process.pid)
    assert (found.size_bytes, found.page_bytes, found.problem) == (4 * MIB, 4096, "")
    with mmap.mmap(memory, 4 * MIB):
        (found,) = inspection.inspect(process.pid)
        assert f"process {os.getpid()}" in found.problem
