"""A guest to try things with: ``python -m migrated.demo.example``.  It checks its memory as it writes it.

It has the same blocks (index, counter, inverse of the counter, a fill), lines and commands as the other test guests, on
standard output and input or on a Unix socket (``--console``).  It is pure Python and so slow: the C example
(native/examples/) does the same a hundred times faster, with several threads.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import select
import socket
import struct
import sys
import time
from pathlib import Path

from migrated.guests.process.client import GuestClient, MovedAwayError

BLOCK_BYTES = 4096
PATTERNS = ("sparse", "hot", "dense", "idle")
_HEAD = struct.Struct("<QQQ")
_MASK = (1 << 64) - 1
_REPORT_SECONDS = 0.5
_TURN_SECONDS = 0.005


class Load:
    """The blocks of some regions, and what each of them must hold."""

    def __init__(self, memory: list[mmap.mmap], *, pattern: str, seed: int) -> None:
        self._memory = memory
        self._per_region = [len(piece) // BLOCK_BYTES for piece in memory]
        self.blocks = sum(self._per_region)
        self.expected = bytearray(4 * self.blocks)
        self.pattern = pattern
        self.operations = self.sweeps = self.errors = 0
        self._random = random.Random(seed)  # noqa: S311 - a load, not a secret
        self._next = 0
        self._cursor = 0

    def _place(self, index: int) -> tuple[mmap.mmap, int]:
        for piece, count in zip(self._memory, self._per_region, strict=True):
            if index < count:
                return piece, index * BLOCK_BYTES
            index -= count
        raise IndexError(index)

    @staticmethod
    def content(index: int, counter: int) -> bytes:
        """Return what block ``index`` holds after its ``counter``-th write."""
        fill = struct.pack("<Q", (index + 1) * 0x9E3779B97F4A7C15 + counter * 0xD6E8FEB86659FD93 & _MASK)
        return _HEAD.pack(index, counter, ~counter & _MASK) + fill * ((BLOCK_BYTES - _HEAD.size) // 8)

    def fill(self) -> None:
        """Write every block for the first time."""
        for index in range(self.blocks):
            piece, at = self._place(index)
            piece[at : at + BLOCK_BYTES] = self.content(index, 0)

    def _counter(self, index: int) -> int:
        return int.from_bytes(self.expected[4 * index : 4 * index + 4], "little")

    def check(self, index: int) -> bool:
        """Whether the block is correct; reports the first one that is not."""
        piece, at = self._place(index)
        found = piece[at : at + BLOCK_BYTES]
        counter = self._counter(index)
        if found == self.content(index, counter):
            return True
        self.errors += 1
        if self.errors == 1:
            had = _HEAD.unpack_from(found)
            sys.stdout.write(f"CORRUPT {json.dumps({'block': index, 'counter': counter, 'found': had})}\n")
            sys.stdout.flush()
        return False

    def operate(self) -> None:
        """Check the block that the pattern chooses, and write its next counter."""
        if self.pattern == "dense":
            index, self._next = self._next, (self._next + 1) % self.blocks
        elif self.pattern == "hot" and self._random.random() < 0.9:
            index = self._random.randrange(max(1, self.blocks // 64))
        else:
            index = self._random.randrange(self.blocks)
        self.check(index)
        counter = self._counter(index) + 1
        self.expected[4 * index : 4 * index + 4] = counter.to_bytes(4, "little")
        piece, at = self._place(index)
        piece[at : at + BLOCK_BYTES] = self.content(index, counter)
        self.operations += 1

    def sweep(self) -> int:
        """Check all blocks; return how many were wrong."""
        wrong = sum(not self.check(index) for index in range(self.blocks))
        self.sweeps += 1
        return wrong

    def sweep_some(self, count: int) -> None:
        """Check the next blocks of a sweep that never ends."""
        for _ in range(count):
            self.check(self._cursor)
            self._cursor += 1
            if self._cursor == self.blocks:
                self._cursor = 0
                self.sweeps += 1

    def save(self) -> bytes:
        """Return the state that is not in the memory."""
        head = struct.pack("<QQQQ", self.operations, self.sweeps, self.errors, self._next)
        return head + bytes(self.expected)

    def restore(self, data: bytes) -> None:
        """Restore what `save` returned."""
        if len(data) != 32 + len(self.expected):
            raise ValueError("the state is that of another load")
        self.operations, self.sweeps, self.errors, self._next = struct.unpack_from("<QQQQ", data)
        self.expected[:] = data[32:]


class Console:
    """Writes lines and reads commands: standard streams, or whoever is connected to a Unix socket."""

    def __init__(self, path: str | None) -> None:
        self._listener: socket.socket | None = None
        self._peer: socket.socket | None = None
        self._input = b""
        self._ready = b""  # sent again to whoever connects later
        if path is not None:
            Path(path).unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self._listener.listen(1)
            self._listener.setblocking(False)

    def say(self, kind: str, **fields: float) -> None:
        """Write one line; it is lost if nobody listens or reads."""
        line = f"{kind} {json.dumps(fields)}\n"
        if kind == "READY":
            self._ready = line.encode()
        if self._listener is None:
            sys.stdout.write(line)
            sys.stdout.flush()
        elif self._peer is not None:
            try:
                self._peer.send(line.encode())
            except OSError:
                self._peer = None

    def commands(self, wait_seconds: float) -> list[str]:
        """Return the commands that have arrived, after a short wait for the first."""
        watched: list[int] = [0] if self._listener is None else [self._listener.fileno()]
        if self._peer is not None:
            watched.append(self._peer.fileno())
        ready, _, _ = select.select(watched, [], [], wait_seconds)
        if self._listener is not None and self._listener.fileno() in ready:
            self._peer, _ = self._listener.accept()
            self._peer.setblocking(False)
            self._peer.send(self._ready)
            return []
        if not ready:
            return []
        try:
            data = os.read(ready[0], 4096)
        except OSError:
            data = b""
        if not data and self._peer is not None:
            self._peer = None
        elif not data:
            time.sleep(wait_seconds)  # standard input has ended: no more commands will come
        *lines, self._input = (self._input + data).split(b"\n")
        return [line.decode(errors="replace").strip() for line in lines]


def run(client: GuestClient, load: Load, console: Console, *, rate: int) -> None:
    """Work until the guest has moved away or a command tells it to quit."""
    client.safe_point()
    if not client.incoming:
        load.fill()
    console.say("READY", blocks=load.blocks)
    started = last = reported = time.monotonic()
    stall = gap = 0.0
    written = 0
    while True:
        client.safe_point()
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        stall = max(stall, gap)
        if load.pattern != "idle":
            due = int((now - started) * rate)
            written = max(written, due - rate // 20)  # do not catch up on writes that a pause prevented
            while written < due and time.monotonic() - now < _TURN_SECONDS:
                load.operate()
                written += 1
            load.sweep_some(2)
        if now - reported >= _REPORT_SECONDS:
            reported = now
            console.say(
                "LOAD",
                seconds=round(now - started, 3),
                operations=load.operations,
                sweeps=load.sweeps,
                errors=load.errors,
                stall_ms=round(stall * 1000, 3),
                gap_ms=round(gap * 1000, 3),
            )
            gap = 0.0
        for command in console.commands(_TURN_SECONDS / 2):
            if command == "sweep":
                console.say("SWEPT", blocks=load.blocks, wrong=load.sweep(), errors=load.errors)
                last = time.monotonic()
            elif command == "reset":
                stall = gap = 0.0
            elif command == "quit":
                return


def main() -> int:
    """Run the guest from the command line."""
    parser = argparse.ArgumentParser(prog="python -m migrated.demo.example", description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="MiB of memory (default 64)")
    parser.add_argument("--regions", type=int, default=1, help="number of regions (default 1)")
    parser.add_argument("--rate", type=int, default=1000, help="blocks written a second (default 1000)")
    parser.add_argument("--pattern", choices=PATTERNS, default="sparse")
    parser.add_argument("--console", metavar="SOCKET", help="talk on this Unix socket, not on standard streams")
    options = parser.parse_args()
    names = ["ram"] if options.regions == 1 else [f"ram{index}" for index in range(options.regions)]
    each = (options.size << 20) // options.regions
    client = GuestClient(dict.fromkeys(names, each))
    console = Console(options.console)
    client.connect()
    load = Load([client.memory[name] for name in names], pattern=options.pattern, seed=os.getpid())
    client.start(save=load.save, restore=load.restore)
    try:
        run(client, load, console, rate=options.rate)
    except MovedAwayError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
