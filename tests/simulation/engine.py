"""A model of the two engines of the C core: pages, marks, the stale map, the ledger, and the events that they report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from migrated.errors import ConnectionLostError, MigratedError
from migrated.memory.engine import URGENT, Event, EventKind, Histogram, SourceStats, TargetStats
from tests.simulation.guest import PAGE_BYTES, Memory, Process
from tests.simulation.loop import current
from tests.simulation.network import END, Endpoint

Where = tuple[int, int]


def _bits(pages: int, chosen: set[int]) -> bytes:
    bits = bytearray((pages + 7) // 8)
    for page in chosen:
        bits[page // 8] |= 1 << page % 8
    return bytes(bits)


def _pages(first: int, bits: bytes) -> Iterator[int]:
    for index, byte in enumerate(bits):
        for bit in range(8):
            if byte >> bit & 1:
                yield first + index * 8 + bit


class Ledger:
    """State of each page on the target.  Outlives the agent."""

    def __init__(self) -> None:
        self.switched = False
        self.stale: set[Where] = set()
        self.mapped: set[Where] = set()
        self.st_size = 0


class Tracker:
    """Model of `migrated.memory.tracker.Tracker`."""

    def __init__(self, memory: Any, uffd: int) -> None:
        self._process: Process = current().host.processes[memory.pid]
        self.handle: Tracker | None = self
        self.armed = False
        self.page_count = 1 if current().host.world.at_once else 1 << 40

    @property
    def process(self) -> Process:
        return self._process

    def arm(self) -> None:
        self.armed = True

    def disarm(self) -> None:
        self.armed = False

    def close(self) -> None:
        self.handle = None


class _Engine:
    """Streams and events of both engines."""

    def __init__(self) -> None:
        self.life = current()
        self.world = self.life.host.world
        self.streams: dict[int, Any] = {}
        self._handler: Callable[[Event], None] | None = None
        self._alive = True
        self._waiting: list[Event] = []
        self.wire_bytes = 0
        self.world.engines.append(self)

    @property
    def alive(self) -> bool:
        return self._alive

    async def page_map(self, cell_count: int) -> None:
        """Nobody looks at the pages here."""

    def watch(self, loop: Any, handler: Callable[[Event], None]) -> None:
        self._handler = handler

    def unwatch(self) -> None:
        self._handler = None

    def flush(self) -> None:
        """Deliver all queued events now."""
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            if self._handler is not None:
                self._handler(event)

    def post(self, kind: EventKind, stream: int = 0, value: int = 0, error: MigratedError | None = None) -> None:
        self._waiting.append(Event(kind, stream, value, error))
        self.world.net.at(self.world.loop.now, self.life, self.flush)

    def add_stream(self, stream: int, fd: int) -> None:
        endpoint: Any = self.life.fds.pop(fd).endpoint
        if self.life.host.out_of_descriptors():
            endpoint.close()
            raise MigratedError("no thread for a stream", code="native")
        if stream in self.streams:
            endpoint.close()
            raise MigratedError(f"stream {stream} is there already", code="native")
        self.streams[stream] = endpoint
        endpoint.connection.what = "urgent" if stream == URGENT else "bulk"
        self.world.engine_endpoints.append(endpoint)
        endpoint.attach(
            lambda item: self._item(stream, endpoint, item), lambda error: self._lost(stream, endpoint, error)
        )

    def _item(self, stream: int, endpoint: Endpoint, item: Any) -> None:
        if self.streams.get(stream) is not endpoint:
            return
        if item is END:
            self._lost(stream, endpoint, None)
        else:
            self.frame(stream, item)

    def _lost(self, stream: int, endpoint: Endpoint, error: OSError | None) -> None:
        if self.streams.get(stream) is not endpoint:
            return
        del self.streams[stream]
        endpoint.close()
        text = f"stream {stream} ended: {error}"
        self.post(EventKind.STREAM_LOST, stream, 0, ConnectionLostError(text))

    def frame(self, stream: int, item: Any) -> None:
        raise NotImplementedError

    def send(self, stream: int, item: Any) -> bool:
        endpoint = self.streams.get(stream)
        if endpoint is None:
            return False
        try:
            endpoint.send(item)
        except OSError as error:
            self._lost(stream, endpoint, error)
            return False
        self.wire_bytes += PAGE_BYTES if item[0] == "page" else 0
        return True

    def drop_streams(self) -> None:
        streams, self.streams = self.streams, {}
        for endpoint in streams.values():
            endpoint.close()

    def after(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> None:
        self.world.net.at(self.world.loop.now + seconds, self.life, callback, *arguments)

    async def close(self) -> None:
        self.unwatch()
        self._alive = False
        self.drop_streams()
        await asyncio.sleep(0)


class SimSourceEngine(_Engine):
    """Model of `SourceEngine`."""

    def __init__(self, memory: Any, host_page_bytes: Any, stream_count: int, block_secret: bytes) -> None:
        super().__init__()
        self._memory: list[Memory] = [current().fds[fd] for fd in memory.memory_fds]
        self._stream_count = stream_count
        self.marked: set[Where] = set()
        self.stale: set[Where] = set()
        self.frozen = False
        self._draining = False
        self._ticking = False

    def _all(self) -> set[Where]:
        return {(index, page) for index, memory in enumerate(self._memory) for page in range(len(memory.pages))}

    def set_bandwidth(self, *_: int) -> None: ...

    def set_compression(self, level: int) -> None: ...

    def mark_populated(self, tracker: Tracker) -> None:
        tracker.process.write_some()
        self.marked = self._all()

    def marked_maps(self) -> Iterator[tuple[int, int, bytes]]:
        return self._maps(self.marked)

    def stale_maps(self) -> Iterator[tuple[int, int, bytes]]:
        return self._maps(self.stale)

    def _maps(self, chosen: set[Where]) -> Iterator[tuple[int, int, bytes]]:
        for index, memory in enumerate(self._memory):
            pages = {page for region, page in chosen if region == index}
            if pages:
                yield index, 0, _bits(len(memory.pages), pages)

    def scan(self, tracker: Tracker, *, quiesced: bool) -> int:
        del quiesced
        tracker.process.write_some()
        written, tracker.process.dirty = tracker.process.dirty, set()
        self.marked |= written
        return len(written) * PAGE_BYTES

    def scan_last(self, tracker: Tracker) -> int:
        return self.scan(tracker, quiesced=True)

    def require_unwritten(self, tracker: Tracker) -> None:
        assert not tracker.process.dirty

    def sample(self, blocks: int) -> float:
        del blocks
        return 1.0 if self.marked else 0.0

    def start_round(self, number: int) -> None:
        marked, self.marked = self.marked, set()
        for where in sorted(marked):
            if not self._send_page(where[1] % self._stream_count, where):
                return  # STREAM_LOST was reported
        self.after(self.world.round_seconds(), self.post, EventKind.ROUND_DONE, 0, number)

    def _send_page(self, stream: int, where: Where) -> bool:
        return self.send(stream, ("page", where, self._memory[where[0]].pages[where[1]]))

    def barrier(self, number: int) -> None:
        for stream in range(self._stream_count):
            self.send(stream, ("barrier", number))

    def freeze(self) -> int:
        self.stale, self.marked = self.marked, set()
        self.frozen = True
        return len(self.stale)

    def freeze_whole(self) -> None:
        self.frozen = True

    def serve(self, *, drain: bool) -> None:
        self._draining = drain
        if drain and not self._ticking:
            self._ticking = True
            self._drain()

    def _drain(self) -> None:
        if not self._alive or not self._draining or not self.streams:
            self._ticking = False
            return
        if not self.stale:
            self._ticking = False
            self.post(EventKind.ALL_SENT)
            return
        where = min(self.stale)
        if self._send_page(where[1] % self._stream_count, where):
            self.stale.discard(where)
        self.after(self.world.page_seconds(), self._drain)

    def frame(self, stream: int, item: Any) -> None:
        if item[0] == "demand" and self.frozen and self._send_page(URGENT, item[1]):
            self.stale.discard(item[1])

    def lacking_begin(self) -> None:
        self.stale = set()
        self._draining = False

    def lacking(self, region: int, first_page: int, bits: bytes) -> None:
        self.stale |= {(region, page) for page in _pages(first_page, bits)}

    def stats(self) -> SourceStats:
        zero = dict.fromkeys(SourceStats.__dataclass_fields__, 0)
        zero |= {
            "wire_bytes": self.wire_bytes,
            "dirty_bytes": len(self.marked) * PAGE_BYTES,
            "stale_pages_left": len(self.stale),
            "stale_bytes_left": len(self.stale) * PAGE_BYTES,
        }
        return SourceStats(**zero)


class SimTargetEngine(_Engine):
    """Model of `TargetEngine`."""

    def __init__(
        self, memory: Any, stream_count: int, ledger_fd: int, block_secret: bytes, *, recover: bool = False
    ) -> None:
        super().__init__()
        self._memory: list[Memory] = [current().fds[piece.memory_fd] for piece in memory]
        self._stream_count = stream_count
        self.ledger: Ledger = current().fds[ledger_fd]
        self._process: Process | None = None
        self._barriers: dict[int, int] = {}
        self._background = False
        self._told: set[EventKind] = set()
        del recover

    def arm(self, uffd: int, mappings: Any, *, recovered: bool = False) -> None:
        if self.life.host.out_of_descriptors():
            raise MigratedError("no descriptor for the fault server", code="native")
        self._process = next(process for process in self.life.host.processes.values() if process.memory == self._memory)
        self._process.engine = self
        if recovered:
            for where in list(self._process.waiting):
                self.fault(where)
            self._tell()

    def populate(self, *_: Any) -> None: ...

    def stale_map(self, region: int, first_page: int, bits: bytes) -> None:
        self.ledger.stale |= {(region, page) for page in _pages(first_page, bits)}

    def switchover(self) -> None:
        self.ledger.switched = True
        assert self._process is not None
        for where in list(self._process.waiting):
            self.fault(where)
        self._tell()

    def fault(self, where: Where) -> None:
        """Handle a fault: a thread of the guest waits for a page."""
        if not self._alive or not self.ledger.switched:
            return
        if where in self.ledger.stale:
            self.send(URGENT, ("demand", where))
        else:
            self._map(where)

    def _map(self, where: Where, *, poisoned: bool = False) -> None:
        assert self._process is not None
        if self._process.engine is not self:
            return
        self.ledger.mapped.add(where)
        self._process.map(where, poisoned=poisoned)

    def frame(self, stream: int, item: Any) -> None:
        if item[0] == "barrier":
            self._barriers[item[1]] = self._barriers.get(item[1], 0) + 1
            if self._barriers[item[1]] == self._stream_count:
                self.post(EventKind.BARRIER, 0, item[1])
        elif item[0] == "page":
            self._page(item[1], item[2])

    def _page(self, where: Where, value: int) -> None:
        if self.ledger.switched and where not in self.ledger.stale:
            return
        self._memory[where[0]].pages[where[1]] = value
        if self.ledger.switched:
            self.ledger.stale.discard(where)
            if self._background or (self._process is not None and where in self._process.waiting):
                self._map(where)
            self._tell()

    def add_stream(self, stream: int, fd: int) -> None:
        super().add_stream(stream, fd)
        if stream == URGENT and self._process is not None and self.ledger.switched:
            for where in list(self._process.waiting):
                self.fault(where)

    def background(self) -> None:
        assert self.ledger.switched, "not before the switchover"
        assert not self._background, "already running"
        self._background = True
        self.after(self.world.round_seconds(), self._map_all)

    def _map_all(self) -> None:
        if self._alive:
            for region, memory in enumerate(self._memory):
                for page in range(len(memory.pages)):
                    if (region, page) not in self.ledger.stale:
                        self._map((region, page))
            self._tell()

    def _tell(self) -> None:
        """Report once that no page is stale any more."""
        if self.ledger.switched and not self.ledger.stale:
            self._once(EventKind.ALL_CURRENT)

    def _once(self, kind: EventKind) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self.post(kind)

    def lacking_maps(self) -> Iterator[tuple[int, int, bytes]]:
        for region, memory in enumerate(self._memory):
            pages = {page for index, page in self.ledger.stale if index == region}
            if pages:
                yield region, 0, _bits(len(memory.pages), pages)

    def poison_stale(self) -> int:
        poisoned, self.ledger.stale = self.ledger.stale, set()
        for where in poisoned:
            self._map(where, poisoned=True)
        self._map_all()
        return len(poisoned)

    def release(self) -> None:
        assert self._process is not None
        if self._process.alive:
            self._map_all()
            self._process.registered = False

    async def close(self) -> None:
        if self._process is not None and self._process.engine is self:
            self._process.engine = None
        await super().close()

    def stats(self) -> TargetStats:
        histogram = Histogram(0, 0, 0, ())
        zero: dict[str, Any] = dict.fromkeys(TargetStats.__dataclass_fields__, 0)
        zero |= {"latency_current": histogram, "latency_stale": histogram, "latency_missing": histogram}
        stale = len(self.ledger.stale)
        zero |= {"wire_bytes": self.wire_bytes, "stale_pages": stale, "stale_bytes": stale * PAGE_BYTES}
        return TargetStats(**zero)
