"""The two engines of the C core as Python sees them.

This is a thin, typed layer: sizes, units and errors are those of ``native/include/mgd_api.h``.  Methods marked *blocks*
read memory, join threads or wait for the kernel: call them through ``asyncio.to_thread``.  (Every call releases the
interpreter lock while it is in C.)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from migrated.errors import GuestError, MigratedError
from migrated.memory.channel import Channel
from migrated.memory.native import call, error_from, ffi, hash_key, lib
from migrated.memory.page_map import MAP_STATES, PageMap
from migrated.memory.regions import Mapping, SourceMemory, TargetMemory
from migrated.memory.tracker import Tracker
from migrated.waiting import in_thread

URGENT: int = lib.MGD_STREAM_URGENT

#: Bytes of bitmap in one control message: 8 Mi pages.
MAP_PIECE_BYTES = 1 << 20


class EventKind(enum.IntEnum):
    """What a thread of an engine reports."""

    ROUND_DONE = lib.MGD_EVENT_ROUND_DONE
    BARRIER = lib.MGD_EVENT_BARRIER
    STREAM_LOST = lib.MGD_EVENT_STREAM_LOST
    ALL_SENT = lib.MGD_EVENT_ALL_SENT
    ALL_CURRENT = lib.MGD_EVENT_ALL_CURRENT
    FAILED = lib.MGD_EVENT_FAILED
    POPULATED = lib.MGD_EVENT_POPULATED


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event; ``stream`` is a bulk index or `URGENT`; ``error`` is set if something failed."""

    kind: EventKind
    stream: int
    value: int
    error: MigratedError | None


class _Engine:
    """The common part of both engines: life cycle, events, streams."""

    _prefix = ""

    def __init__(self, handle: Any, page_counts: list[int]) -> None:
        self._handle: Any | None = handle
        self._page_counts = page_counts  # of each region
        self._reading = threading.Lock()  # held while a thread reads the page map, and by the destruction
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handler: Callable[[Event], None] | None = None
        self._event_fd = int(self._function("event_fd")(handle))

    def _function(self, name: str) -> Any:
        return getattr(lib, f"mgd_{self._prefix}_{name}")

    def _call(self, name: str, *arguments: Any) -> None:
        call(self._function(name), self.handle, *arguments)

    @property
    def handle(self) -> Any:
        """The C object.  Raises an error once it is destroyed."""
        if self._handle is None:
            raise MigratedError(f"the {self._prefix} engine is already destroyed")
        return self._handle

    @property
    def alive(self) -> bool:
        """Whether `destroy` has not been called."""
        return self._handle is not None

    def watch(self, loop: asyncio.AbstractEventLoop, handler: Callable[[Event], None]) -> None:
        """Call ``handler`` in ``loop`` for every event, until `destroy`."""
        self._loop, self._handler = loop, handler
        loop.add_reader(self._event_fd, self.flush)

    def flush(self) -> None:
        """Deliver the pending events; must run in the loop's thread."""
        for event in self.events():
            if self._handler is not None:
                self._handler(event)

    def events(self) -> Iterator[Event]:
        """Yield the pending events."""
        raw: Any = ffi.new("struct mgd_event *")
        while self._handle is not None and self._function("next_event")(self._handle, raw):
            error = error_from(raw.error) if raw.error.kind != lib.MGD_ERR_NONE else None
            yield Event(EventKind(raw.kind), raw.stream, raw.value, error)

    def add_stream(self, stream: int, connection: int | Channel) -> None:
        """Hand over a page connection, or a connected socket for a plain one, and start its thread.

        The engine owns it from then on, even if this fails.  A TLS handshake must be complete.
        """
        channel = Channel.plain(connection) if isinstance(connection, int) else connection
        with contextlib.closing(channel):
            engine = self.handle  # raises before the channel is taken
            call(self._function("add_stream"), engine, stream, channel.take())

    def drop_streams(self) -> None:
        """Shut down and join all stream threads; new streams may be added.  Blocks."""
        self._function("drop_streams")(self.handle)

    def destroy(self) -> None:
        """Join every thread and free everything.  Blocks.  Idempotent; call `unwatch` first, in the loop's thread."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._destroy(handle)

    def _destroy(self, handle: Any) -> None:
        with self._reading:
            self._function("destroy")(handle)

    def unwatch(self) -> None:
        """Stop delivering events; must run in the loop's thread."""
        if self._loop is not None:
            self._loop.remove_reader(self._event_fd)
            self._loop = self._handler = None

    async def close(self) -> None:
        """Call `unwatch`, then `destroy` in a thread.

        The handle is cleared here, in the loop's thread: statistics are read in that thread, and never during the
        destruction.
        """
        self.unwatch()
        handle, self._handle = self._handle, None
        if handle is not None:
            await in_thread(self._destroy, handle)

    async def page_map(self, cell_count: int) -> PageMap | None:
        """Return a page map of at most ``cell_count`` cells; None if the engine is destroyed meanwhile."""
        return await in_thread(self._read_page_map, cell_count)

    def _read_page_map(self, cell_count: int) -> PageMap | None:
        with self._reading:
            if self._handle is None:
                return None
            shares = ffi.new("uint8_t[]", cell_count * lib.MGD_MAP_STATES)
            raw: Any = ffi.new("struct mgd_page_map *")
            self._call("page_map", cell_count, shares, raw)
        every = bytes(ffi.buffer(shares, raw.cell_count * lib.MGD_MAP_STATES))
        found = {name: index for index, name in enumerate(MAP_STATES) if raw.bytes[index]}
        return PageMap(
            at=time.time(),
            cell_bytes=int(raw.cell_bytes),
            bytes_by_state={name: int(raw.bytes[index]) for name, index in found.items()},
            cells={name: every[index :: lib.MGD_MAP_STATES] for name, index in found.items()},
        )

    def _maps(self, name: str) -> Iterator[tuple[int, int, bytes]]:
        """Yield page bitmaps of the regions in pieces ``(region, first_page, bits)``; skip pieces without a bit set."""
        for region, count in enumerate(self._page_counts):
            total = (count + 7) // 8
            for offset in range(0, total, MAP_PIECE_BYTES):
                size = min(MAP_PIECE_BYTES, total - offset)
                buffer = ffi.new("uint8_t[]", size)
                self._call(name, region, offset * 8, buffer, size)
                bits = bytes(ffi.buffer(buffer))
                if bits.strip(b"\0"):
                    yield region, offset * 8, bits

    def _stats(self, struct: str) -> Any:
        raw = ffi.new(f"struct {struct} *")
        self._function("stats")(self.handle, raw)
        return raw


