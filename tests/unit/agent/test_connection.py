"""A migration's connection and its successors: only the end of the one in use is a failure."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from migrated.agent.connection import Connection
from migrated.agent.migration import Migration
from migrated.agent.record import Record
from migrated.errors import ConnectionLostError, RemoteProtocolError
from migrated.link.control_link import ControlLink
from migrated.memory.engine import SourceEngine
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.target.connection import SourceConnection
from tests.unit.link.ends import PATIENCE_SECONDS, link_on, sockets


@pytest.fixture
def migration() -> Migration:
    return Migration(Record(id="0123456789ab", guest="vm1", role="source", mode="hybrid"))


@pytest.fixture
def connection(migration: Migration) -> Connection[SourceEngine]:
    return Connection(migration, Session(Role.SOURCE))


async def begun(connection: Connection[SourceEngine]) -> tuple[ControlLink, socket.socket]:
    ours, theirs = sockets()
    link = await link_on(ours, Role.SOURCE)
    connection.begin(link)
    return link, theirs


async def test_its_end_is_a_failure_of_the_migration(
    migration: Migration, connection: Connection[SourceEngine]
) -> None:
    _, theirs = await begun(connection)
    theirs.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert isinstance(await migration.failure.wait(), ConnectionLostError)
    await connection.disconnect()


async def test_the_end_of_one_that_was_replaced_is_none(
    migration: Migration, connection: Connection[SourceEngine]
) -> None:
    before, theirs_before = await begun(connection)
    watching = set(migration._background)
    now, theirs_now = await begun(connection)
    theirs_before.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.wait(watching)
    assert before.lost is not None
    assert connection.link is now
    assert not migration.failure.is_set
    for end in (before, now):
        await end.close()
    theirs_now.close()


async def test_disconnected_it_can_be_disconnected_again(connection: Connection[SourceEngine]) -> None:
    await connection.disconnect()
    with pytest.raises(ConnectionLostError):
        connection.require_link()
    _, theirs = await begun(connection)
    await connection.disconnect()
    await connection.disconnect()
    assert not connection.session.connected
    theirs.close()


async def test_a_page_connection_that_was_not_agreed_on_is_closed(migration: Migration) -> None:
    connection = SourceConnection(migration, Session(Role.TARGET), None, bulk_streams=2)
    connection.streams_wanted.set()
    ours, theirs = sockets()
    with pytest.raises(RemoteProtocolError, match="2 of 2"):
        await connection.add_stream(2, ours.detach())
    theirs.setblocking(True)
    assert theirs.recv(1) == b""
    theirs.close()


async def test_a_page_connection_without_memory_to_fill_is_closed(
    migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrated.target.connection.STREAM_WAIT_SECONDS", 0.01)
    connection = SourceConnection(migration, Session(Role.TARGET), None, bulk_streams=2)
    ours, theirs = sockets()
    fd = ours.detach()
    with pytest.raises(Exception, match="memory for a page connection"):
        await connection.add_stream(0, fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    theirs.close()
