"""Children and descriptors that end with the test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.rig.authority import Authority
from tests.unit.memory.child import Child


@pytest.fixture
def child() -> Iterator[Callable[[int, int], Child]]:
    children: list[Child] = []

    def start(fd: int, size_bytes: int) -> Child:
        children.append(Child(fd, size_bytes))
        return children[-1]

    yield start
    for one in children:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def closing() -> Iterator[Callable[[int], int]]:
    """``closing(fd)``: closed at the test's end."""
    fds: list[int] = []

    def keep(fd: int) -> int:
        fds.append(fd)
        return fd

    yield keep
    for fd in fds:
        os.close(fd)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of two hosts."""
    return Authority(tmp_path_factory.mktemp("authority"))
