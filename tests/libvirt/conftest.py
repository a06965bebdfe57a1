"""Two libvirts, shared by the tests of a module: each with its own directories, domains and, in each test, agents."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migrated.demo.pair import short_directory
from tests.rig import libvirt_host, supervisor
from tests.rig.libvirt_host import LibvirtHost, libvirt_hosts
from tests.rig.moving_domain import MEMORY_BYTES, MovingDomain, moving_domain
from tests.rig.pages import PagesUnavailableError, more_pages

MIB = 1 << 20

Domains = Callable[..., contextlib.AbstractAsyncContextManager[MovingDomain]]


@pytest.fixture(scope="session")
def page_pool() -> Iterator[None]:
    """2 MiB pages for a domain on either host, given back at the end."""
    if reason := libvirt_host.missing():
        pytest.skip(reason)
    try:
        with more_pages(2 * MEMORY_BYTES // (2 * MIB), 2 * MIB):
            yield
    except PagesUnavailableError as error:
        pytest.skip(str(error))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def libvirts(page_pool: None) -> AsyncIterator[tuple[LibvirtHost, ...]]:
    """Both libvirts, running."""
    with supervisor.directory("mgt-", short_directory()) as directory:
        async with libvirt_hosts(directory, "a", "b") as hosts:
            yield hosts


@pytest.fixture(scope="module")
def domains(libvirts: tuple[LibvirtHost, ...]) -> Domains:
    """``domains(…)``: a booted domain on the first libvirt, and agents beside both; arguments of `moving_domain`."""
    numbers = itertools.count()

    def make(**options: Any) -> contextlib.AbstractAsyncContextManager[MovingDomain]:
        directory: Path = libvirts[0].directory.parent / f"t{next(numbers)}"
        directory.mkdir()
        return moving_domain(libvirts, directory, **options)

    return make
