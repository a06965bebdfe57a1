"""Format results: tables for a terminal and for a document, and a plot."""

from __future__ import annotations

import dataclasses
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
_PANEL_WIDTH, _BAR, _GAP, _LEFT, _TOP = 300, 11, 10, 120, 64


def svg(rows: list[dict[str, Any]]) -> str:
    """Draw the comparison as bars: one panel per figure, one group per path and load, one bar per system."""
    groups: list[tuple[str, str]] = list(dict.fromkeys((row["path"], row["load"]) for row in rows))
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
    for number, (path, load) in enumerate(groups):
        y = _TOP + group_height * number
        out.append(f'<text x="8" y="{y + group_height / 2}">{path}, {load}</text>')
    for panel, (figure, label) in enumerate(_PANELS):
        left = _LEFT + _PANEL_WIDTH * panel
        out.append(f'<text x="{left}" y="48" font-weight="bold">{label}</text>')
        for number, (path, load) in enumerate(groups):
            found = {row["system"]: row for row in rows if (row["path"], row["load"]) == (path, load)}
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


def _bar_text(figure: str, value: float) -> str:
    return f"{value / (1 << 20):.0f}" if figure == "wire_bytes" else f"{value:.3g}"
