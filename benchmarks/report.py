"""Format results: tables for a terminal and for a document, and a plot."""

from __future__ import annotations

import dataclasses
import html
from typing import Any


@dataclasses.dataclass
class Section:
    """One table.  ``data`` holds the values behind it, for the JSON file."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    data: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def markdown(self) -> str:
        """Return the table as Markdown, aligned so that it is also readable as plain text."""
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]

        def line(cells: tuple[str, ...]) -> str:
            return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        parts = [f"### {self.title}", "", line(self.columns), rule, *(line(row) for row in self.rows)]
        if self.notes:
            parts += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(parts) + "\n"


def seconds(value: float | None) -> str:
    """Format seconds with a fixed number of decimals, so that a column lines up."""
    return "-" if value is None else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """Format seconds as milliseconds."""
    if value is None:
        return "-"
    return f"{value * 1e3:.2f} ms" if value < 0.01 else f"{value * 1e3:.0f} ms"


def mebibytes(value: float | None) -> str:
    """Format bytes as MiB."""
    return "-" if value is None else f"{value / (1 << 20):.0f} MiB"


def rate(value: float | None) -> str:
    """Format bytes per second as GB/s."""
    return "-" if value is None else f"{value / 1e9:.2f} GB/s"


def ratio(value: float | None) -> str:
    """Format a ratio."""
    return "-" if value is None else f"{value:.2f}"


# ---------------------------------------------------------------- plot

_COLOURS = {"migrated": "#1b7f5c", "qemu-precopy": "#b0b7c3", "qemu-postcopy": "#6c7a93"}
_PANELS = (("total_seconds", "total time, s"), ("stall_seconds", "longest stall, s"), ("wire_bytes", "bytes, MiB"))
_PANEL_WIDTH, _BAR, _GAP, _LEFT, _TOP = 300, 11, 10, 160, 64


def svg(rows: list[dict[str, Any]]) -> str:
    """Draw the comparison as bars: one panel per figure, one group per memory, path and load, one bar per system."""
    groups = list(dict.fromkeys(_group(row) for row in rows))
    systems = [name for name in _COLOURS if any(row["system"] == name for row in rows)]
    group_height = _BAR * len(systems) + _GAP
    width, height = _LEFT + _PANEL_WIDTH * len(_PANELS) + 20, _TOP + group_height * len(groups) + 20
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="11">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, system in enumerate(systems):
        x = _LEFT + 130 * number
        out.append(f'<rect x="{x}" y="12" width="11" height="11" fill="{_COLOURS[system]}"/>')
        out.append(f'<text x="{x + 16}" y="22">{system}</text>')
    for number, group in enumerate(groups):
        y = _TOP + group_height * number
        out.append(f'<text x="8" y="{y + group_height / 2}">{", ".join(group)}</text>')
    for panel, (figure, label) in enumerate(_PANELS):
        left = _LEFT + _PANEL_WIDTH * panel
        out.append(f'<text x="{left}" y="48" font-weight="bold">{label}</text>')
        for number, group in enumerate(groups):
            found = {row["system"]: row for row in rows if _group(row) == group}
            # Every group has its own scale, because links differ by a factor of a hundred and only adjacent bars are compared.
            largest = max((row[figure] or 0 for row in found.values()), default=0) or 1
            for bar, system in enumerate(systems):
                y = _TOP + group_height * number + _BAR * bar
                value = found.get(system, {}).get(figure)
                length = 0 if value is None else value / largest * (_PANEL_WIDTH - 90)
                text = "no end" if value is None else _bar_text(figure, value)
                out.append(
                    f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{_BAR - 2}" fill="{_COLOURS[system]}"/>'
                )
                out.append(f'<text x="{left + length + 4:.1f}" y="{y + _BAR - 3}" font-size="9">{text}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _group(row: dict[str, Any]) -> tuple[str, ...]:
    return row["memory"], row["path"], row["load"]


def _bar_text(figure: str, value: float) -> str:
    return f"{value / (1 << 20):.0f}" if figure == "wire_bytes" else f"{value:.3g}"


_SERIES_COLOURS = ("#1b7f5c", "#3a6ea5", "#b5651d", "#7b4b94", "#b0b7c3", "#6c7a93", "#333333", "#c0392b")
_PLOT_WIDTH, _PLOT_HEIGHT, _PLOT_LEFT, _PLOT_TOP = 560, 260, 60, 20


def distribution(series: dict[str, list[float]]) -> str:
    """Draw how many of the migrations had at most a downtime, in milliseconds: one line per case, from seconds."""
    series = {title: sorted(values) for title, values in series.items() if values}
    longest = max((values[-1] for values in series.values()), default=0.0) * 1e3
    tick = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if longest / step <= 12), 1000)
    span = (int(longest / tick) + 1) * tick
    width, height = _PLOT_LEFT + _PLOT_WIDTH + 20, _PLOT_TOP + _PLOT_HEIGHT + 50 + 16 * len(series)
    bottom = _PLOT_TOP + _PLOT_HEIGHT
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="11">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for mark in range(0, span + 1, tick):
        x = _PLOT_LEFT + _PLOT_WIDTH * mark / span
        out.append(f'<path d="M{x:.1f} {_PLOT_TOP}V{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{mark}</text>')
    for percent in (0, 25, 50, 75, 99):
        y = bottom - _PLOT_HEIGHT * percent / 100
        out.append(f'<path d="M{_PLOT_LEFT} {y:.1f}h{_PLOT_WIDTH}" stroke="#ddd"/>')
        out.append(f'<text x="{_PLOT_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    middle = _PLOT_LEFT + _PLOT_WIDTH / 2
    out.append(f'<text x="{middle}" y="{bottom + 30}" text-anchor="middle">downtime of at most … ms</text>')
    for number, (title, values) in enumerate(series.items()):
        colour = _SERIES_COLOURS[number % len(_SERIES_COLOURS)]
        steps = "".join(
            f"H{_PLOT_LEFT + _PLOT_WIDTH * value * 1e3 / span:.1f}V{bottom - _PLOT_HEIGHT * (rank + 1) / len(values):.1f}"
            for rank, value in enumerate(values)
        )
        out.append(f'<path d="M{_PLOT_LEFT} {bottom}{steps}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        y = bottom + 46 + 16 * number
        out.append(f'<rect x="{_PLOT_LEFT}" y="{y - 6}" width="20" height="3" fill="{colour}"/>')
        out.append(f'<text x="{_PLOT_LEFT + 26}" y="{y}">{html.escape(title)}, {len(values)} migrations</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
