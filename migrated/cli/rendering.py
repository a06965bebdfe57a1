"""Render records for people: tables and a summary.

Programs get the records as JSON instead.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrated.cli.failure import printable
from migrated.client import AgentStatus, Record, State
from migrated.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

_COLOURS = {State.COMPLETED: "green", State.FAILED: "red", State.ABORTED: "yellow", State.POSTCOPY_PAUSED: "yellow"}


def console(*, stderr: bool = False) -> Console:
    """Return a console: colours on a terminal only, and never fewer than 80 columns in a pipe."""
    out = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not out.is_terminal:
        out.width = 200
    return out


def plain_table(*columns: str) -> Table:
    """Return a table without lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def literal(text: str) -> Text:
    """Return text in which rich sees no markup and the terminal no control sequences."""
    return Text(printable(text))


def state_text(record: Record) -> Text:
    """Return the state in its colour."""
    return Text(record.state.value, style=_COLOURS.get(record.state, "cyan"))


def progress_percent(record: Record) -> float:
    """Return the percentage of the guest's memory that is up to date on the target."""
    if record.state is State.COMPLETED:
        return 100.0
    if not record.total_bytes:
        return 0.0
    return 100.0 * (record.total_bytes - min(record.remaining_bytes, record.total_bytes)) / record.total_bytes


def eta_seconds(record: Record) -> float | None:
    """Return the time left at the present rate less the guest's writes; None if it never ends."""
    pace = record.throughput_bytes_per_second
    if record.state is State.PRECOPY:
        pace -= record.dirty_bytes_per_second
    return record.remaining_bytes / pace if pace > 0 else None


def short_id(record: Record) -> str:
    """Return enough of the id for people to name the migration; commands take any unique prefix."""
    return record.id[:12]


def migrations_table(records: Iterable[Record]) -> Table:
    """Return a table with one line per migration."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("ID", "GUEST", "ROLE", "STATE", "MODE", "PEER"):
        table.add_column(name, no_wrap=True)
    for name in ("DONE", "MOVED", "RATE", "DOWNTIME", "TOOK"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("STARTED", no_wrap=True)
    for record in records:
        table.add_row(
            short_id(record),
            record.guest,
            record.role,
            state_text(record),
            record.mode,
            record.peer or "-",
            f"{progress_percent(record):.0f} %",
            format_size(record.transferred_bytes),
            "-" if record.ended else format_rate(record.throughput_bytes_per_second),
            _downtime(record),
            format_duration(record.ended_at - record.started_at) if record.ended_at is not None else "-",
            _clock(record.started_at),
        )
    return table


def summary(record: Record) -> Table:
    """Return a table of everything about a finished (or running) migration."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    table.add_row("migration", record.id)
    table.add_row("guest", f"{record.guest} ({record.driver})" if record.driver else record.guest)
    table.add_row("state", state_text(record))
    table.add_row("mode", record.mode)
    if record.peer:
        table.add_row("to" if record.role == "source" else "from", record.peer)
    if record.total_bytes:
        table.add_row("memory", f"{format_size(record.total_bytes)} in pages of {format_size(record.page_size)}")
    for name, value in _figures(record):
        table.add_row(name, value)
    if record.error is not None:
        table.add_row("error", literal(f"{record.error.message} [{record.error.code}]"), style="red")
        if record.error.hint:
            table.add_row("hint", literal(record.error.hint))
    if record.timeline:
        steps = (
            f"{step.state.value} +{format_duration(max(0.0, step.at - record.started_at))}" for step in record.timeline
        )
        table.add_row("time line", ", ".join(steps))
    return table


def _figures(record: Record) -> list[tuple[str, str]]:
    figures = [("moved", f"{format_size(record.transferred_bytes)} in {record.round} rounds")]
    if not record.ended:
        figures.append(
            ("up to date", f"{progress_percent(record):.1f} %, {format_size(record.remaining_bytes)} remain")
        )
        figures.append(("throughput", format_rate(record.throughput_bytes_per_second)))
        figures.append(("changing", format_rate(record.dirty_bytes_per_second)))
    if record.ended_at is not None:
        figures.append(("took", format_duration(record.ended_at - record.started_at)))
    figures.append(("downtime", _downtime(record)))
    if record.downtime_seconds is not None and record.downtime_breakdown:
        steps = ", ".join(f"{step} {1e3 * seconds:.1f}" for step, seconds in record.downtime_breakdown.items())
        figures.append(("its steps", f"{steps} ms"))
    faults = record.faults
    if total := faults.current + faults.stale + faults.missing:
        kinds = f"{faults.current} current, {faults.stale} stale, {faults.missing} missing"
        figures.append(("faults", f"{total}: {kinds}"))
        latency = record.fault_seconds
        text = f"p50 {format_duration(latency.p50)}, p99 {format_duration(latency.p99)}, max {format_duration(latency.max)}"
        figures.append(("answered in", text))
    return figures


def agent_line(about: AgentStatus) -> str:
    """Return one line about the agent and its health."""
    state = "unhealthy" if not about.healthy else "ready" if about.ready else "not ready"
    reasons = "; ".join([*about.reasons, *(about.certificate.problems if about.certificate else [])])
    return f"{about.role} {about.name}, version {about.version}: {state}" + (f" ({reasons})" if reasons else "")


def _downtime(record: Record) -> str:
    return "-" if record.downtime_seconds is None else format_duration(record.downtime_seconds)


def _clock(unix_seconds: float) -> str:
    return dt.datetime.fromtimestamp(unix_seconds, tz=dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
