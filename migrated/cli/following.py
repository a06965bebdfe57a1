"""Wait for the end of a migration: with its progress, a time limit, and a question on ^C.

Whatever ends the waiting, the migration goes on, unless the user asked for something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from migrated.cli import failure
from migrated.cli.failure import WaitTimedOutError
from migrated.cli.progress import Progress
from migrated.client import RemoteError, SetRequest, State
from migrated.waiting import cancel_and_wait

if TYPE_CHECKING:
    from migrated.client import Client, Record

OnTimeout = Literal["abort", "postcopy", "pause"]
#: The longest downtime limit that an agent takes: whatever is left is sent while the guest is paused.
_PAUSE: Final = SetRequest(downtime_limit_ms=60_000)
_QUESTION: Final = "Abort it (a), leave it running (l), or continue waiting (c)? [c]"


class Following:
    """One wait.  ``ask``: on a terminal, ^C asks what to do."""

    def __init__(
        self,
        client: Client,
        record: Record,
        *,
        quiet: bool = False,
        timeout_seconds: float | None = None,
        on_timeout: OnTimeout | None = None,
        ask: bool = False,
    ) -> None:
        self.record = record
        self._client = client
        self._progress = None if quiet else Progress()
        self._timeout_seconds = timeout_seconds
        self._on_timeout = on_timeout
        self._ask = ask and sys.stdin.isatty() and sys.stderr.isatty()
        self._interrupted = asyncio.Event()

    async def run(self) -> Record | None:
        """Return the record of the migration once it has ended; None if the user left it running.

        Raises WaitTimedOutError, and what the connection to the agent raises.
        """
        with self._progress or contextlib.nullcontext(), self._signals():
            reading = asyncio.ensure_future(self._read())
            try:
                return self.record if await self._until(reading) else None
            except asyncio.CancelledError:
                self._say_goodbye()
                raise
            finally:
                await cancel_and_wait(reading)

    async def _read(self) -> None:
        async for latest in self._client.events(self.record.id):
            self.record = latest
            if self._progress is not None:
                self._progress.show(latest)

    async def _until(self, reading: asyncio.Future[None]) -> bool:
        loop = asyncio.get_running_loop()
        limit = None if self._timeout_seconds is None else loop.time() + self._timeout_seconds
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        try:
            while True:
                left = None if limit is None else max(0.0, limit - loop.time())
                both: set[asyncio.Future[Any]] = {reading, interrupted}
                await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    reading.result()
                    return True
                if interrupted.done():
                    if not await self._asked(reading):
                        return False
                    interrupted = asyncio.ensure_future(self._interrupted.wait())
                elif limit is not None and loop.time() >= limit:
                    limit = None
                    await self._timed_out()
        finally:
            interrupted.cancel()

    # ------------------------------------------------------------ time limit

    async def _timed_out(self) -> None:
        limit = f"{self._timeout_seconds:g} s"
        if self._on_timeout is None:
            message = f"migration {self.record.id} of {self.record.guest} has not ended after {limit}"
            raise WaitTimedOutError(message, hint="it continues; `migrated status` shows its progress")
        if self._on_timeout == "abort":
            self._say(f"not ended after {limit}: aborting")
            await self._order(self._client.abort(self.record))
        elif self.record.state in (State.SETUP, State.PRECOPY):
            self._say(f"pre-copy has not ended after {limit}: switching over ({self._on_timeout})")
            if self._on_timeout == "pause":
                await self._order(self._client.set(self.record, _PAUSE))
            await self._order(self._client.switchover(self.record))

    async def _order(self, verb: Awaitable[Record]) -> None:
        try:
            await verb
        except RemoteError as error:
            if error.status != 409:
                raise
            self._say(f"{error.message}: waiting for its end")  # it had gone too far

    # ------------------------------------------------------------ ^C

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        if self._ask:
            loop.add_signal_handler(signal.SIGINT, self._interrupted.set)
        try:
            yield
        finally:
            if self._ask:
                loop.remove_signal_handler(signal.SIGINT)

    async def _asked(self, reading: asyncio.Future[None]) -> bool:
        """Ask what to do; return False to leave the migration running."""
        if self._progress is not None:
            self._progress.pause()
        answer = await self._answer(reading)
        if answer == "l":
            self._say_goodbye()
            return False
        if answer == "a":
            await self._order(self._client.abort(self.record))
        if self._progress is not None:
            self._progress.resume()
        return True

    async def _answer(self, reading: asyncio.Future[None]) -> str:
        """Return a, l or c; l after a second ^C, c if the migration ends meanwhile.

        The loop reads the terminal: a ^C that comes just before a blocking read would not end it.
        """
        loop = asyncio.get_running_loop()
        self._say(f"\n{self.record.guest} is {self.record.state.value}.")
        self._interrupted.clear()
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        try:
            while True:
                line: asyncio.Future[bytes] = loop.create_future()
                loop.add_reader(sys.stdin.fileno(), _read_line, line)
                self._say(_QUESTION)
                either: set[asyncio.Future[Any]] = {line, interrupted, reading}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if interrupted.done():
                    return "l"
                if reading.done():
                    return "c"
                if not line.result():  # the end of its input
                    return "l"
                answer = line.result().decode(errors="replace").strip().lower()[:1] or "c"
                if answer in "alc":
                    return answer
        finally:
            loop.remove_reader(sys.stdin.fileno())
            interrupted.cancel()
            self._interrupted.clear()

    def _say_goodbye(self) -> None:
        self._say(f"no longer watching; the migration continues: migrated wait {self.record.id}")

    @staticmethod
    def _say(text: str) -> None:
        print(failure.printable(text), file=sys.stderr, flush=True)


def _read_line(line: asyncio.Future[bytes]) -> None:
    if not line.done():
        line.set_result(os.read(sys.stdin.fileno(), 1024))
