"""The control connection: heartbeats, what ends it, and that it says why."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from migrated.errors import (
    ConnectionLostError,
    LocalProtocolError,
    MigratedError,
    PeerError,
    RemoteProtocolError,
    TimeoutExceededError,
)
from migrated.link.control_link import INBOX_MESSAGES, ControlLink, StatePipe, tune
from migrated.protocol import framing
from migrated.protocol.messages import (
    Abort,
    Aborted,
    AnyMessage,
    BarrierAck,
    Hello,
    Ping,
    Pong,
    Ready,
    Round,
    StaleMap,
    StaleMapEnd,
    StateChunk,
    StateEnd,
    Switchover,
)
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role, State
from tests.unit.link.ends import HELLO, PATIENCE_SECONDS, READY, Stranger, link_on, sockets

INTERVAL_SECONDS, LIMIT_SECONDS = 0.05, 1.0
OFTEN = (INTERVAL_SECONDS, LIMIT_SECONDS)


@pytest.fixture
async def links() -> AsyncIterator[tuple[ControlLink, ControlLink]]:
    """Source and target, greeted."""
    left, right = sockets()
    source, target = await link_on(left), await link_on(right)
    source.start(Session(Role.SOURCE))
    target.start(Session(Role.TARGET))
    await source.send(HELLO)
    assert isinstance(await target.receive(), Hello)
    await target.send(READY)
    assert isinstance(await source.receive(), Ready)
    yield source, target
    await source.close()
    await target.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Stranger]]:
    left, right = sockets()
    yield left, Stranger(right)
    right.close()


@contextlib.asynccontextmanager
async def source_with(
    ends: tuple[socket.socket, Stranger], beat: tuple[float, float] = (5.0, 30.0)
) -> AsyncIterator[ControlLink]:
    """A source link that has said Hello to the stranger and was told Ready."""
    link = await link_on(ends[0], beat=beat)
    link.start(Session(Role.SOURCE))
    try:
        await link.send(HELLO)
        await ends[1].hear(Hello)
        await ends[1].say(READY)
        assert isinstance(await link.receive(), Ready)
        yield link
    finally:
        await link.close()


# ---------------------------------------------------------------- messages


async def test_messages_arrive_in_order(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    for number in range(100):
        await source.send(Round(number + 1, number))
    assert [await target.receive() for _ in range(100)] == [Round(number + 1, number) for number in range(100)]


async def test_bytes_read_before_the_link_was_made_count(ends: tuple[socket.socket, Stranger]) -> None:
    link = await link_on(ends[0], framing.encode(HELLO)[:-3])
    link.start(Session(Role.TARGET))
    await ends[1].say(framing.encode(HELLO)[-3:])
    assert await link.receive() == HELLO
    await link.close()


async def test_what_the_session_does_not_allow_is_not_sent(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    with pytest.raises(LocalProtocolError):
        await source.send(BarrierAck(1))
    await source.send(Round(1, 0))
    assert await target.receive() == Round(1, 0)


async def test_expect_names_what_did_not_come(links: tuple[ControlLink, ControlLink]) -> None:
    with pytest.raises(TimeoutExceededError, match=r"waited 0\.01 s for the barrier"):
        await links[0].expect(BarrierAck, limit_seconds=0.01, what="the barrier")


async def test_expect_names_what_came_instead(links: tuple[ControlLink, ControlLink]) -> None:
    await links[0].send(Round(1, 0))
    with pytest.raises(MigratedError, match=r"Round came .* while waiting for the end"):
        await links[1].expect(StateEnd, limit_seconds=PATIENCE_SECONDS, what="the end")


# ---------------------------------------------------------------- heartbeats


async def test_heartbeats_keep_a_silent_link_alive(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends, OFTEN) as link:
        for _ in range(30):  # longer than the limit, and nothing is said but this
            ping = await ends[1].hear(Ping)
            assert isinstance(ping, Ping)
            await ends[1].say(Pong(ping.sequence))
        assert link.lost is None


async def test_a_ping_is_answered_with_its_number(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends):
        await ends[1].say(Ping(77))
        assert await ends[1].hear(Pong) == Pong(77)


async def test_silence_ends_a_link(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends, OFTEN) as link:
        async with asyncio.timeout(PATIENCE_SECONDS):
            error = await asyncio.shield(link.ended)
        assert isinstance(error, ConnectionLostError)
        assert error.code == "peer-silent"
        assert "heartbeat_limit" in error.hint
        with pytest.raises(ConnectionLostError, match="nothing was heard"):
            await link.send(Round(1, 0))
        with pytest.raises(ConnectionLostError, match="nothing was heard"):
            await link.receive()


async def test_silence_ends_a_link_whose_peer_reads_nothing(ends: tuple[socket.socket, Stranger]) -> None:
    """A sender that waits for room must not keep the heartbeat from noticing."""
    async with source_with(ends, OFTEN) as link:
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(ConnectionLostError, match="nothing was heard"):
                await link.pipe.write(bytes(256 << 20))


async def test_a_flood_of_pings_is_not_hoarded(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends) as link:
        for start in range(0, 60_000, 10_000):
            await ends[1].say(*(Ping(start + number) for number in range(10_000)))
        await ends[1].say(BarrierAck(1))
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await link.receive() == BarrierAck(1)
        assert link._writer.transport.get_write_buffer_size() <= 1 << 17
        assert link.lost is None


# ---------------------------------------------------------------- the end


async def test_a_closed_connection_is_told_to_everybody_who_waits(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    waiting = [asyncio.ensure_future(source.receive()) for _ in range(2)]
    ended = asyncio.shield(source.ended)
    await target.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        results = await asyncio.gather(*waiting, return_exceptions=True)
        error = await ended
    assert all(isinstance(result, ConnectionLostError) for result in results)
    assert "closed the connection" in str(error)
    assert source.lost is source.broken is error


async def test_what_came_before_the_end_is_still_received(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    await source.send(Round(1, 5))
    await source.close()
    await asyncio.shield(target.ended)
    assert await target.receive() == Round(1, 5)
    with pytest.raises(ConnectionLostError):
        await target.receive()


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 64, b"\x00\x00\x00\x00", b"\x00\x00\x00\x05hello", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["too-long", "empty", "no-map", "http"],
)
async def test_garbage_ends_the_link_with_a_named_error(ends: tuple[socket.socket, Stranger], garbage: bytes) -> None:
    async with source_with(ends) as link:
        await ends[1].say(garbage)
        async with asyncio.timeout(PATIENCE_SECONDS):
            error = await asyncio.shield(link.ended)
        assert isinstance(error, RemoteProtocolError)
        assert error.code not in {"", "internal"}
        with pytest.raises(RemoteProtocolError):
            await link.receive()


async def test_a_message_out_of_turn_ends_the_link_after_those_in_turn(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends) as link:
        await ends[1].say(BarrierAck(3), Aborted(), BarrierAck(4))
        error = await asyncio.shield(link.ended)
        assert error.code == "unexpected-message"
        assert await link.receive() == BarrierAck(3)
        with pytest.raises(RemoteProtocolError, match="aborted"):
            await link.receive()


async def test_an_abort_is_told_once_and_can_still_be_answered(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    await source.send(Abort("not-converging", "it writes too fast", "use hybrid"))
    abort = await target.receive()
    assert isinstance(abort, Abort)
    error = await asyncio.shield(target.ended)
    assert isinstance(error, PeerError)
    assert (error.code, error.hint) == ("not-converging", "use hybrid")
    with pytest.raises(PeerError, match="writes too fast"):
        await target.receive()
    assert target.broken is None
    await target.send(Aborted())
    assert await source.receive(after_abort=True) == Aborted()
    assert source.session.state is State.ABORTED


async def test_expect_raises_the_reason_of_an_abort(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    await target.send(Abort("no-huge-pages", "the pool is empty", "sysctl …"))
    with pytest.raises(PeerError, match="the pool is empty") as caught:
        await source.expect(BarrierAck, limit_seconds=PATIENCE_SECONDS, what="the barrier")
    assert (caught.value.code, caught.value.hint) == ("no-huge-pages", "sysctl …")


async def test_closing_twice_and_while_the_peer_is_gone_is_fine(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends) as link:
        ends[1].sock.close()
        await link.close()
        await link.close()
        assert link.broken is not None


async def test_a_cancelled_receive_loses_no_message(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    waiting = asyncio.ensure_future(target.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    await source.send(Round(1, 0))
    assert await target.receive() == Round(1, 0)


async def test_a_lost_page_connection_is_explained_by_the_abort_behind_it(
    links: tuple[ControlLink, ControlLink],
) -> None:
    source, target = links
    lost = ConnectionLostError("stream 0 was closed")
    explaining = asyncio.ensure_future(source.reason_for(lost))
    await target.send(Abort("aborted", "on request"))
    error = await explaining
    assert isinstance(error, PeerError)
    assert error.code == "aborted"
    assert await source.reason_for(lost) is error
    other = MigratedError("a reason of our own")
    assert await source.reason_for(other) is other


async def test_a_lost_page_connection_without_a_word_is_just_that(links: tuple[ControlLink, ControlLink]) -> None:
    lost = ConnectionLostError("stream 0 was closed")
    assert await links[0].reason_for(lost) is lost


# ---------------------------------------------------------------- guest state


@pytest.fixture
def pipes(links: tuple[ControlLink, ControlLink]) -> tuple[StatePipe, StatePipe]:
    return links[0].pipe, links[1].pipe


async def read_all(pipe: StatePipe) -> bytes:
    data = bytearray()
    while piece := await pipe.read():
        data += piece
    return bytes(data)


async def test_guest_state_travels_both_ways_at_once(pipes: tuple[StatePipe, StatePipe]) -> None:
    there = bytes(range(256)) * 40_000  # many pieces, and more than the kernel buffers
    back = b"and back" * 1000

    async def write(pipe: StatePipe, data: bytes) -> None:
        await pipe.write(data)
        await pipe.close_write()

    async with asyncio.timeout(PATIENCE_SECONDS):
        _, _, received, returned = await asyncio.gather(
            write(pipes[0], there), write(pipes[1], back), read_all(pipes[1]), read_all(pipes[0])
        )
    assert received == there
    assert returned == back
    assert await pipes[1].read() == b""  # the end stays the end


async def test_a_slow_reader_holds_the_writer_back_and_no_heartbeat_blames_it() -> None:
    left, right = sockets()
    source, target = await link_on(left, beat=OFTEN), await link_on(right, beat=OFTEN)
    source.start(Session(Role.SOURCE))
    target.start(Session(Role.TARGET))
    await source.send(HELLO)
    await target.receive()
    await target.send(READY)
    await source.receive()
    written = 0

    async def write() -> None:
        nonlocal written
        for _ in range(90):
            await source.pipe.write(bytes(1 << 18))
            written += 1
        await source.pipe.close_write()

    writing = asyncio.ensure_future(write())
    loop = asyncio.get_running_loop()
    # Long past the limit of silence, nobody reads: every beat of both sides has had its turn many times.
    deadline = loop.time() + 2 * LIMIT_SECONDS
    while loop.time() < deadline:
        assert source.lost is None
        assert target.lost is None
        await asyncio.sleep(INTERVAL_SECONDS)
    assert not writing.done()
    assert written < 90
    async with asyncio.timeout(PATIENCE_SECONDS):
        received = await read_all(target.pipe)
        await writing
    assert len(received) == 90 << 18
    await source.close()
    await target.close()


async def test_state_waits_no_longer_than_its_connection_lives(
    links: tuple[ControlLink, ControlLink], pipes: tuple[StatePipe, StatePipe]
) -> None:
    reading = asyncio.ensure_future(pipes[1].read())
    await links[0].close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(ConnectionLostError):
            await reading
    with pytest.raises(ConnectionLostError):
        await pipes[0].write(b"x")


async def test_state_that_has_arrived_survives_its_connection(
    links: tuple[ControlLink, ControlLink], pipes: tuple[StatePipe, StatePipe]
) -> None:
    await pipes[0].write(b"device state")
    await pipes[0].close_write()
    await links[0].close()
    await asyncio.shield(links[1].ended)
    assert await read_all(pipes[1]) == b"device state"


async def test_a_link_that_was_not_started_says_so(ends: tuple[socket.socket, Stranger]) -> None:
    link = await link_on(ends[0])
    for call in (link.send(HELLO), link.pipe.write(b"x"), link.pipe.close_write()):
        with pytest.raises(ConnectionLostError, match="nobody has begun"):
            await call
    await link.close()


async def test_a_step_that_was_made_is_no_error_whatever_the_transport_says(
    links: tuple[ControlLink, ControlLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who posts COMMIT must know: an exception means that it was not sent."""
    source, _ = links

    def closed(_: bytes) -> None:
        raise RuntimeError("the transport is closed")

    monkeypatch.setattr(source._writer, "write", closed)
    source.post(Round(1, 0))
    assert isinstance(source.lost, ConnectionLostError)
    with pytest.raises(ConnectionLostError, match="the transport is closed"):
        source.post(Round(2, 0))


