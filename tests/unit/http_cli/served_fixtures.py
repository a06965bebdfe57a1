"""Fixtures around `served`, loaded as a plugin by the tests that want them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrated.client import Client
from migrated.demo.pair import free_port
from tests.unit.http_cli.served import Served, serving


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """pytest's own tmp_path is too long for a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="mgd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def source(short_dir: Path, unused_port: int) -> AsyncIterator[Served]:
    async with serving(short_dir, "source", unused_port) as served:
        yield served


@pytest.fixture
async def target(short_dir: Path, unused_port: int) -> AsyncIterator[Served]:
    async with serving(short_dir, "target", unused_port) as served:
        yield served


@pytest.fixture
async def client(source: Served) -> AsyncIterator[Client]:
    async with Client(str(source.settings.control_socket)) as connected:
        yield connected


@pytest.fixture
def unused_port() -> int:
    return free_port()
