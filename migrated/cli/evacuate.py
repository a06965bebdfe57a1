"""``migrated evacuate``: migrate all guests of a host away.  The agent does it; this command asks for it and watches."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

import click
from rich.live import Live

from migrated import settings
from migrated.cli import failure, rendering
from migrated.cli.migrations import agent_verb, json_flag, options, print_json
from migrated.client import (
    Client,
    ConfigError,
    ConnectionLostError,
    EvacuateRequest,
    Evacuation,
    EvacuationState,
    HostError,
    MigratedError,
    Move,
    MoveState,
    StartRequest,
)
from migrated.errors import NotFoundError
from migrated.options import DomainOptions, EvacuationOptions, MigrationOptions
from migrated.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.table import Table

_WATCH_SECONDS: Final = 0.5
_COLOURS: Final = {
    MoveState.COMPLETED: "green",
    MoveState.FAILED: "red",
    MoveState.ABORTED: "yellow",
    MoveState.INELIGIBLE: "yellow",
}


class _Targets(click.ParamType[list[str]]):
    """Addresses with commas between them, checked as the agent will check them."""

    name = "host:port,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        field = StartRequest.model_fields["to"]
        try:
            return [settings.parse_argument(field, part.strip()) for part in str(value).split(",")]
        except ConfigError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


@click.command()
@click.option("--to", type=_Targets(), multiple=True, help="Where the target agents listen, separated by commas.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Migrate only these guests: web-*, label=web.")
@click.option("--except", "exclude", multiple=True, metavar="PATTERN", help="Leave these guests here.")
@options(EvacuationOptions)
@options(MigrationOptions)
@options(DomainOptions)
@click.option("--dry-run", is_flag=True, help="Print the plan, and touch nothing.")
@click.option("--no-wait", is_flag=True, help="Print the id of the evacuation, and do not watch it.")
@click.option("--status", "action", flag_value="status", help="Show the last evacuation.")
@click.option("--resume", "action", flag_value="resume", help="Watch the last evacuation again.")
@click.option("--abort", "action", flag_value="abort", help="End the evacuation; guests that have moved stay there.")
@json_flag
@agent_verb
async def evacuate(
    client: Client,
    *,
    to: tuple[list[str], ...],
    dry_run: bool,
    no_wait: bool,
    action: str | None,
    as_json: bool,
    **request: Any,
) -> int:
    """Migrate all guests of this host that can be migrated, and report what became of each.

    The agent does the work. Interrupting this command does not end the evacuation, nor does a restart of the agent.
    --max-bandwidth is for all migrations together.
    """
    given = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in request.items()
        if value not in (None, ())
    }
    if action is not None:
        if to or given or dry_run or no_wait:
            message = f"--{action} takes no other option than --json and --agent"
            raise click.UsageError(message, click.get_current_context())
        return await _act(client, action, as_json=as_json)
    if not to:
        message = "say where to: --to HOST:PORT,… (or --status, --resume, --abort)"
        raise click.UsageError(message, click.get_current_context())
    body = {"to": [address for group in to for address in group], "dry_run": dry_run, **given}
    asked = EvacuateRequest.model_validate(body)
    try:
        evacuation = await client.evacuate(asked)
    except asyncio.CancelledError:
        print("the evacuation may have begun: migrated evacuate --status", file=sys.stderr)
        raise
    if no_wait or dry_run:
        if no_wait and not dry_run and not as_json:
            print(evacuation.id)
        else:
            _show(evacuation, as_json=as_json)
        return _exit_code(evacuation)
    return await _watch(client, evacuation, as_json=as_json)


async def _act(client: Client, action: str, *, as_json: bool) -> int:
    known = await client.evacuations()
    if not known:
        raise NotFoundError("this agent knows of no evacuation", hint="`migrated evacuate --to HOST:PORT,…` begins one")
    evacuation = known[-1]
    if action == "resume":
        return await _watch(client, evacuation, as_json=as_json)
    if action == "abort":
        evacuation = await client.abort_evacuation(evacuation.id)
        if not as_json:
            print(f"{evacuation.id}: {evacuation.state.value}; `migrated evacuate --resume` waits for its end")
            return failure.DONE
    _show(evacuation, as_json=as_json)
    return failure.DONE if action == "abort" else _exit_code(evacuation)


async def _watch(client: Client, evacuation: Evacuation, *, as_json: bool) -> int:
    """Show progress until the evacuation has ended, then its report.  Ctrl-C ends the watching and nothing else."""
    try:
        with _Progress(quiet=as_json) as progress:
            while not evacuation.ended:
                progress.show(evacuation)
                await asyncio.sleep(_WATCH_SECONDS)
                evacuation = await client.evacuation(evacuation.id)
    except asyncio.CancelledError:
        print("no longer watching; the evacuation continues: migrated evacuate --resume", file=sys.stderr)
        raise
    except (HostError, ConnectionLostError) as error:
        raise MigratedError(
            f"the agent stopped during evacuation {evacuation.id}: {error.message}",
            code="agent-stopped",
            hint="start the agent again: it continues; `migrated evacuate --resume` then watches",
        ) from error
    _show(evacuation, as_json=as_json)
    return _exit_code(evacuation)


def _exit_code(evacuation: Evacuation) -> int:
    if evacuation.state is EvacuationState.PLANNED:
        return failure.DONE if all(move.target for move in evacuation.eligible) else failure.FAILED
    codes = {EvacuationState.FAILED: failure.FAILED, EvacuationState.ABORTED: failure.ABORTED}
    return codes.get(evacuation.state, failure.DONE)


# ---------------------------------------------------------------- for people


def _show(evacuation: Evacuation, *, as_json: bool) -> None:
    if as_json:
        print_json(evacuation)
        return
    out = rendering.console()
    if evacuation.state is EvacuationState.PLANNED:
        for target in evacuation.targets:
            pools = "".join(
                f", {pages} pages of {format_size(size)}" for size, pages in sorted(target.pools.items()) if pages
            )
            runs = f"{target.migrations} of {target.max_migrations} migrations"
            print(f"{target.address}: {format_size(target.memory_bytes)} of memory{pools}, {runs}")
    out.print(_table(evacuation))
    for hint in dict.fromkeys(move.error.hint for move in evacuation.guests if move.error is not None):
        if hint:
            out.print(rendering.literal(f"hint: {hint}"), soft_wrap=True)
    for problem in evacuation.problems:
        out.print(rendering.literal(f"{problem.message} [{problem.code}]"), soft_wrap=True)
    print(_summary(evacuation))


def _summary(evacuation: Evacuation) -> str:
    eligible = evacuation.eligible
    rest = len(evacuation.guests) - len(eligible)
    others = f"; {rest} cannot be migrated" if rest else ""
    if evacuation.state is EvacuationState.PLANNED:
        placed = sum(bool(move.target) for move in eligible)
        return f"plan: {placed} of {len(eligible)} guests have a target{others}; nothing was touched"
    done = len(evacuation.moves(MoveState.COMPLETED))
    seconds = (evacuation.ended_at or time.time()) - evacuation.started_at
    return (
        f"evacuation {evacuation.id}: {evacuation.state.value}, {done} of {len(eligible)} guests migrated "
        f"in {format_duration(max(0.0, seconds))}{others}"
    )


def _table(evacuation: Evacuation) -> Table:
    table = rendering.plain_table("GUEST", "MEMORY", "TO", "STATE", "TRIES", "TOOK", "DOWNTIME", "REASON")
    for move in evacuation.guests:
        took = move.ended_at - move.started_at if move.ended_at is not None and move.started_at is not None else None
        table.add_row(
            rendering.literal(move.guest),
            format_size(move.memory_bytes) if move.memory_bytes else "-",
            move.target or "-",
            f"[{_COLOURS.get(move.state, 'cyan')}]{_state(evacuation, move)}[/]",
            str(_tries(move)),
            "-" if took is None else format_duration(max(0.0, took)),
            "-" if move.downtime_seconds is None else format_duration(move.downtime_seconds),
            rendering.literal(f"{move.error.message} [{move.error.code}]" if move.error is not None else "-"),
        )
    return table


def _state(evacuation: Evacuation, move: Move) -> str:
    if evacuation.state is EvacuationState.PLANNED and move.state is MoveState.WAITING:
        return "planned" if move.target else "no target"
    return move.phase or "starting" if move.state is MoveState.MIGRATING else move.state.value


def _tries(move: Move) -> int:
    current = move.state in (MoveState.MIGRATING, MoveState.COMPLETED)
    return sum(attempt.counted for attempt in move.attempts) + current


class _Progress:
    """A live table on a terminal, elsewhere one line on stderr per guest and change.  A context manager."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = rendering.console(stderr=True)
        self._live = None
        self._shown: dict[str, str] = {}
        if self._console.is_terminal and not quiet:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, evacuation: Evacuation) -> None:
        """Show the evacuation as it is now."""
        if self._live is not None:
            self._live.update(_table(evacuation), refresh=True)
        elif not self._quiet:
            for move in evacuation.eligible:
                line = _line(evacuation, move)
                if self._shown.get(move.guest) != line:
                    self._shown[move.guest] = line
                    print(failure.printable(line), file=sys.stderr, flush=True)


def _line(evacuation: Evacuation, move: Move) -> str:
    where = f" to {move.target}" if move.target else ""
    why = f": {move.error.message}" if move.error is not None else ""
    return f"{move.guest}: {_state(evacuation, move)}{where}{why}"
