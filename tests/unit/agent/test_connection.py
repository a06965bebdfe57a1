"""A connection of a migration: what ends it, and what ends with it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from migrated.agent.connection import Connection
from migrated.agent.migration import Migration
from migrated.agent.record import Record
from migrated.config import HooksSection
from migrated.errors import ConnectionLostError, MigratedError
from migrated.link.control_link import ControlLink
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from tests.unit.link.ends import PATIENCE_SECONDS, link_on, sockets


class FakeEngine:
    """Notes what is done with its page connections."""

    alive = True

    def __init__(self) -> None:
        self.steps: list[str] = []

    def drop_streams(self) -> None:
        self.steps.append("dropped")

    def flush(self) -> None:
        self.steps.append("flushed")


@pytest.fixture
def migration() -> Migration:
    made = Migration(Record(id="0123456789ab", guest="vm1", role="source", mode="hybrid"), HooksSection())
    made.engine = cast("Any", FakeEngine())
    return made


async def begun(migration: Migration) -> tuple[Connection, ControlLink, socket.socket]:
    ours, theirs = sockets()
    link = await link_on(ours)
    link.start(Session(Role.SOURCE))
    return Connection(migration, link), link, theirs


async def wait_in(connection: Connection) -> None:
    async with connection, connection.alive:
        await asyncio.Event().wait()


async def test_the_end_of_its_link_ends_what_is_done_over_it(migration: Migration) -> None:
    connection, link, theirs = await begun(migration)
    theirs.close()
    with pytest.raises(ConnectionLostError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await wait_in(connection)
    assert not link.session.connected
    assert cast("Any", migration.engine).steps == ["dropped", "flushed"]


async def test_the_end_of_one_is_nothing_to_its_successor(migration: Migration) -> None:
    before, _, theirs_before = await begun(migration)
    async with before:
        pass
    now, link, theirs_now = await begun(migration)
    migration.connection = now
    theirs_before.close()
    before.alive.fail(MigratedError("a page connection of that one ended"))
    async with now, now.alive:
        await asyncio.sleep(0)
    assert now.alive.failure is None
    assert isinstance(link.lost, ConnectionLostError)  # by us, when it was closed
    theirs_now.close()


async def test_when_it_has_failed_it_may_still_carry_last_words(migration: Migration) -> None:
    connection, _, theirs = await begun(migration)
    migration.connection = connection
    migration.fail(MigratedError("enough"))
    async with connection:
        with pytest.raises(MigratedError, match="enough"):
            async with connection.alive:
                await asyncio.Event().wait()
        speaking = connection.speaking
    assert speaking
    assert not connection.speaking
    theirs.close()


async def test_closed_it_can_be_closed_again(migration: Migration) -> None:
    connection, link, theirs = await begun(migration)
    await connection.close()
    await connection.close()
    assert not link.session.connected
    theirs.close()


async def test_one_that_was_never_dialled_says_so(migration: Migration) -> None:
    connection = Connection(migration)
    assert not connection.speaking
    with pytest.raises(ConnectionLostError):
        _ = connection.link
    reason = MigratedError("the target cannot be reached")
    assert await connection.reason_for(reason) is reason
    await connection.close()
