"""Run the operator's hook: a program that is asked before a phase begins, and told which state a migration has entered.

Its arguments are ``before`` or ``on``, and the phase or state; the migration's record is on its standard input, in JSON.
It may prevent a phase by its exit status, but only phases before COMMIT: afterwards the guest is what matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import msgspec

from migrated.errors import HostError, MigratedError
from migrated.waiting import within

if TYPE_CHECKING:
    from migrated.agent.record import Record, State
    from migrated.config import HooksSection

#: How much of a hook's output an error quotes.
QUOTED_CHARACTERS: Final = 500


class Hooks:
    """The hook of one migration.  It is told of states one at a time, in their order."""

    def __init__(self, section: HooksSection, record: Record, log: Any) -> None:
        self._section = section
        self._record = record
        self._log = log
        self._last: asyncio.Task[None] | None = None  # the newest of the states it is told, which waits for the others

    async def before(self, phase: State) -> bool:
        """Ask, and return True, if the configuration says so.

        Raises HostError ``hook`` if the hook refuses or fails, TimeoutExceededError if it takes too long.
        """
        if phase not in self._section.before:
            return False
        await self._run("before", phase, self._input())
        return True

    def on(self, state: State) -> None:
        """Tell, in the background."""
        if state in self._section.on:
            self._last = asyncio.ensure_future(self._tell(state, self._input(), self._last))

    async def finish(self) -> None:
        """Wait until the hook has been told everything.  Each state has the hook's own limit."""
        if self._last is not None:
            await asyncio.wait({self._last})

    def _input(self) -> bytes:
        return msgspec.json.encode(self._record)

    async def _tell(self, state: State, record: bytes, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            await asyncio.wait({former})
        try:
            await self._run("on", state, record)
        except MigratedError as error:
            self._log.warning("the hook has failed; the migration goes on", error=str(error))

    async def _run(self, when: str, phase: State, record: bytes) -> None:
        program = str(self._section.program)
        what = f"{program} {when} {phase}"
        try:
            process = await asyncio.create_subprocess_exec(
                *(program, when, phase.value),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(f"{what}: {error.strerror}", code="hook", hint="see hooks.program") from error
        try:
            async with within(self._section.timeout, f"{what} to end"):
                output, _ = await process.communicate(record)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode:
            said = output.decode(errors="replace").strip()[-QUOTED_CHARACTERS:]
            raise HostError(
                f"{what} ended with status {process.returncode}: {said or 'it said nothing'}",
                code="hook",
                hint="the hook is the operator's own program: what it said is the reason",
            )