@dataclasses.dataclass(frozen=True, slots=True)
class SourceStats:
    """See ``struct mgd_source_stats``."""

    wire_bytes: int
    payload_bytes: int
    header_bytes: int
    zero_blocks: int
    unchanged_blocks: int
    sent_blocks: int
    read_bytes: int
    compression_saved_bytes: int
    dirty_bytes: int
    stale_pages_left: int
    stale_bytes_left: int
    demand_bytes: int
    drain_bytes: int
    table_bytes: int
    lent_bytes: int


class SourceEngine(_Engine):
    """Reads, hashes and sends; see "source engine" in mgd_api.h."""

    _prefix = "source"

    def __init__(
        self, memory: SourceMemory, host_page_bytes: Sequence[int], stream_count: int, block_secret: bytes
    ) -> None:
        regions = [
            {
                "memory_fd": memory.memory_fds[index],
                "flags": lib.MGD_SOURCE_PRIVATE * memory.private[index]
                | lib.MGD_SOURCE_FILE_BEHIND * memory.file_behind[index],
                "file_offset": memory.file_offsets[index],
                "size_bytes": region.size_bytes,
                "page_bytes": region.page_bytes,
                "host_page_bytes": host_page_bytes[index],
            }
            for index, region in enumerate(memory.regions)
        ]
        out = ffi.new("struct mgd_source **")
        raw = ffi.new("struct mgd_source_region[]", regions)
        call(lib.mgd_source_create, raw, len(regions), stream_count, hash_key(block_secret), out)
        pages = zip(memory.regions, host_page_bytes, strict=True)
        super().__init__(out[0], [region.size_bytes // page for region, page in pages])

    def set_bandwidth(self, bytes_per_second: int, drain_bytes_per_second: int = 0) -> None:
        """Set the limits over all bulk streams; 0: none.  Demanded pages are exempt."""
        self._function("set_bandwidth")(self.handle, bytes_per_second, drain_bytes_per_second)

    def set_compression(self, level: int) -> None:
        """Set the Zstd level; 0: off."""
        self._call("set_compression", level)

    def mark_populated(self, tracker: Tracker) -> None:
        """Mark all memory that is populated.  Blocks."""
        self._call("mark_populated", tracker.handle)

    def marked_maps(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield pieces ``(region, first_page, bits)`` of the host pages that the next round may send.

        Pre-copy only; blocks briefly.
        """
        return self._maps("marked_map")

    def scan(self, tracker: Tracker, *, quiesced: bool) -> int:
        """Mark what was written since the last scan; return the bytes of its pages.

        Blocks (well under 1 ms per GiB).
        """
        return self._scan(tracker, lib.MGD_SCAN_QUIESCED if quiesced else lib.MGD_SCAN_RUNNING)

    def scan_last(self, tracker: Tracker) -> int:
        """Do the same for a guest that is paused and will not run here with this tracking any more.  Blocks.

        It re-arms nothing, and so is faster.
        """
        return self._scan(tracker, lib.MGD_SCAN_LAST)

    def _scan(self, tracker: Tracker, kind: int) -> int:
        out = ffi.new("uint64_t *")
        self._call("scan", tracker.handle, kind, out)
        return int(out[0])

    def require_unwritten(self, tracker: Tracker) -> None:
        """Scan once more after `scan_last`.  Blocks.

        Raises GuestError ``written-while-paused`` if anything has changed since that the target would not get.
        """
        late: Any = ffi.new("struct mgd_late_writes *")
        self._call("late_writes", tracker.handle, late)
        if late.bytes:
            raise GuestError(
                f"{late.bytes >> 10} KiB of guest memory changed while the guest was paused, "
                f"the first at {late.offset:#x} in region {late.region}",
                code="written-while-paused",
                hint="the guest runs on at its source.  A device or a helper of this guest writes while it is paused: find it "
                "and take it away before the next try, and report it",
            )

    def sample(self, blocks: int) -> float:
        """Return which fraction (0 to 1) of the marked memory has changed since it was sent, from ``blocks`` of it.

        Only between rounds.  Blocks (a few ms for 1 000 blocks).
        """
        examined, changed = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        self._call("sample", blocks, examined, changed)
        return int(changed[0]) / int(examined[0]) if examined[0] else 0.0

    def start_round(self, number: int) -> None:
        """Send the marked pages; ROUND_DONE follows."""
        self._call("round", number)

    def barrier(self, number: int) -> None:
        """Write a barrier on every bulk stream."""
        self._call("barrier", number)

    def freeze(self) -> int:
        """Turn the marked pages into the stale set; return its size in host pages.  Blocks."""
        out = ffi.new("uint64_t *")
        self._call("freeze", out)
        return int(out[0])

    def freeze_whole(self) -> None:
        """Freeze after a crash: there are no hashes, so whole pages are sent."""
        self._call("freeze_whole")

    def stale_maps(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield pieces ``(region, first_page, bits)`` of the stale set."""
        return self._maps("stale_map")

    def serve(self, *, drain: bool) -> None:
        """Answer demands; with ``drain`` also send the rest."""
        self._call("serve", int(drain))

    def lacking_begin(self) -> None:
        """Begin a reconnect: forget claims and the stale set; `lacking` provides the new one."""
        self._call("lacking_begin")

    def lacking(self, region: int, first_page: int, bits: bytes) -> None:
        """Add a piece of what the target lacks.  Raises if region or index is wrong (the peer sent it)."""
        self._call("lacking", region, first_page, bits, len(bits))

    def stats(self) -> SourceStats:
        """Return the current statistics."""
        raw = self._stats("mgd_source_stats")
        return SourceStats(*(int(getattr(raw, field.name)) for field in dataclasses.fields(SourceStats)))


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies: ``buckets[i]`` counts those in [2^i, 2^(i+1)) microseconds, the first bucket from 0."""

    count: int
    total_ns: int
    max_ns: int
    buckets: tuple[int, ...]

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(
            self.count + other.count,
            self.total_ns + other.total_ns,
            max(self.max_ns, other.max_ns),
            tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True)),
        )

    def quantile_seconds(self, q: float) -> float:
        """Return the q-quantile, interpolated inside its bucket (within a factor of two), never above the maximum."""
        if self.count == 0:
            return 0.0
        rank = q * self.count
        seen = 0
        for index, number in enumerate(self.buckets):
            if number and seen + number >= rank:
                low = 0 if index == 0 else 1 << index
                high = 1 << (index + 1)
                value = low + (high - low) * (rank - seen) / number
                return min(value * 1e-6, self.max_ns * 1e-9)
            seen += number
        return self.max_ns * 1e-9


def _figure(raw: Any) -> Any:
    if isinstance(raw, int):
        return raw
    return Histogram(int(raw.count), int(raw.total_ns), int(raw.max_ns), tuple(raw.buckets))


@dataclasses.dataclass(frozen=True, slots=True)
class TargetStats:
    """See ``struct mgd_target_stats``."""

    wire_bytes: int
    payload_bytes: int
    pages: int
    stale_pages: int
    stale_bytes: int
    faults_current: int
    faults_stale: int
    faults_missing: int
    fault_thread_heartbeat_ns: int
    latency_current: Histogram
    latency_stale: Histogram
    latency_missing: Histogram


def _target_regions(memory: Sequence[TargetMemory]) -> Any:
    regions = [
        {
            "memory_fd": piece.memory_fd,
            "flags": 0 if piece.reserve else lib.MGD_TARGET_UNRESERVED,
            "size_bytes": piece.region.size_bytes,
            "host_page_bytes": piece.region.page_bytes,
        }
        for piece in memory
    ]
    return ffi.new("struct mgd_target_region[]", regions)


def ledger_bytes(memory: Sequence[TargetMemory]) -> int:
    """Return the size of the ledger memfd for these regions."""
    return int(lib.mgd_ledger_bytes(_target_regions(memory), len(memory)))


class TargetEngine(_Engine):
    """Receives, keeps the ledger, serves faults; see "target engine" in mgd_api.h."""

    _prefix = "target"

    def __init__(
        self,
        memory: Sequence[TargetMemory],
        stream_count: int,
        ledger_fd: int,
        block_secret: bytes,
        *,
        recover: bool = False,
    ) -> None:
        out = ffi.new("struct mgd_target **")
        call(
            lib.mgd_target_create,
            _target_regions(memory),
            len(memory),
            stream_count,
            ledger_fd,
            int(recover),
            hash_key(block_secret),
            out,
        )
        super().__init__(out[0], [piece.region.size_bytes // piece.region.page_bytes for piece in memory])

    def arm(self, uffd: int, mappings: Sequence[Mapping], *, recovered: bool = False) -> None:
        """Start the fault server."""
        raw = ffi.new("struct mgd_mapping[]", [dataclasses.asdict(mapping) for mapping in mappings])
        self._call("arm", uffd, raw, len(mappings), int(recovered))

    def populate(self, region: int, first_page: int, bits: bytes, threads: int = 1) -> None:
        """Populate pages before their data arrives."""
        self._call("populate", region, first_page, bits, len(bits), threads)

    def stale_map(self, region: int, first_page: int, bits: bytes) -> None:
        """Add a piece of the stale map."""
        self._call("stale_map", region, first_page, bits, len(bits))

    def switchover(self) -> None:
        """Switch over: the stale map is complete."""
        self._call("switchover")

    def background(self) -> None:
        """Start the background CONTINUE."""
        self._call("background")

    def lacking_maps(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield pieces ``(region, first_page, bits)`` of what has not arrived."""
        return self._maps("lacking")

    def poison_stale(self) -> int:
        """Poison the missing pages: the guest gets a memory error there.  Return how many they are."""
        out = ffi.new("uint64_t *")
        self._call("poison_stale", out)
        return int(out[0])

    def release(self) -> None:
        """Unregister, wake waiters and end the fault server, once every page is current.  Blocks."""
        self._call("release")

    def stats(self) -> TargetStats:
        """Return the current statistics."""
        raw = self._stats("mgd_target_stats")
        return TargetStats(*(_figure(getattr(raw, field.name)) for field in dataclasses.fields(TargetStats)))
