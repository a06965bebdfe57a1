"""A guest that turns on its host as soon as it runs there: the agent lives on, and the guest beside it loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from migrated.errors import TimeoutExceededError
from migrated.guests.process.client import ENVIRONMENT
from migrated.waiting import within
from tests.faults.rig import descriptors, guest_mappings
from tests.integration import place as places
from tests.integration.place import PATIENCE_SECONDS, ROOT, Guest, Place

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

HOSTILE = "idle"  # the name of its table
WORDS = ("unmap", "remap", "fork", "punch", "discard", "truncate", "steal", "unregister", "talk", "exit")
SIZE_MIB = 16


class HostilePlace(Place):
    """One of the arriving guests is the hostile one."""

    def command(self, name: str, console: Path) -> list[str]:
        if name != HOSTILE:
            return super().command(name, console)
        # What it is to do is decided when it starts.
        script = f'exec {self.directory}/hostile {SIZE_MIB} "$(cat {self.directory}/word)" {self.directory}/mark "$0"'
        return ["/bin/sh", "-c", script, str(console)]


@pytest.fixture(scope="module")
def hostile_program(program: Path) -> Path:
    """The hostile guest, compiled."""
    built = program.with_name("hostile_guest")
    source = ROOT / "tests/integration/hostile_guest.c"
    command = ["cc", "-std=gnu11", "-O2", "-pthread", f"-I{ROOT / 'native/include'}", "-o", str(built), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return built


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agents(program: Path, hostile_program: Path) -> AsyncIterator[Place]:
    """Both agents, for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "Place", HostilePlace)
        async with places.place(program, timeouts={"guest_command": 2.0, "release": 2.0, "shutdown": 3.0}) as here:
            (here.directory / "hostile").symlink_to(hostile_program)
            yield here


async def marked(here: Place, name: str) -> None:
    """Until the hostile guest has made this file."""
    async with within(PATIENCE_SECONDS, name):
        while not os.path.lexists(here.directory / name):  # noqa: ASYNC110, ASYNC240 - another process makes it
            await asyncio.sleep(0.01)


async def hostile_guest(here: Place, word: str) -> asyncio.subprocess.Process:
    """A guest of the source that is going to do this on the target."""
    for path in here.directory.glob("mark*"):
        path.unlink()
    (here.directory / "word").write_text(word)
    process = await asyncio.create_subprocess_exec(
        *here.command(HOSTILE, here.directory / "unused.tty"),
        env={**os.environ, ENVIRONMENT: str(here.socket(HOSTILE))},
        start_new_session=True,
    )
    await marked(here, "mark")
    return process


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)


async def nothing_left(here: Place, before: Counter[str]) -> None:
    """Until the target agent holds no more than before."""
    more: Counter[str] = Counter()
    try:
        async with within(PATIENCE_SECONDS, "the target agent to release what belonged to the guests"):
            # The kernel is asked.
            while (more := descriptors(here.target.pid) - before) or guest_mappings(here.target.pid):  # noqa: ASYNC110 - /proc tells nobody
                await asyncio.sleep(0.02)
    except TimeoutExceededError as error:
        raise AssertionError(f"{dict(more)} {guest_mappings(here.target.pid)}") from error


async def arrives(here: Place, guest: Guest) -> None:
    """Its last page is there, and every byte is what it wrote."""
    await guest.arrived()
    assert await guest.ended() == 0


@pytest.mark.parametrize("word", WORDS)
async def test_a_hostile_guest_harms_neither_the_agent_nor_another_guest(here: Place, word: str) -> None:
    agent = here.target.pid
    before = descriptors(agent)
    guest = await here.guest("g0")
    source_side = await hostile_guest(here, word)
    try:
        # Both run on the target with most of their memory still at the source.
        slow = {"mode": "postcopy", "drain_bandwidth": "500KB"}
        hostile, other = await here.start(HOSTILE, **slow), await here.start("g0", **slow)
        await here.until(other, lambda record: record["state"] == "postcopy")
        await marked(here, "mark.on")
        await guest.console.attach(here.arrival("g0"), PATIENCE_SECONDS)
        first = await guest.console.stats(PATIENCE_SECONDS)
        # The guest beside it goes on, faults included: a sweep touches each of its pages.
        swept = await guest.console.sweep(PATIENCE_SECONDS)
        assert (swept.wrong, swept.errors) == (0, 0)
        assert (await guest.console.stats(PATIENCE_SECONDS)).seconds >= first.seconds
        assert (await here.over(other))["state"] == "completed"
        await arrives(here, guest)
    finally:
        kill([*here.left_of(HOSTILE)])
        kill([source_side.pid])
        await source_side.wait()
    record = await here.over(hostile, "target")
    assert record["state"] in ("failed", "completed"), record
    await here.over(hostile)
    assert here.target.pid == agent
    await here.without_guests()
    kill(here.left_of("g0"))
    await nothing_left(here, before)
