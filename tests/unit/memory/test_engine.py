"""The two engines as Python sees them, joined by socket pairs in this process; there is no guest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from migrated.agent import figures
from migrated.agent.rates import Rates
from migrated.agent.record import Record, State
from migrated.errors import ConnectionLostError, MigratedError, RemoteProtocolError
from migrated.memory import engine as engine_module
from migrated.memory import probe
from migrated.memory.channel import Channel
from migrated.memory.engine import (
    URGENT,
    Event,
    EventKind,
    Histogram,
    SourceEngine,
    TargetEngine,
    ledger_bytes,
)
from migrated.memory.native import lib
from migrated.memory.regions import Region, SourceMemory, TargetMemory
from tests.rig.authority import Authority

PAGE = 4096
SECRET = hashlib.shake_256(b"any key").digest(lib.MGD_SECRET_BYTES)
PATIENCE_SECONDS = 30.0

pytestmark = pytest.mark.usefixtures("no_descriptor_left")


def content(page: int) -> bytes:
    """Of a page that was filled."""
    return (page + 1).to_bytes(8, "little") * 512


def test_a_key_of_another_length_is_refused_before_c_reads_it() -> None:
    memory = SourceMemory(pid=0, regions=(), mappings=(), memory_fds=(), file_offsets=(), private=())
    with pytest.raises(ValueError, match="4103 bytes, not 4104"):
        SourceEngine(memory, (), 1, SECRET[:-1])
    with pytest.raises(ValueError, match="4103 bytes, not 4104"):
        TargetEngine((), 1, -1, SECRET[:-1])


class Told:
    """What an engine told the loop."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    async def wait(self, kind: EventKind) -> Event:
        """The first of this kind."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                for event in self.events:
                    if event.kind is kind:
                        return event
                self._changed.clear()
                await self._changed.wait()


class Both:
    """Source and target of memory of these sizes in bytes; ``pages``: of the target's regions, otherwise of 4 KiB."""

    def __init__(self, sizes: Sequence[int], streams: int = 2, pages: Sequence[int] = ()) -> None:
        self.sizes = sizes
        self.streams = streams
        host_pages = pages or [PAGE] * len(sizes)
        regions = tuple(
            Region(f"ram{index}", size, page) for index, (size, page) in enumerate(zip(sizes, host_pages, strict=True))
        )
        self.source_fds = tuple(self._memfd(size) for size in sizes)
        self.target_fds = tuple(self._memfd(size) for size in sizes)
        memory = SourceMemory(os.getpid(), regions, (), self.source_fds, (0,) * len(sizes))
        self.target_memory = tuple(TargetMemory(r, fd) for r, fd in zip(regions, self.target_fds, strict=True))
        self.ledger_fd = self._memfd(ledger_bytes(self.target_memory))
        self.source = SourceEngine(memory, host_pages, streams, SECRET)
        self.target = TargetEngine(self.target_memory, streams, self.ledger_fd, SECRET)

    @staticmethod
    def _memfd(size: int) -> int:
        fd = os.memfd_create("engine-test")
        os.ftruncate(fd, size)
        return fd

    def connect(self) -> None:
        for stream in (*range(self.streams), URGENT):
            left, right = socket.socketpair()
            self.source.add_stream(stream, left.detach())
            self.target.add_stream(stream, right.detach())

    def fill(self, region: int, *pages: int) -> None:
        for page in pages:
            os.pwrite(self.source_fds[region], content(page), page * PAGE)

    def page(self, region: int, page: int) -> bytes:
        return os.pread(self.target_fds[region], PAGE, page * PAGE)

    def hand_over(self) -> None:
        """Everything is stale: as after a crash of the source's agent."""
        self.source.freeze_whole()
        for region, first, bits in self.source.stale_maps():
            self.target.stale_map(region, first, bits)
        self.target.switchover()

    def close(self) -> None:
        for engine in (self.source, self.target):
            engine.unwatch()
            engine.destroy()
        for fd in (*self.source_fds, *self.target_fds, self.ledger_fd):
            os.close(fd)


