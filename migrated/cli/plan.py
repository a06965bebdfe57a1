"""``migrated plan``: would this guest's migration be accepted?  The agents are asked, and nothing is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrated.cli import failure
from migrated.cli.migrations import agent_verb, json_flag, options, print_json
from migrated.client import EvacuateRequest, MigratedError, MoveState, StartRequest, parse_address
from migrated.errors import NotFoundError
from migrated.units import format_size

if TYPE_CHECKING:
    from migrated.client import Client, Move, Target


@click.command()
@click.argument("guest")
@options(StartRequest, "to")
@json_flag
@agent_verb
async def plan(client: Client, *, guest: str, to: str, as_json: bool) -> int:
    """Ask both agents whether GUEST could be migrated, without touching anything; exit code 1 if not."""
    answer = await client.evacuate(EvacuateRequest(to=[parse_address(to)], only=[guest], dry_run=True))
    move = next((move for move in answer.guests if move.guest == guest), None)
    if move is None:
        raise NotFoundError(f"no guest {guest!r} runs here", hint="`migrated guests` lists the guests of this host")
    error = move.error or answer.targets[0].error
    if not move.target or move.state is MoveState.INELIGIBLE:
        message = error.message if error is not None else f"{to} has no place for {guest}"
        raise MigratedError(message, code=error.code if error else "no-target", hint=error.hint if error else "")
    if as_json:
        print_json({"guest": move, "target": answer.targets[0]})
    else:
        print(failure.printable(_text(move, answer.targets[0])))
    return failure.DONE


def _text(move: Move, target: Target) -> str:
    pools = "".join(f", {pages} pages of {format_size(size)}" for size, pages in sorted(target.pools.items()) if pages)
    pages = f" in pages of {format_size(move.page_size)}" if move.page_size else ""
    return (
        f"{move.guest} can be migrated to {move.target}: it needs {format_size(move.memory_bytes)}{pages}\n"
        f"{target.address} has {format_size(target.memory_bytes)} of memory{pools} available, "
        f"and runs {target.migrations} of at most {target.max_migrations} migrations\n"
        "nothing was touched; only a migration shows whether the guest can be started there"
    )
