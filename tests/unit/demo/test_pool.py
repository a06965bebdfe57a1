"""The demo raises the pool of huge pages for as long as it runs, and takes nobody else's pages away."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.demo import pool
from migrated.errors import PoolError
from migrated.memory import memfd

PAGE = 2 << 20


class Kernel:
    """/sys/kernel/mm/hugepages of a host on which ``memory`` pages can be had at most."""

    def __init__(self, directory: Path, *, total: int, free: int, memory: int) -> None:
        self.path = directory / "hugepages-2048kB"
        self.memory = memory
        self.path.mkdir()
        for name in (
            "nr_hugepages",
            "free_hugepages",
            "resv_hugepages",
            "nr_overcommit_hugepages",
            "surplus_hugepages",
        ):
            (self.path / name).write_text("0\n")
        self._show(total, free)

    def _show(self, total: int, free: int) -> None:
        (self.path / "nr_hugepages").write_text(f"{total}\n")
        (self.path / "free_hugepages").write_text(f"{free}\n")

    @property
    def total(self) -> int:
        return int((self.path / "nr_hugepages").read_text())

    def set(self, path: Path, total: int) -> None:
        assert path == self.path / "nr_hugepages"
        free = int((self.path / "free_hugepages").read_text())
        granted = min(total, self.memory)
        self._show(granted, free + granted - self.total)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path, total=10, free=2, memory=30)
    monkeypatch.setattr(memfd, "POOLS", tmp_path)
    monkeypatch.setattr(pool, "_write", made.set)
    return made


def test_what_lacks_is_added_and_taken_away_again(kernel: Kernel) -> None:
    with pool.huge_pages(12 * PAGE, PAGE):
        assert kernel.total == 20
    assert kernel.total == 10


def test_pages_that_are_free_are_used_as_they_are(kernel: Kernel) -> None:
    with pool.huge_pages(2 * PAGE, PAGE):
        assert kernel.total == 10


def test_where_the_kernel_finds_fewer_pages_only_those_are_taken_away(kernel: Kernel) -> None:
    with pytest.raises(PoolError, match="only 20 of 38"), pool.huge_pages(40 * PAGE, PAGE):
        pass
    assert kernel.total == 10


def test_a_user_who_may_not_raise_the_pool_is_told_the_command(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_path: Path, _total: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pool, "_write", refused)
    with pytest.raises(PoolError, match="Permission denied") as caught, pool.huge_pages(12 * PAGE, PAGE):
        pass
    assert caught.value.hint.split()[-1] in {"vm.nr_hugepages=20", f"{kernel.path}/nr_hugepages"}
    assert "20" in caught.value.hint