@pytest.fixture
def make() -> Iterator[Callable[..., Both]]:
    made: list[Both] = []

    def both(*sizes: int, streams: int = 2, pages: Sequence[int] = ()) -> Both:
        made.append(Both(sizes, streams, pages))
        return made[-1]

    yield both
    for one in made:
        one.close()


def set_bits(pieces: Sequence[tuple[int, int, bytes]]) -> set[tuple[int, int]]:
    """(region, page) of every bit."""
    return {
        (region, first + 8 * index + bit)
        for region, first, bits in pieces
        for index, byte in enumerate(bits)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    }


async def test_pages_go_over_and_both_sides_tell_the_loop(make: Callable[..., Both]) -> None:
    both = make(64 * PAGE, 16 * PAGE)
    both.fill(0, 0, 7, 63)
    both.fill(1, 15)
    source_told, target_told = Told(), Told()
    loop = asyncio.get_running_loop()
    both.source.watch(loop, source_told)
    both.target.watch(loop, target_told)
    both.connect()
    both.hand_over()
    both.source.serve(drain=True)
    await source_told.wait(EventKind.ALL_SENT)
    await target_told.wait(EventKind.ALL_CURRENT)
    for region, page in ((0, 0), (0, 7), (0, 63), (1, 15)):
        assert both.page(region, page) == content(page)
    assert both.page(0, 1) == bytes(PAGE)
    sent, got = both.source.stats(), both.target.stats()
    assert got.stale_pages == 0
    assert got.pages == 80
    assert got.wire_bytes == sent.wire_bytes == sent.payload_bytes + sent.header_bytes
    assert sent.sent_blocks == 4
    assert sent.stale_pages_left == 0
    assert (got.faults_current, got.faults_stale, got.faults_missing) == (0, 0, 0)
    assert list(both.target.lacking_maps()) == []


async def test_pages_go_over_tls_right_behind_the_preamble(make: Callable[..., Both], authority: Authority) -> None:
    both = make(2048 * PAGE, streams=1)
    both.fill(0, *range(0, 2048, 2))
    told = Told()
    both.target.watch(asyncio.get_running_loop(), told)
    server, client = authority.side("host-b", server=True), authority.side("host-a", server=False)
    ends = {}
    for stream in (0, URGENT):
        left, right = socket.socketpair()
        theirs, ours = Channel.tls(left.detach(), server), Channel.tls(right.detach(), client, "host-b")
        await asyncio.gather(theirs.handshake(), ours.handshake())
        await ours.send(b"preamble")
        both.source.add_stream(stream, ours)
        ends[stream] = theirs
    both.hand_over()
    both.source.serve(drain=True)
    for stream, theirs in ends.items():
        assert await theirs.receive(8) == b"preamble"
        both.target.add_stream(stream, theirs)
    await told.wait(EventKind.ALL_CURRENT)
    assert all(both.page(0, page) == (bytes(PAGE) if page % 2 else content(page)) for page in range(2048))
    assert both.target.stats().wire_bytes == both.source.stats().wire_bytes


async def test_a_barrier_is_told_once_it_has_passed_every_stream(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE, streams=3)
    told = Told()
    both.target.watch(asyncio.get_running_loop(), told)
    both.connect()
    both.source.barrier(5)
    assert (await told.wait(EventKind.BARRIER)).value == 5


