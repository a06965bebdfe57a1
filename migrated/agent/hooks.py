"""Run the operator's hook: a program that is asked before a phase begins, and told which state a migration has entered.

Its arguments are ``before`` or ``on``, and the phase or state; the migration's record is on its standard input, in JSON.
It may prevent a phase by its exit status, but only phases before COMMIT: afterwards the guest is what matters.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec

from migrated import programs
from migrated.errors import HostError, MigratedError, TimeoutExceededError

if TYPE_CHECKING:
    from migrated.agent.record import Record, State
    from migrated.config import HooksSection

#: How much of each of a hook's outputs an error quotes.
QUOTED_BYTES: Final = 500


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
        limit = self._section.timeout
        try:
            ended = await programs.run(
                [program, when, phase.value], record, limit_seconds=limit, output_bytes=QUOTED_BYTES
            )
        except TimeoutError as error:
            raise TimeoutExceededError(
                f"waited {limit:g} s for {what} to end", hint="make it faster, or raise hooks.timeout"
            ) from error
        except OSError as error:
            raise HostError(f"{what}: {error.strerror}", code="hook", hint="see hooks.program") from error
        if ended.status:
            said = (ended.output + ended.complaint).decode(errors="replace").strip()
            raise HostError(
                f"{what} ended with status {ended.status}: {said or 'it said nothing'}",
                code="hook",
                hint="the hook is the operator's own program: what it said is the reason",
            )
