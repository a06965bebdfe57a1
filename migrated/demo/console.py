"""The serial console of a self-checking guest: its lines read, its commands given, across moves.

A move changes the process that holds the serial port, so a console may be attached to several sockets at a time: before a
migration `attach` the target's too.  Lines from all of them end in one record of what the guest said; commands go to the
socket attached last unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from migrated.errors import GuestError, TimeoutExceededError

_KINDS = ("READY", "LOAD", "SWEPT", "CORRUPT", "FATAL")
_RECONNECT_SECONDS = 0.05
_KEPT_LINES = 2000


class Load(msgspec.Struct, frozen=True):
    """One LOAD line.  ``stall_ms``: longest since the start or `reset`; ``gap_ms``: longest since the line before."""

    seconds: float
    operations: int
    sweeps: int
    errors: int
    stall_ms: float
    gap_ms: float = 0.0
    disk_reads: int = 0
    churns: int = 0


class Swept(msgspec.Struct, frozen=True):
    """One SWEPT line: blocks checked, wrong ones among them, mismatches since the guest's start."""

    blocks: int
    wrong: int
    errors: int


class GuestConsole:
    """What a self-checking guest says and is told.  Every wait takes a limit in seconds and raises TimeoutExceededError."""

    def __init__(self, name: str = "guest") -> None:
        self.name = name
        self.booted = False
        self.lines: list[str] = []  # the last ones, whatever they are
        self.corrupt: list[str] = []  # CORRUPT and FATAL lines: empty in a sound guest
        self._loads = 0
        self._load: Load | None = None
        self._swept: Swept | None = None
        self._changed = asyncio.Condition()
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._current = ""

    async def attach(self, path: Path | str, limit_seconds: float = 10) -> None:
        """Connect to a Unix socket (``-serial unix:PATH,server=on,wait=off``), waiting for it to come up."""
        try:
            async with asyncio.timeout(limit_seconds):
                while True:
                    try:
                        reader, writer = await asyncio.open_unix_connection(str(path))
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(_RECONNECT_SECONDS)
        except TimeoutError:
            message = f"{self.name}: no serial console at {path} within {limit_seconds:g} s"
            raise TimeoutExceededError(message) from None
        self.attach_streams(str(path), reader, writer)

    def attach_streams(self, key: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use pipes that are there already (a process guest's standard input and output)."""
        if (former := self._writers.get(key)) is not None:
            former.close()  # a guest that came back to a host listens on the path of its earlier stay
        self._writers[key] = writer
        self._current = key
        task = asyncio.create_task(self._read(reader), name=f"console {self.name}")
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    async def wait_booted(self, limit_seconds: float = 60) -> None:
        """Until the load has filled its memory and runs."""
        await self._wait(lambda: self.booted, limit_seconds, "the load to start")

    async def stats(self, limit_seconds: float = 30) -> Load:
        """The next LOAD line: a figure from after the call, which also says that the guest runs."""
        seen = self._loads
        await self._wait(lambda: self._loads > seen, limit_seconds, "a line from the running load")
        if self._load is None:  # for the type checker: _loads counts them
            raise AssertionError
        return self._load

    async def wait_for(self, condition: Callable[[Load], bool], limit_seconds: float, what: str) -> Load:
        """The first LOAD line that fits."""
        await self._wait(lambda: self._load is not None and condition(self._load), limit_seconds, what)
        if self._load is None:
            raise AssertionError
        return self._load

    async def sweep(self, limit_seconds: float = 120) -> Swept:
        """Have the guest check all its memory now."""
        self._swept = None
        await self.command("sweep")
        await self._wait(lambda: self._swept is not None, limit_seconds, "the end of a sweep")
        return self._last_sweep()

    def _last_sweep(self) -> Swept:
        if self._swept is None:
            raise AssertionError
        return self._swept

    async def verified(self, limit_seconds: float = 120) -> bool:
        """A sweep now; whether neither it nor any check before found anything wrong."""
        swept = await self.sweep(limit_seconds)
        return swept.wrong == 0 and swept.errors == 0 and not self.corrupt

    async def command(self, text: str, key: str | None = None) -> None:
        """Send a line: ``sweep``, ``reset``, ``quit``."""
        writer = self._writers.get(key if key is not None else self._current)
        if writer is None:
            message = f"{self.name}: no console is attached"
            raise GuestError(message)
        try:
            writer.write(text.encode() + b"\n")
            await writer.drain()
        except OSError as error:
            message = f"{self.name}: the console is gone: {error}"
            raise GuestError(message) from None

    async def close(self) -> None:
        """Let go of every socket; the guest does not mind."""
        for task in list(self._readers):
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for writer in self._writers.values():
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._writers.clear()

    async def _wait(self, condition: Callable[[], bool], limit_seconds: float, what: str) -> None:
        def settled() -> bool:
            return condition() or any(line.startswith("FATAL") for line in self.corrupt)

        try:
            async with asyncio.timeout(limit_seconds), self._changed:
                await self._changed.wait_for(settled)
        except TimeoutError:
            tail = " | ".join(self.lines[-5:])
            message = f"{self.name}: waited {limit_seconds:g} s for {what}; last heard: {tail or 'nothing'}"
            raise TimeoutExceededError(message) from None
        if not condition():
            message = f"{self.name}: waited for {what}, heard: {self.corrupt[-1]}"
            raise GuestError(message)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                continue  # a line longer than the stream's limit: not one of ours
            except OSError:
                return
            if not line:
                return
            async with self._changed:
                self._take(line.decode(errors="replace").strip())
                self._changed.notify_all()

    def _take(self, text: str) -> None:
        self.lines.append(text)
        del self.lines[:-_KEPT_LINES]
        kind, _, rest = text.partition(" ")
        if kind not in _KINDS:
            return
        if kind in ("CORRUPT", "FATAL"):
            self.corrupt.append(text)
            return
        try:
            fields: dict[str, Any] = json.loads(rest)
            if kind == "READY":
                self.booted = True
            elif kind == "LOAD":
                self._load = msgspec.convert(fields, Load, strict=False)
                self._loads += 1
            else:
                self._swept = msgspec.convert(fields, Swept)
        except (ValueError, msgspec.ValidationError):
            return  # cut short by the move: the next one is whole