async def test_a_lost_stream_is_told_with_its_number_and_reason(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    told = Told()
    both.target.watch(asyncio.get_running_loop(), told)
    left, right = socket.socketpair()
    both.target.add_stream(1, right.detach())
    left.close()
    event = await told.wait(EventKind.STREAM_LOST)
    assert event.stream == 1
    assert isinstance(event.error, ConnectionLostError)


async def test_garbage_on_a_page_connection_is_the_peers_fault(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    told = Told()
    both.target.watch(asyncio.get_running_loop(), told)
    left, right = socket.socketpair()
    both.target.add_stream(URGENT, right.detach())
    left.sendall(b"GET / HTTP/1.1\r\n" * 64)
    event = await told.wait(EventKind.STREAM_LOST)
    left.close()
    assert event.stream == URGENT
    assert isinstance(event.error, RemoteProtocolError)


async def test_nothing_is_told_after_unwatch(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    told = Told()
    both.target.watch(asyncio.get_running_loop(), told)
    both.target.unwatch()
    both.target.unwatch()
    left, right = socket.socketpair()
    both.target.add_stream(0, right.detach())
    left.close()
    both.target.drop_streams()
    await asyncio.sleep(0)
    assert told.events == []


# ---------------------------------------------------------------- maps


def test_maps_come_in_pieces_and_go_back_in_pieces(make: Callable[..., Both], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAP_PIECE_BYTES", 16)  # 128 pages a piece
    both = make(1000 * PAGE, 300 * PAGE)
    both.fill(0, 0, 127, 128, 999)
    both.fill(1, 299)
    both.source.freeze_whole()
    pieces = list(both.source.stale_maps())
    assert all(len(bits) <= 16 for _, _, bits in pieces)
    assert all(first % 128 == 0 for _, first, _ in pieces)
    stale = set_bits(pieces)
    assert {(0, 0), (0, 127), (0, 128), (0, 999), (1, 299)} <= stale
    assert max(page for region, page in stale if region == 0) < 1000
    for region, first, bits in pieces:
        both.target.stale_map(region, first, bits)
    both.target.switchover()
    lacking = list(both.target.lacking_maps())
    assert set_bits(lacking) == stale
    assert both.target.stats().stale_pages == len(stale)
    both.source.lacking_begin()
    for region, first, bits in lacking:
        both.source.lacking(region, first, bits)
    assert set_bits(list(both.source.stale_maps())) == stale
    assert both.source.stats().stale_pages_left == len(stale)


def test_what_remains_is_counted_in_bytes_where_pages_differ_in_size(make: Callable[..., Both]) -> None:
    """A pool that runs out of huge pages leaves a guest with regions of both sizes."""
    large = 512 * PAGE
    both = make(64 * PAGE, 4 * large, pages=(PAGE, large))
    stale = 3 * PAGE + 2 * large
    both.fill(0, 1, 2, 63)
    both.fill(1, 0, 3 * 512)
    both.source.freeze_whole()
    assert set_bits(list(both.source.stale_maps())) == {(0, page) for page in range(64)} | {
        (1, page) for page in range(4)
    }
    both.source.lacking_begin()
    for region, bits in ((0, b"\x06" + bytes(6) + b"\x80"), (1, b"\x09")):
        both.source.lacking(region, 0, bits)
        both.target.stale_map(region, 0, bits)
    both.target.switchover()

    source = Record(id="1", guest="vm", role="source", mode="hybrid", state=State.POSTCOPY, page_size=large)
    figures.of_source(source, both.source.stats(), Rates(), frozen=True)
    assert source.remaining_bytes == stale
    target = Record(id="1", guest="vm", role="target", mode="hybrid", state=State.POSTCOPY, page_size=large)
    figures.of_target(target, both.target.stats(), Rates(), mapped=True)
    assert target.remaining_bytes == stale
    again = TargetEngine(both.target_memory, both.streams, both.ledger_fd, SECRET, recover=True)
    assert again.stats().stale_bytes == stale
    again.destroy()

    # The connection is lost: what has left the source may not have arrived.
    source.state, source.stale_bytes = State.POSTCOPY_PAUSED, stale
    both.source.lacking_begin()
    figures.of_source(source, both.source.stats(), Rates(), frozen=True)
    assert source.remaining_bytes == stale


def test_a_reconnect_forgets_the_former_stale_set(make: Callable[..., Both]) -> None:
    both = make(64 * PAGE)
    both.fill(0, *range(64))
    both.source.freeze_whole()
    both.source.lacking_begin()
    both.source.lacking(0, 8, b"\x81")
    assert set_bits(list(both.source.stale_maps())) == {(0, 8), (0, 15)}


@pytest.mark.parametrize(
    ("region", "first_page", "bits"),
    [(1, 0, b"\x01"), (0, 64, b"\x01"), (0, 1 << 40, b"\x01"), (0, 56, b"\x00\x01"), (0, 0, bytes(9))],
    ids=["region", "beyond", "far-beyond", "runs-over", "too-long"],
)
def test_a_piece_that_does_not_fit_is_refused(
    make: Callable[..., Both], region: int, first_page: int, bits: bytes
) -> None:
    both = make(64 * PAGE)
    both.source.freeze_whole()
    both.source.lacking_begin()
    for take in (both.source.lacking, both.target.stale_map):
        with pytest.raises(MigratedError):
            take(region, first_page, bits)


# ---------------------------------------------------------------- life


def test_destroying_twice_is_fine_and_nothing_works_afterwards(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    both.connect()
    for engine in (both.source, both.target):
        engine.destroy()
        engine.destroy()
        assert not engine.alive
        with pytest.raises(MigratedError, match="already destroyed"):
            engine.drop_streams()
        with pytest.raises(MigratedError, match="already destroyed"):
            engine.stats()
        assert list(engine.events()) == []


async def test_closing_twice_is_fine(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    both.connect()
    for engine in (both.source, both.target):
        engine.watch(asyncio.get_running_loop(), Told())
        await engine.close()
        await engine.close()


def test_streams_can_be_dropped_and_added_again(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    for _ in range(3):
        both.connect()
        both.source.drop_streams()
        both.target.drop_streams()


def test_a_stream_that_cannot_be_is_refused_and_its_descriptor_closed(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE, streams=1)
    for engine in (both.source, both.target):
        left, right = socket.socketpair()
        with left, pytest.raises(MigratedError):
            engine.add_stream(1, right.detach())
        # the fixture sees that nothing stays open


def test_limits_change_at_any_time(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    both.source.set_bandwidth(1, 1)
    both.source.set_bandwidth((1 << 64) - 1, 0)
    both.source.set_bandwidth(0)


def test_releasing_before_everything_is_there_is_refused(make: Callable[..., Both]) -> None:
    both = make(16 * PAGE)
    both.fill(0, 3)
    both.hand_over()
    with pytest.raises(MigratedError):
        both.target.release()


@pytest.mark.skipif(not probe.features().has_userfaultfd, reason="no userfaultfd")
def test_bookkeeping_is_small(make: Callable[..., Both]) -> None:
    size = 64 << 20
    both = make(size)
    assert both.source.stats().table_bytes <= size * 0.005
    assert ledger_bytes(both.target_memory) <= size // PAGE + PAGE


# ---------------------------------------------------------------- histograms


def histogram(**buckets: int) -> Histogram:
    counts = [0] * 32
    for name, count in buckets.items():
        counts[int(name.removeprefix("b"))] = count
    return Histogram(sum(counts), 0, 1 << 62, tuple(counts))


def test_quantiles_lie_in_their_bucket() -> None:
    one = histogram(b3=90, b10=10)
    assert 8e-6 <= one.quantile_seconds(0.5) <= 16e-6
    assert 1024e-6 <= one.quantile_seconds(0.99) <= 2048e-6
    assert histogram(b0=1).quantile_seconds(0.5) <= 2e-6
    assert histogram().quantile_seconds(0.99) == 0


def test_a_quantile_is_never_above_the_maximum() -> None:
    counts = [0] * 32
    counts[10] = 5
    assert Histogram(5, 0, 1_100_000, tuple(counts)).quantile_seconds(1.0) == pytest.approx(0.0011)


def test_histograms_add_up() -> None:
    total = histogram(b1=1, b2=2) + histogram(b2=3)
    assert total.count == 6
    assert total.buckets[1:3] == (1, 5)
