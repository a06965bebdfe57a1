"""Read the lines of a self-checking guest's serial console and send it commands, across migrations.

A migration changes the process that holds the serial port, so a console may be attached to several sockets at a time:
`attach` the target's too before a migration.  Lines from all of them form one record of what the guest wrote.  Commands
go to the socket attached last unless a call names another.
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
    """One LOAD line.

    ``stall_ms``: longest stall since the start or `reset`; ``gap_ms``: longest since the line before.
    """

    seconds: float
    operations: int
    sweeps: int
    errors: int
    stall_ms: float
    gap_ms: float = 0.0
    disk_reads: int = 0
    churns: int = 0


class Swept(msgspec.Struct, frozen=True):
    """One SWEPT line: blocks checked, wrong blocks among them, mismatches since the guest's start."""

    blocks: int
    wrong: int
    errors: int


class GuestConsole:
    """The console of a self-checking guest.  Every wait has a limit in seconds and raises TimeoutExceededError."""

    def __init__(self, name: str = "guest") -> None:
        self.name = name
        self.booted = False
        self.lines: list[str] = []  # the last lines of any kind
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
        """Use existing pipes (a process guest's standard input and output)."""
        if (former := self._writers.get(key)) is not None:
            former.close()  # a guest that came back to a host listens on the path of its earlier stay
        self._writers[key] = writer
        self._current = key
        task = asyncio.create_task(self._read(reader), name=f"console {self.name}")
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    async def wait_booted(self, limit_seconds: float = 60) -> None:
        """Wait until the load has filled its memory and runs."""
        await self._wait(lambda: self.booted, limit_seconds, "the load to start")

    async def stats(self, limit_seconds: float = 30) -> Load:
        """Return the next LOAD line: its figures are newer than the call, and it proves that the guest runs."""
        seen = self._loads
        await self._wait(lambda: self._loads > seen, limit_seconds, "a line from the running load")
        if self._load is None:  # for the type checker: _loads counts them
            raise AssertionError
        return self._load

    async def wait_for(self, condition: Callable[[Load], bool], limit_seconds: float, what: str) -> Load:
        """Return the first LOAD line that meets the condition."""
        await self._wait(lambda: self._load is not None and condition(self._load), limit_seconds, what)
        if self._load is None:
            raise AssertionError
        return self._load

    async def sweep(self, limit_seconds: float = 120) -> Swept:
        """Have the guest check all its memory now; return the result."""
        self._swept = None
        await self.command("sweep")
        await self._wait(lambda: self._swept is not None, limit_seconds, "the end of a sweep")
        return self._last_sweep()

    def _last_sweep(self) -> Swept:
        if self._swept is None:
            raise AssertionError
        return self._swept

    async def verified(self, limit_seconds: float = 120) -> bool:
        """Sweep now; return whether neither this sweep nor any earlier check found a mismatch."""
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
        """Close every socket; this does not affect the guest."""
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
                continue  # a line longer than the stream's limit is not the load's
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
            return  # the migration cut this line short: the next one is whole
