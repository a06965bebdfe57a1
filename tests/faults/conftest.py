"""A rig that lasts: agents and a guest that one test after the other uses, made anew after a test that failed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migrated.demo.pair import short_directory
from migrated.errors import GuestError
from tests.faults.rig import Rig, build_guest, rig
from tests.rig import supervisor

RigMaker = Callable[..., Awaitable[Rig]]


@pytest.fixture(scope="session")
def guest_program() -> Iterator[Path]:
    """The guest, compiled."""
    with supervisor.directory("mg-", short_directory()) as directory:
        try:
            yield build_guest(directory)
        except GuestError as error:
            pytest.skip(str(error))


class Rigs:
    """Rigs by their options; at most one of each runs."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._running: dict[str, tuple[Rig, contextlib.AsyncExitStack]] = {}

    async def get(self, **options: Any) -> Rig:
        """The one with these options."""
        key = repr(sorted(options.items()))
        if key not in self._running:
            stack = contextlib.AsyncExitStack()
            made = await stack.enter_async_context(rig(self._program, **options))
            self._running[key] = made, stack
        return self._running[key][0]

    async def drop(self, used: Rig) -> None:
        """It has failed."""
        for key, (made, stack) in list(self._running.items()):
            if made is used:
                del self._running[key]
                await stack.aclose()

    async def close(self) -> None:
        """All of them."""
        for made, _ in list(self._running.values()):
            await self.drop(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(guest_program: Path) -> AsyncIterator[Rigs]:
    """The rigs of a module."""
    made = Rigs(guest_program)
    try:
        yield made
    finally:
        await made.close()
