"""The evacuations of a source agent: one at a time, and the last ones that ended.

`Evacuations.begin` checks everything that can be checked before a guest is touched.  The records are kept like those of
migrations, and the next agent continues an evacuation that has not ended.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
import time
from collections.abc import Sequence
from typing import Final

import structlog

from migrated.agent.evacuation import Evacuation, EvacuationState, Move, MoveState, Target
from migrated.agent.record import ErrorInfo
from migrated.agent.requests import EvacuateRequest, GuestReport, StartRequest
from migrated.agent.table import MigrationTable
from migrated.errors import ConflictError, MigratedError, NotFoundError
from migrated.options import EvacuationOptions
from migrated.protocol.messages import AskedGuest, Capacity
from migrated.recovery.journal import Journal
from migrated.source.evacuation import EvacuationFlow, Mover, ask_all
from migrated.source.migration import SourceMigration
from migrated.source.placement import Load, Room, plan
from migrated.waiting import cancel_and_wait, in_thread

log = structlog.get_logger("migrated.source.evacuation")

DIRECTORY: Final = "evacuations"
#: Evacuations that have ended and are still shown.
_KEEP: Final = 10
_LABEL: Final = "label="


class Evacuations:
    """All evacuations of this agent, oldest first."""

    def __init__(self, mover: Mover, migrations: MigrationTable[SourceMigration]) -> None:
        self._mover = mover
        self._migrations = migrations
        self._journal = Journal(mover.config.state_dir / DIRECTORY, Evacuation)
        self._records: dict[str, Evacuation] = {}
        self._flows: dict[str, EvacuationFlow] = {}  # of those that have not ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._beginning = asyncio.Lock()
        self._saving = asyncio.Lock()

    def records(self) -> list[Evacuation]:
        """Return all evacuations, oldest first."""
        return list(self._records.values())

    def find(self, wanted: str) -> Evacuation:
        """Return one by its id.  Raises NotFoundError."""
        if wanted not in self._records:
            raise NotFoundError(f"no evacuation {wanted!r}", hint="`migrated evacuate --status` shows the last one")
        return self._records[wanted]

    # ------------------------------------------------------------ verbs

    async def begin(self, request: EvacuateRequest) -> Evacuation:
        """Check everything that can be checked without touching a guest; then migrate in the background.

        A dry run ends with the checks, and returns the plan.
        """
        if request.dry_run:
            return await self._prepare(request)
        async with self._beginning:
            for active in (record for record in self._records.values() if not record.ended):
                raise ConflictError(
                    f"evacuation {active.id} is {active.state}",
                    state=active.state.value,
                    code="evacuation-active",
                    hint="`migrated evacuate --resume` watches it, `migrated evacuate --abort` ends it",
                )
            record = await self._prepare(request)
            for move in record.eligible:
                move.target, move.page_size = "", 0
            await in_thread(self._journal.write, record.id, record)
            await self._forget_oldest()
            self._launch(record)
        return record

    async def abort(self, wanted: str) -> Evacuation:
        """Start nothing any more, and abort the migrations that can still be aborted.  Raises ConflictError."""
        record = self.find(wanted)
        flow = self._flows.get(record.id)
        if flow is None:
            raise ConflictError(
                f"evacuation {record.id} is {record.state}: there is nothing to abort", state=record.state.value
            )
        await flow.abort()
        return record

    def leave_out(self, migration_id: str) -> None:
        """Leave the guest of a migration here that the operator has aborted."""
        for flow in self._flows.values():
            flow.leave_out(migration_id)

    # ------------------------------------------------------------ life

    async def take_up(self) -> None:
        """Continue what the previous agent has left."""
        try:
            await in_thread(self._journal.remove_leftovers)
            found = await in_thread(self._journal.load)
        except MigratedError as error:  # no guest depends on it
            log.error("cannot continue evacuations of the previous agent", error=str(error), hint=error.hint)  # noqa: TRY400 - expected
            return
        for record in sorted(found.values(), key=lambda record: record.started_at):
            self._records[record.id] = record
            if not record.ended:
                log.warning("continuing an evacuation after a restart of the agent", evacuation=record.id)
                self._launch(record, taken_up=True)

    async def close(self) -> None:
        """Stop working; the next agent continues."""
        await asyncio.gather(*(cancel_and_wait(task) for task in list(self._tasks)))

    def _launch(self, record: Evacuation, *, taken_up: bool = False) -> None:
        self._records[record.id] = record
        flow = self._flows[record.id] = EvacuationFlow(
            record,
            mover=self._mover,
            migrations=self._migrations,
            save=self._save,
            taken_up=taken_up,
        )
        task = asyncio.ensure_future(self._run(flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, flow: EvacuationFlow) -> None:
        try:
            await flow.run()
        except Exception as error:
            log.exception("unexpected error in an evacuation: this is a bug", evacuation=flow.record.id)
            flow.record.state, flow.record.ended_at = EvacuationState.FAILED, time.time()
            flow.record.problems = [*flow.record.problems, ErrorInfo.of(error)]
            await self._save(flow.record)
        self._flows.pop(flow.record.id, None)

    async def _save(self, record: Evacuation) -> None:
        try:
            async with self._saving:  # by the flow and by a verb at the same time
                await in_thread(self._journal.write, record.id, record)
        except MigratedError as error:  # then the next agent knows less, and `start` still refuses to do anything twice
            log.warning("cannot save an evacuation", evacuation=record.id, error=str(error))

    async def _forget_oldest(self) -> None:
        for old in list(self._records)[:-_KEEP]:
            try:
                await in_thread(self._journal.remove, old)
            except OSError as error:
                log.warning("cannot remove an old evacuation", evacuation=old, error=str(error))
            else:
                del self._records[old]

    # ------------------------------------------------------------ before anything is touched

    async def _prepare(self, request: EvacuateRequest) -> Evacuation:
        """Find the guests, ask the targets, and plan.  Raises whatever makes the evacuation pointless."""
        survey = await self._mover.survey()
        moves = self._choose(survey.guests, request)
        able = [move for move in moves if move.state is MoveState.WAITING]
        if not able:
            reasons = "; ".join(f"{move.guest}: {move.error.message}" for move in moves if move.error is not None)
            raise ConflictError(
                f"no guest can be migrated: {reasons or 'there is none'}",
                code="no-eligible-guest",
                hint="`migrated guests` lists the guests of this host",
            )
        given = request.model_fields_set
        defaults, chosen = self._mover.config.evacuation, {}
        for name in EvacuationOptions.model_fields:
            chosen[name] = getattr(request if name in given else defaults, name)
        record = Evacuation(
            id=os.urandom(8).hex(),
            state=EvacuationState.PLANNED if request.dry_run else EvacuationState.RUNNING,
            order=chosen["order"],
            parallel=chosen["parallel"],
            parallel_per_target=chosen["parallel_per_target"],
            max_attempts=chosen["attempts"],
            patience_seconds=chosen["patience"],
            max_bandwidth_bytes_per_second=request.max_bandwidth if "max_bandwidth" in given else 0,
            options=request.model_dump(
                mode="json", include=(given & StartRequest.model_fields.keys()) - {"to", "max_bandwidth"}
            ),
            targets=[Target(address=str(target)) for target in request.to],
            guests=moves,
            problems=survey.problems,
        )
        await self._plan(record, able)
        return record

    async def _plan(self, record: Evacuation, able: Sequence[Move]) -> None:
        """Ask the targets, and note in each guest where it would go."""
        names = [move.guest for move in able]
        asked = [AskedGuest(move.guest, move.driver) for move in able]
        answers = await ask_all(record.targets, asked, self._mover.dial_terms)
        rooms = []
        for address, answer in answers.items():
            if not isinstance(answer, Capacity):
                raise answer
            rooms.append(Room.of(address, answer, names))
        places = plan([Load(move.guest, move.memory_bytes, move.priority) for move in able], rooms, record.order)
        by_name = {move.guest: move for move in able}
        for place in places:
            move = by_name[place.guest]
            move.target, move.page_size, move.reserved = place.target, place.page_bytes, place.reserved
            move.error = place.error
        errors = [place.error for place in places if place.error is not None]
        if len(errors) == len(places):
            error = errors[0]
            others = f" (and {len(errors) - 1} more guests)" if errors[1:] else ""
            raise ConflictError(
                f"no target can take any guest: {error.message}{others}", code=error.code, hint=error.hint
            )
        others_last = [move for move in record.guests if move.guest not in by_name]
        record.guests = [*(by_name[place.guest] for place in places), *others_last]

    def _choose(self, reports: Sequence[GuestReport], request: EvacuateRequest) -> list[Move]:
        """Return the guests that the request names.  Raises NotFoundError for a pattern that names none."""
        moves = [self._move(report) for report in reports]
        for pattern in (*request.only, *request.exclude):
            if not any(_matches(move, pattern) for move in moves):
                raise NotFoundError(
                    f"{pattern!r} names no guest of this host",
                    code="no-guest-matches",
                    hint="`migrated guests` lists them; labels are in [[evacuation.guests]] of the configuration",
                )
        return [
            move
            for move in moves
            if (not request.only or any(_matches(move, pattern) for pattern in request.only))
            and not any(_matches(move, pattern) for pattern in request.exclude)
        ]

    def _move(self, report: GuestReport) -> Move:
        priority, labels = self._mover.config.evacuation.rank(report.name)
        return Move(
            guest=report.name,
            driver=report.driver,
            memory_bytes=report.memory_bytes,
            priority=priority,
            labels=labels,
            state=MoveState.WAITING if report.migratable else MoveState.INELIGIBLE,
            error=report.error,
        )


def _matches(move: Move, pattern: str) -> bool:
    if pattern.startswith(_LABEL):
        return pattern.removeprefix(_LABEL) in move.labels
    return fnmatch.fnmatchcase(move.guest, pattern)
