"""Show a migration while it runs: a live display on a terminal, plain lines elsewhere.

The display names the phases with the time that each took, and for the present one what decides how long it still takes.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, Self

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from migrated.agent.record import ENDED, Record, State
from migrated.cli import rendering
from migrated.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

#: A plain line comes at each change of state or round, and after so long without one.
LINE_SECONDS: Final = 10.0
#: Until the guest runs on the target, what it changes must be sent again.
_LIVE: Final = frozenset({State.SETUP, State.PRECOPY})
_AFTER: Final = frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED, State.RECOVERING})


class Progress:
    """A context manager; `show` takes the records as they come."""

    def __init__(self) -> None:
        self._console = rendering.console(stderr=True)
        self._live: Live | None = None
        self._last: tuple[State, int] | None = None
        self._said = 0.0
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def pause(self) -> None:
        """Remove the display, so that a question can be asked."""
        if self._live is not None:
            self._live.stop()

    def resume(self) -> None:
        """Bring the display back."""
        if self._live is not None:
            self._live.start()

    def show(self, record: Record) -> None:
        """Show the record as it is now."""
        if self._live is not None:
            self._live.update(display(record))
            return
        now = (record.state, record.round)
        if now != self._last or time.monotonic() - self._said >= LINE_SECONDS:
            self._last, self._said = now, time.monotonic()
            print(line(record), file=sys.stderr, flush=True)


def line(record: Record) -> str:
    """Return one plain line."""
    parts = [f"{rendering.short_id(record)} {record.guest}: {record.state.value}"]
    if not record.ended:
        if record.state in _LIVE:
            parts.append(f"round {record.round}")
        parts.append(f"{rendering.progress_percent(record):.1f} % of {format_size(record.total_bytes)}")
        parts += [text for _, text in figures(record)]
        parts.append(outlook(record))
    return ", ".join(part for part in parts if part)


def outlook(record: Record) -> str:
    """Return how long it will take, as far as that can be said."""
    if record.state in (State.SETUP, State.SWITCHOVER):
        return ""
    if record.state in (State.POSTCOPY_PAUSED, State.RECOVERING):
        return "waiting for the other agent"
    left = rendering.eta_seconds(record)
    return f"about {format_duration(left)} left" if left is not None else "no end in sight at this pace"


def figures(record: Record) -> list[tuple[str, str]]:
    """Return what decides how long the present phase takes, each with a style."""
    moved = format_rate(record.throughput_bytes_per_second)
    if record.state in _LIVE:
        pace, dirty = record.throughput_bytes_per_second, record.dirty_bytes_per_second
        style = "red" if dirty >= pace > 0 else "yellow" if 2 * dirty >= pace > 0 else ""
        return [("", moved), (style, f"dirty rate {format_rate(dirty)}")]
    found = [("", moved)]
    if record.state in _AFTER:
        pages = f" of {record.stale_pages} stale pages" if record.stale_pages else " stale"
        found.append(("", f"{format_size(record.remaining_bytes)} left{pages}"))
    faults = record.faults
    if faults.current + faults.stale + faults.missing:
        latency = record.fault_seconds
        found.append(("", f"faults p99 {format_duration(latency.p99)}, max {format_duration(latency.max)}"))
    return found


def phases(record: Record, now: float) -> Text:
    """Return the states so far and the time that each took; those that a flapping connection repeats are left out."""
    ends = [*(step.at for step in record.timeline[1:]), record.ended_at or now]
    steps = [(step.state, max(0.0, end - step.at)) for step, end in zip(record.timeline, ends, strict=True)]
    text = Text()
    for index, (state, seconds) in enumerate(steps[-5:]):
        last = index == len(steps[-5:]) - 1
        text.append(" → " if index else "… → " if len(steps) > 5 else "", style="dim")
        text.append(state.value, style="bold cyan" if last else "")
        if state not in ENDED:
            text.append(f" {format_duration(seconds)}", style="" if last else "dim")
    return text


def display(record: Record) -> Group:
    """Return what a terminal shows: the phases, a bar, and the figures of the present phase."""
    head = Text.assemble((record.guest, "bold"), "  ", phases(record, time.time()))
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=100.0, completed=rendering.progress_percent(record), width=32),
        f"{rendering.progress_percent(record):5.1f} %",
        f"{format_size(record.remaining_bytes)} left",
        outlook(record),
    )
    rest = Text("  ").join(Text(text, style=style) for style, text in figures(record))
    if record.state is State.PRECOPY:
        rest.append(f"  round {record.round}")
    return Group(head, bar, rest)


def table(records: Iterable[Record]) -> Table:
    """Return a line for each active migration: what `status --watch` shows."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GUEST", "STATE"):
        made.add_column(name, no_wrap=True)
    for name in ("DONE", "LEFT", "RATE", "DIRTY", "STALE", "FAULT P99"):
        made.add_column(name, justify="right", no_wrap=True)
    for record in records:
        left = rendering.eta_seconds(record) if record.state in (State.PRECOPY, State.POSTCOPY) else None
        made.add_row(
            rendering.literal(record.guest),
            rendering.state_text(record),
            f"{rendering.progress_percent(record):.0f} %",
            "-" if left is None else format_duration(left),
            format_rate(record.throughput_bytes_per_second),
            format_rate(record.dirty_bytes_per_second) if record.state in _LIVE else "-",
            format_size(record.remaining_bytes) if record.state in _AFTER else "-",
            format_duration(record.fault_seconds.p99) if record.fault_seconds.max else "-",
        )
    return made
