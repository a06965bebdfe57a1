"""Agents for the tests of a module, guests for each test."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from migrated.memory import probe
from tests.integration.place import Guest, Place, build_guest, place


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example guest, compiled; or a skip that says what is lacking."""
    features = probe.features()
    if not (features.has_userfaultfd or features.has_user_mode_only) or not features.minor_shmem:
        pytest.skip("this kernel has no userfaultfd with minor faults on shmem")
    if not features.can_track:
        pytest.skip("this kernel cannot track writes from outside")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return build_guest(tmp_path_factory.mktemp("guest"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agents(program: Path) -> AsyncIterator[Place]:
    """Both agents, for a whole module."""
    async with place(program) as here:
        yield here


@pytest_asyncio.fixture(loop_scope="module")
async def here(agents: Place) -> AsyncIterator[Place]:
    """The agents, and no guest before or after."""
    yield agents
    await agents.without_guests()


@pytest_asyncio.fixture(loop_scope="module")
async def guest(here: Place) -> Guest:
    """A guest below the source, at work."""
    return await here.guest()
