"""``migrated check`` and ``migrated inspect``: what this host and a process on it can do; no agent is needed for either."""

from __future__ import annotations

import dataclasses
import platform
from typing import TYPE_CHECKING, Any, Final

import click

from migrated.cli import failure, rendering
from migrated.cli.migrations import json_flag, print_json
from migrated.units import format_size

if TYPE_CHECKING:
    from migrated.memory.maps import Area, MemoryFile
    from migrated.memory.probe import Requirement

#: Private memory below this is a program's own, not a guest's.
_PRIVATE_LEAST_BYTES: Final = 16 << 20


@click.command()
@click.option("--role", type=click.Choice(["source", "target"]), help="Only what this agent needs.")
@json_flag
def check(*, role: str | None, as_json: bool) -> int:
    """Say whether this host can do it: each failing need with its fix."""
    from migrated.memory.probe import requirements  # loads the C core

    needs = [need for need in requirements() if role is None or need.role in ("both", role)]
    ok = all(need.ok for need in needs if need.needed)
    if as_json:
        print_json({"ok": ok, "kernel": platform.release(), "requirements": [dataclasses.asdict(one) for one in needs]})
    else:
        _print_needs(needs)
    return failure.DONE if ok else failure.FAILED


def _print_needs(needs: list[Requirement]) -> None:
    table = rendering.plain_table("", "NEED", "FOR", "FOUND")
    for need in needs:
        table.add_row(_mark(need), need.name, need.role, need.found)
    out = rendering.console()
    out.print(table)
    for need in needs:
        if not need.ok:
            kind = "fix" if need.needed else "for more"
            out.print(f"{kind}: {need.name}: {need.fix}", markup=False, soft_wrap=True)


def _mark(need: Requirement) -> str:
    if need.ok:
        return "[green]ok[/green]"
    return "[red]FAILS[/red]" if need.needed else "[yellow]without[/yellow]"


@click.command()
@click.argument("pid", type=click.IntRange(min=1))
@json_flag
def inspect(*, pid: int, as_json: bool) -> int:
    """Say which memory of process PID can be moved, and what stands in the way of the rest."""
    from migrated.memory import maps

    files = maps.inspect(pid)
    private = _private(maps.areas(pid))
    rows = [_row(one) for one in files]
    if private:
        problem = "private: not in a file that an agent can open; start the guest with shared memory (QEMU: share=on)"
        row = {"file": "(private memory)", "size_bytes": private, "page_bytes": 4096, "shared": False}
        rows.append({**row, "movable": False, "reason": problem})
    movable = any(row["movable"] for row in rows)
    if as_json:
        print_json({"pid": pid, "command": maps.command(pid), "movable": movable, "memory": rows})
    else:
        print(f"{maps.command(pid)} (process {pid})")
        _print_rows(rows)
    return failure.DONE if movable else failure.FAILED


def _row(file: MemoryFile) -> dict[str, Any]:
    return {
        "file": file.path,
        "size_bytes": file.size_bytes,
        "page_bytes": file.page_bytes,
        "shared": True,
        "movable": not file.problem,
        "reason": file.problem,
    }


def _private(areas: list[Area]) -> int:
    """Bytes of large private writable areas without a file: where a VMM without share=on keeps its guest."""
    return sum(
        area.length_bytes
        for area in areas
        if not area.shared
        and area.permissions[1] == "w"
        and not area.inode
        and area.length_bytes >= _PRIVATE_LEAST_BYTES
    )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no memory that could be a guest's")
        return
    table = rendering.plain_table("MOVABLE", "SIZE", "PAGES", "SHARED", "FILE", "REASON")
    for row in rows:
        table.add_row(
            "[green]yes[/green]" if row["movable"] else "[red]no[/red]",
            format_size(row["size_bytes"]),
            format_size(row["page_bytes"]),
            "yes" if row["shared"] else "no",
            rendering.literal(row["file"]),
            rendering.literal(row["reason"] or "-"),
        )
    rendering.console().print(table)
