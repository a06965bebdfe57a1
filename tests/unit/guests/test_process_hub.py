"""Where a co-operative guest connects: one at a time, and one that has ended is not in the way of the next."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, cast

from migrated.config import Timeouts
from migrated.guests.process import GuestConnection
from migrated.guests.process_source import ProcessHub, Resident
from migrated.guests.process_wire import Hello, HelloRegion, Kind

PATIENCE_SECONDS = 10.0


class Former:
    """The connection of the guest before; its end is read a little later than the next one's HELLO."""

    def __init__(self, *, hung_up: bool) -> None:
        self.hung_up = hung_up
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if hung_up:
            asyncio.get_running_loop().call_later(0.05, self.closed.set_result, "it closed the connection")


class Arriving:
    """The connection of the next one."""

    pid = 4711

    def __init__(self) -> None:
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.mapped = asyncio.Event()
        self.refused = ""

    async def hello(self, _: float) -> tuple[Hello, tuple[int, ...]]:
        return Hello(0, (HelloRegion("ram", 4096),)), ()

    async def request(self, *_: Any, **__: Any) -> tuple[bytes, tuple[int, ...]]:
        self.mapped.set()
        return bytes(8), ()

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        assert kind is Kind.REFUSE
        self.refused = payload.decode()

    def close(self) -> None:
        pass


def hub(tmp_path: Path, former: Former) -> ProcessHub:
    table = {"driver": "process", "socket": str(tmp_path / "vm1.sock"), "page_size": "4K"}
    made = ProcessHub("vm1", table, tmp_path, Timeouts())
    made.resident = Resident(cast("GuestConnection", former), (), (), (), direct_io=False)
    return made


async def served(place: ProcessHub, arriving: Arriving) -> None:
    """Until it has ended again, or was refused."""
    serving = asyncio.ensure_future(place._serve(cast("GuestConnection", arriving)))
    mapped = asyncio.ensure_future(arriving.mapped.wait())
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.wait({serving, mapped}, return_when=asyncio.FIRST_COMPLETED)
        mapped.cancel()
        arriving.closed.set_result("the test is over")
        await serving


async def test_a_guest_that_has_ended_is_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    former, arriving = Former(hung_up=True), Arriving()
    await served(hub(tmp_path, former), arriving)
    assert arriving.refused == ""
    assert arriving.mapped.is_set()
    assert former.closed.done()


async def test_a_guest_that_is_there_is(tmp_path: Path) -> None:
    former, arriving = Former(hung_up=False), Arriving()
    place = hub(tmp_path, former)
    await served(place, arriving)
    assert "connected already" in arriving.refused
    assert not arriving.mapped.is_set()
    assert place.resident is not None


async def test_a_guest_that_hung_up_is_known_before_its_last_words_are_read() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = GuestConnection("vm1", ours)
    try:
        seen = [connection.hung_up]
        theirs.send(b"x")
        seen.append(connection.hung_up)
        theirs.close()
        seen.append(connection.hung_up)
        assert seen == [False, False, True]
        assert connection.alive
        async with asyncio.timeout(PATIENCE_SECONDS):
            await connection.closed
        assert connection.hung_up
        assert connection.pid == os.getpid()
    finally:
        theirs.close()
        connection.close()