async def test_a_closed_link_leaves_its_session_lost(links: tuple[ControlLink, ControlLink]) -> None:
    source, _ = links
    await source.close()
    assert source.session.state is State.ABORTED
    assert not source.session.connected


async def test_a_stranger_cannot_send_state_after_its_end(ends: tuple[socket.socket, Stranger]) -> None:
    async with source_with(ends) as link:
        messages: list[AnyMessage] = [StateChunk(b"one"), StateEnd(), StateChunk(b"two")]
        await ends[1].say(*messages)
        error = await asyncio.shield(link.ended)
        assert isinstance(error, RemoteProtocolError)
        assert await read_all(link.pipe) == b"one"


async def test_messages_that_are_sent_together_leave_in_one_piece(
    links: tuple[ControlLink, ControlLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = links
    written: list[bytes] = []
    write = source._writer.write

    def counted(data: bytes) -> None:
        written.append(data)
        write(data)

    monkeypatch.setattr(source._writer, "write", counted)
    sent: list[AnyMessage] = [Switchover(1), StaleMap(0, 0, b"\1"), StaleMapEnd()]
    await source.send(*sent)
    assert [await target.receive() for _ in sent] == sent
    assert len(written) == 1


# ---------------------------------------------------------------- sockets


def test_a_tcp_connection_notices_a_dead_peer_in_time() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as connection:
            tune(connection, silence_seconds=9)
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 9000
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            pause = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            count = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert idle + pause * count <= 9


def test_other_sockets_are_left_alone() -> None:
    left, right = socket.socketpair()
    with left, right:
        before = [left.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_KEEPALIVE, socket.SO_SNDTIMEO)]
        tune(left, silence_seconds=9)
        after = [left.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_KEEPALIVE, socket.SO_SNDTIMEO)]
        assert after == before
        left.send(b"it still works")
        assert right.recv(100) == b"it still works"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1:{}"), ("::1", "[::1]:{}")])
async def test_the_peer_is_named_as_an_address_one_can_dial(host: str, shown: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError as error:
            pytest.skip(f"{host}: {error.strerror}")
        listener.listen()
        port = listener.getsockname()[1]
        link = await link_on(socket.create_connection((host, port)))
        assert link.peer == shown.format(port)
        await link.close()


async def test_a_flood_of_messages_fills_no_memory(links: tuple[ControlLink, ControlLink]) -> None:
    source, target = links
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 100_000:
            async with asyncio.timeout(0.5):
                await target.send(BarrierAck(sent))  # allowed, and nobody has asked
            sent += 1
    assert sent < 100_000, "the sender is stopped"
    assert source._inbox.full()
    for number in range(INBOX_MESSAGES + 1):
        assert await source.receive() == BarrierAck(number)
    assert source.lost is None
