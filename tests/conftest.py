"""What every test may ask for: rights, huge pages, and the certainty that nothing is left behind.

Folders have conftests of their own for what only they need.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from migrated.memory.memfd import DEFAULT_PAGE_BYTES, Pool, pools
from tests.rig import supervisor
from tests.rig.pages import PagesUnavailableError, more_pages

supervisor.start()

# A shell that runs us in the background has SIGINT ignored, and what we start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, and nothing else.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what this machine has no right to do."""
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        pytest.skip("needs root")


def _pool(page_bytes: int) -> Pool | None:
    return next((pool for pool in pools() if pool.page_bytes == page_bytes), None)


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """``huge_pages(n)``: see to it that n 2 MiB pages can be had; what was added to the pool is taken away afterwards."""
    undo = contextlib.ExitStack()

    def want(count: int, page_bytes: int = DEFAULT_PAGE_BYTES) -> None:
        pool = _pool(page_bytes)
        if pool is None:
            pytest.skip("this kernel has no huge pages")
        if os.geteuid() == 0:
            try:
                undo.enter_context(more_pages(count, page_bytes))
            except PagesUnavailableError as error:
                pytest.skip(str(error))
        elif pool.available < count:
            pytest.skip(f"{count} huge pages cannot be had")

    with undo:
        yield want


@pytest.fixture
def no_descriptor_left() -> Iterator[None]:
    """The test closes every descriptor it opened."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = set(os.listdir("/proc/self/fd")) - before
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in left if os.path.lexists(f"/proc/self/fd/{fd}")}
    assert not links, f"descriptors left open: {links}"


@pytest.fixture
def python() -> str:
    """The interpreter to start children with."""
    return sys.executable
