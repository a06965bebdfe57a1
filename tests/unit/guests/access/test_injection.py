"""Descriptors given to a process that has no channel to us."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.privileged import open_files

pytestmark = pytest.mark.root


@pytest.fixture
def stranger() -> Iterator[PidHandle]:
    """A process that waits for the end of its input."""
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        handle = PidHandle.attach(process.pid)
        try:
            yield handle
        finally:
            handle.close()
            process.kill()


def test_a_process_is_given_descriptors_and_nothing_else_changes(stranger: PidHandle) -> None:
    before = open_files(stranger.pid)
    fds = [os.memfd_create(f"given-{number}") for number in range(3)]
    try:
        numbers = injection.give_fds(stranger, fds)
        for fd, number in zip(fds, numbers, strict=True):
            assert os.path.samestat(os.fstat(fd), os.stat(f"/proc/{stranger.pid}/fd/{number}"))
        assert open_files(stranger.pid).keys() - before.keys() == set(numbers)
    finally:
        for fd in fds:
            os.close(fd)
    assert stranger.poll() is None


async def test_a_process_is_handed_the_right_to_make_a_userfaultfd(stranger: PidHandle) -> None:
    before = open_files(stranger.pid)
    fd = os.memfd_create("migrated-given")
    try:
        take_back = await injection.by_injection(stranger)(fd)
        assert len(open_files(stranger.pid)) == len(before) + 1
        await take_back()
        assert open_files(stranger.pid) == before
    finally:
        os.close(fd)
