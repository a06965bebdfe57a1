"""Where a co-operative guest connects: one at a time, and one that has ended is not in the way of the next."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from migrated.errors import GuestError
from migrated.guests.process import connection as process
from migrated.guests.process import source as process_source
from migrated.guests.process.config import ProcessSourceConfig
from migrated.guests.process.connection import GuestConnection
from migrated.guests.process.source import ConnectedGuest, ProcessHub
from migrated.guests.process.wire import HEADER, Header, Hello, HelloRegion, Kind, message
from migrated.settings import Timeouts, read

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

    async def map_memory(self, *_: Any, **__: Any) -> tuple[int, ...]:
        self.mapped.set()
        return (0,)

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        assert kind is Kind.REFUSE
        self.refused = payload.decode()

    def close(self) -> None:
        pass


def hub(tmp_path: Path, former: Former) -> ProcessHub:
    made = ProcessHub("vm1", table(tmp_path / "vm1.sock"), Timeouts())
    made.guest = ConnectedGuest(cast("GuestConnection", former), (), (), (), direct_io=False)
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
    assert "already connected" in arriving.refused
    assert not arriving.mapped.is_set()
    assert place.guest is not None


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


# ---------------------------------------------------------------- the socket


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="mg") as name:
        yield Path(name)


def table(path: Path) -> ProcessSourceConfig:
    return read(ProcessSourceConfig, {"driver": "process", "socket": str(path), "page_size": "4K"}, "p")


def hello_of(path: Path) -> socket.socket:
    """A guest that connects and says HELLO; it maps nothing."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    hello = Hello(0, (HelloRegion("ram", 4096),)).encode()
    sock.sendall(message(Kind.HELLO, hello))
    return sock


async def answered(sock: socket.socket) -> Kind:
    """The kind of the first message the agent sends to it."""
    sock.setblocking(False)
    async with asyncio.timeout(PATIENCE_SECONDS):
        data = b""
        while len(data) < HEADER.size:
            piece = await asyncio.get_running_loop().sock_recv(sock, HEADER.size - len(data))
            assert piece, "the agent closed the connection"
            data += piece
    return Header.parse(data).kind


async def test_a_file_in_place_of_the_socket_is_left_alone(short: Path) -> None:
    image = short / "vm.img"
    image.write_bytes(b"a disk")
    with pytest.raises(GuestError, match="not a socket") as caught:
        process.listen(str(image))
    assert caught.value.code == "guest-socket"
    assert image.read_bytes() == b"a disk"


async def test_a_dead_socket_is_replaced_and_one_that_is_listened_to_is_not(short: Path) -> None:
    path = short / "p.sock"
    process.listen(str(path)).close()
    with process.listen(str(path)), pytest.raises(GuestError) as caught:
        process.listen(str(path))
    assert caught.value.code == "socket-in-use"


async def test_a_socket_whose_backlog_is_full_is_in_use(short: Path) -> None:
    path = str(short / "p.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, contextlib.ExitStack() as stack:
        other.bind(path)
        other.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            with contextlib.suppress(BlockingIOError):
                waiting.connect(path)
        with pytest.raises(GuestError) as caught:
            process.listen(path)
        assert caught.value.code == "socket-in-use"


async def test_a_guest_whose_socket_cannot_be_made_does_not_stop_the_agent(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its migrations are refused with the reason; the socket is there as soon as it can be."""
    monkeypatch.setattr(process_source, "LISTEN_AGAIN_SECONDS", 0.01)
    directory = short / "later"
    async with process_source.ProcessHub("p", table(directory / "p.sock"), Timeouts()) as place:
        with pytest.raises(GuestError, match="No such file or directory") as caught:
            place.require()
        assert caught.value.code == "guest-not-connected"
        directory.mkdir()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (directory / "p.sock").exists():  # noqa: ASYNC110 - it is our own loop that makes it
                await asyncio.sleep(0.01)
        with hello_of(directory / "p.sock") as sock:
            assert await answered(sock) is Kind.MEMORY
    assert not (directory / "p.sock").exists()


async def test_the_socket_of_another_agent_stays_there(short: Path) -> None:
    path = short / "p.sock"
    with process.listen(str(path)):
        async with process_source.ProcessHub("p", table(path), Timeouts()):
            pass
        assert path.is_socket()


async def test_a_guest_connects_after_accept_has_failed(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors for a moment."""
    accept = socket.socket.accept
    failed: list[int] = []

    def scarce(sock: socket.socket) -> Any:
        if not failed:
            failed.append(errno.EMFILE)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    async with process_source.ProcessHub("p", table(short / "p.sock"), Timeouts()):
        with hello_of(short / "p.sock") as sock:
            assert await answered(sock) is Kind.MEMORY
    assert failed == [errno.EMFILE]


async def test_of_two_guests_that_connect_at_once_one_is_refused(short: Path) -> None:
    async with process_source.ProcessHub("p", table(short / "p.sock"), Timeouts()):
        with hello_of(short / "p.sock") as one, hello_of(short / "p.sock") as other:
            first = asyncio.ensure_future(answered(one))
            second = asyncio.ensure_future(answered(other))
            await asyncio.wait({first, second}, timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            given, sock, waiting = (first, one, second) if first.done() else (second, other, first)
            assert given.result() is Kind.MEMORY
            sock.setblocking(True)
            sock.sendall(message(Kind.REPLY, bytes(8), sequence=1))
            assert await waiting is Kind.REFUSE


async def test_connections_that_say_nothing_are_few(short: Path) -> None:
    async with process_source.ProcessHub("p", table(short / "p.sock"), Timeouts()) as place:
        with contextlib.ExitStack() as stack:
            idle = []
            for _ in range(3 * process_source.MAX_CONNECTIONS):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asyncio.get_running_loop().sock_connect(sock, str(short / "p.sock"))
                idle.append(sock)
            async with asyncio.timeout(PATIENCE_SECONDS):  # the last one is over the limit: it is closed at once
                assert await asyncio.get_running_loop().sock_recv(idle[-1], 1) == b""
            assert len(place._tasks) <= process_source.MAX_CONNECTIONS + 1


# ---------------------------------------------------------------- descriptors


@contextlib.contextmanager
def connected() -> Iterator[tuple[GuestConnection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = GuestConnection("vm1", ours)
    with theirs:
        yield connection, theirs
        connection.close()


@contextlib.contextmanager
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


async def test_descriptors_that_no_message_announced_end_the_connection(no_descriptor_left: None) -> None:
    with connected() as (connection, guest), null() as fd:
        reply = message(Kind.REPLY, sequence=9)
        for _ in range(3):
            socket.send_fds(guest, [reply], [fd] * 8)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert "descriptors" in await connection.closed


async def test_descriptors_of_half_a_header_are_counted_too(no_descriptor_left: None) -> None:
    with connected() as (connection, guest), null() as fd:
        half = message(Kind.REPLY, sequence=9, descriptors=64)[:1]
        for _ in range(3):
            socket.send_fds(guest, [half], [fd] * 60)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert "descriptors" in await connection.closed


async def test_descriptors_of_a_reply_that_meets_a_cancellation_are_closed(no_descriptor_left: None) -> None:
    with connected() as (connection, guest), null() as fd:
        asking = asyncio.ensure_future(connection.request(Kind.UFFD, limit_seconds=PATIENCE_SECONDS, what="it"))
        guest.setblocking(False)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.get_running_loop().sock_recv(guest, HEADER.size)
        socket.send_fds(guest, [message(Kind.REPLY, sequence=1, descriptors=1)], [fd])
        connection._readable()  # the reply is here, and nobody has taken it yet
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
