"""``migrated guests``: which guests can be migrated from this host, and why the others cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from migrated.cli import failure, rendering
from migrated.cli.migrations import agent_verb, json_flag, print_json
from migrated.units import format_size

if TYPE_CHECKING:
    from migrated.client import Client, ErrorInfo, GuestReport


@click.command()
@json_flag
@agent_verb
async def guests(client: Client, *, as_json: bool) -> int:
    """List the guests of this host: which can be migrated, and why the others cannot."""
    answer = await client.guests()
    if as_json:
        print_json(answer)
        return failure.DONE
    if answer.guests:
        _print_table(answer.guests)
    else:
        print("no guests")
    for problem in answer.problems:
        _print_problem(problem)
    return failure.DONE


def _print_table(reports: list[GuestReport]) -> None:
    table = rendering.plain_table("GUEST", "DRIVER", "STATE", "MEMORY", "MIGRATABLE", "REASON")
    for report in reports:
        table.add_row(
            rendering.literal(report.name),
            report.driver,
            rendering.literal(report.state or "-"),
            format_size(report.memory_bytes) if report.memory_bytes else "-",
            "[green]yes[/green]" if report.migratable else "[red]no[/red]",
            rendering.literal(_reason(report.error) if report.error is not None else "-"),
        )
    rendering.console().print(table)


def _print_problem(problem: ErrorInfo) -> None:
    """Say in one line why guests may be missing from the list."""
    text = _reason(problem) + (f"; {problem.hint}" if problem.hint else "")
    rendering.console().print(rendering.literal(text), soft_wrap=True)


def _reason(error: ErrorInfo) -> str:
    return f"{error.message} [{error.code}]"
