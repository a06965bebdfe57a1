"""`migrated.client` against both agents, and the program that docs/client.md shows."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys

import pytest

from migrated.client import Client, RemoteError, SetRequest, StartRequest, State, parse_address, parse_rate
from migrated.waiting import within
from tests.integration.place import CRAWL, PATIENCE_SECONDS, ROOT, Guest, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAM = ROOT / "tests" / "integration" / "move_guest.py"
PAGE = ROOT / "docs" / "client.md"


async def run(*arguments: str) -> tuple[int | None, str, str]:
    """Run the program of the documentation: how it ended and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(PROGRAM), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with within(PATIENCE_SECONDS, "the program to end"):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode(), err.decode()


async def test_the_page_shows_this_program() -> None:
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert shown == [PROGRAM.read_text().partition("\n")[2]]  # without the line for our linter


async def test_the_program_of_the_page_migrates_a_guest(here: Place, guest: Guest) -> None:
    code, out, err = await run(str(here.source.state_dir), guest.name, here.address)
    assert (code, err) == (0, ""), out
    assert out.splitlines()[-1].startswith("completed: ")
    await guest.arrived()


async def test_the_program_of_the_page_says_what_is_wrong(here: Place) -> None:
    code, out, err = await run(str(here.source.state_dir), "nobody-s", here.address)
    assert (code, out) == (1, "")
    assert "[unknown-guest]" in err
    assert "Traceback" not in err
    code, out, err = await run(str(here.directory / "nowhere"), "g0", here.address)
    assert (code, out) == (1, "")
    assert "[no-agent]" in err


async def test_a_program_follows_a_migration_on_both_sides(here: Place, guest: Guest) -> None:
    async with Client(here.source.state_dir) as source, Client(here.target.socket) as target:
        assert ((await source.about()).role, (await target.about()).role) == ("source", "target")
        assert [one.name for one in (await source.guests()).guests if one.migratable] == [guest.name]
        request = StartRequest(guest=guest.name, to=parse_address(here.address), max_bandwidth=parse_rate(CRAWL))
        migration = await source.start(request)
        limit = within(PATIENCE_SECONDS, "pages to be on their way")
        async with limit, contextlib.aclosing(source.events(migration)) as records:
            async for record in records:
                if record.state is State.PRECOPY and record.transferred_bytes > 0:
                    break
        with pytest.raises(RemoteError) as caught:
            await source.start(request)
        assert caught.value.status == 409
        page_map = await source.page_map(migration)
        assert page_map is None or page_map.cell_bytes > 0
        await source.set(migration, SetRequest(max_bandwidth=0))
        async with within(PATIENCE_SECONDS, "its end on both sides"):
            ended, other = await asyncio.gather(source.wait(migration), target.wait(migration))
        assert (ended.state, other.state) == (State.COMPLETED, State.COMPLETED), (ended.error, other.error)
        assert ended.id == other.id == migration.id
        assert (await source.series(migration)).at
        assert any(line.level for line in await source.log(migration))
        assert migration.id in [record.id for record in await target.migrations()]
    await guest.arrived()


async def test_a_program_aborts_a_migration(here: Place, guest: Guest) -> None:
    async with Client(here.source.state_dir) as source:
        request = StartRequest(guest=guest.name, to=parse_address(here.address), max_bandwidth=parse_rate(CRAWL))
        migration = await source.start(request)
        await source.abort(migration)
        async with within(PATIENCE_SECONDS, "its end"):
            ended = await source.wait(guest.name)
    assert (ended.state, ended.id) == (State.ABORTED, migration.id)
    assert ended.error is not None
    assert ended.error.code == "aborted"
    await guest.assert_sound()
