"""Memory for an incoming guest."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import pytest
import structlog.testing

from migrated.errors import ConfigError, HostError, PoolError
from migrated.memory import memfd

MIB = 1 << 20


def test_page_sizes_begin_with_the_base_page() -> None:
    sizes = memfd.page_sizes()
    assert sizes[0] == 4096
    assert list(sizes) == sorted(sizes)


def test_a_page_size_of_this_host_is_accepted() -> None:
    for size in memfd.page_sizes():
        memfd.require_page_size(size)


@pytest.mark.parametrize("size", [3 * MIB, 64 << 10, 0])
def test_what_is_no_page_size_is_refused(size: int) -> None:
    if size in memfd.page_sizes():
        pytest.skip("offered here")
    with pytest.raises(ConfigError, match="is not a page size of this host"):
        memfd.require_page_size(size)


def test_base_pages_come_as_a_memfd_of_the_size_with_nothing_in_it(closing: Callable[[int], int]) -> None:
    fd = closing(memfd.allocate(8 * MIB, 4096, "ram"))
    status = os.fstat(fd)
    assert status.st_size == 8 * MIB
    assert status.st_blocks == 0
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:migrated-ram (deleted)"


def test_huge_pages_are_reserved_and_not_populated(
    huge_pages: Callable[[int], None], closing: Callable[[int], int]
) -> None:
    huge_pages(4)
    fd = closing(memfd.allocate(8 * MIB, 2 * MIB, "ram"))
    status = os.fstat(fd)
    assert status.st_size == 8 * MIB
    assert status.st_blksize == 2 * MIB
    assert status.st_blocks == 0
    with mmap.mmap(fd, 8 * MIB) as view:
        for offset in range(0, 8 * MIB, 2 * MIB):
            view[offset] = 1
    assert os.fstat(fd).st_blocks * 512 == 8 * MIB


def test_an_empty_pool_is_told_with_the_command_that_fills_it(no_descriptor_left: None) -> None:
    pool = next((pool for pool in memfd.pools() if pool.page_bytes == 2 * MIB), None)
    if pool is None:
        pytest.skip("this kernel has no 2 MiB pages")
    needed = 1 << 24
    with pytest.raises(PoolError) as caught:
        memfd.allocate(needed * 2 * MIB, 2 * MIB, "ram")
    assert caught.value.code == "no-huge-pages"
    assert f"region ram needs {needed} pages of 2 MiB" in caught.value.message
    assert "nr_hugepages" in caught.value.hint


@pytest.mark.root
def test_the_command_in_the_hint_makes_the_reservation_possible() -> None:
    pool = memfd.Pool(page_bytes=2 * MIB, total=10, free=6, reserved=4, overcommit=0, surplus=0)
    assert pool.available == 2
    assert pool.raise_command(5) == "sysctl vm.nr_hugepages=13"
    giant = memfd.Pool(page_bytes=1 << 30, total=1, free=0, reserved=0, overcommit=0, surplus=0)
    assert giant.raise_command(2) == "echo 3 > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"


def test_more_base_memory_than_the_host_has_is_refused() -> None:
    with pytest.raises(PoolError, match="available") as caught:
        memfd.allocate(1 << 50, 4096, "ram")
    assert caught.value.code == "no-memory"


def test_a_region_that_is_no_multiple_of_the_page_is_refused() -> None:
    with pytest.raises(HostError) as caught:
        memfd.allocate(3 * MIB, 2 * MIB, "ram")
    assert caught.value.code == "page-size-unsupported"


def test_a_page_size_the_host_does_not_have_is_refused() -> None:
    with pytest.raises(HostError) as caught:
        memfd.allocate(64 * MIB, 64 * MIB, "ram")
    assert caught.value.code == "page-size-unsupported"


def test_without_a_choice_base_pages_replace_huge_ones_and_it_is_said(
    closing: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memfd, "pools", list)
    with structlog.testing.capture_logs() as logs:
        fd, page_bytes = memfd.reserve(4 * MIB, None, name="ram")
    closing(fd)
    assert page_bytes == 4096
    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_a_page_size_that_was_asked_for_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "pools", list)
    with pytest.raises(HostError):
        memfd.reserve(4 * MIB, 2 * MIB, name="ram")
