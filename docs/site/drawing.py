"""Draw states and the steps between them as SVG: two columns of boxes, and lines at right angles between them.

The caller says in which column and row a state is; everything else follows from the steps, so that a drawing cannot show
a step that its table does not have.  Lines to the same state share a rail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

LINE: Final = 14  # pixels between two lines of text
LETTER: Final = 6.4  # width of a letter
BOX: Final = 138
RAIL: Final = 11  # between two rails
GAP: Final = 30  # between two rows: an arrow with its label
MARGIN: Final = 8

#: The site overrides these colours with those of its theme (style.css).
STYLE: Final = """
.states { --ink: #1f2328; --paper: #ffffff; --box: #eef2f7; --line: #57606a; --mark: #9a3412; max-width: 100%; height: auto;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 10.5px; }
@media (prefers-color-scheme: dark) {
  .states { --ink: #e6edf3; --paper: #15191f; --box: #262d37; --line: #9aa4b0; --mark: #fdba74; } }
.states text { fill: var(--ink); }
.states .paper { fill: var(--paper); }
.states .box { fill: var(--box); stroke: var(--line); }
.states .end { stroke-width: 2.5; }
.states .name { font-weight: bold; font-size: 12px; }
.states .step, .states .head { fill: none; stroke: var(--line); stroke-width: 1.2; }
.states .head { fill: var(--line); }
.states .mark { stroke: var(--mark); stroke-width: 2; stroke-dasharray: 7 4; }
.states .marked { fill: var(--mark); font-weight: bold; }
"""

Edges = Mapping[tuple[str, str], Sequence[str]]


@dataclasses.dataclass
class _Box:
    name: str
    column: int
    row: int
    inside: list[str]  # the steps that stay in this state
    final: bool
    top: float = 0
    height: float = 0

    @property
    def middle(self) -> float:
        return self.top + self.height / 2


@dataclasses.dataclass
class _Stub:
    """Where a line leaves a box or arrives at it.  A box has its stubs from top to bottom on each side."""

    box: _Box
    way: int  # -1: to the left, 1: to the right
    lines: list[str]
    y: float = 0


def _wrapped(words: Iterable[str]) -> list[str]:
    """Break the words of a label into lines."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) < 22:
            lines[-1] += f", {word}"
        else:
            if lines:
                lines[-1] += ","
            lines.append(word)
    return lines


def _wide(lines: Iterable[str]) -> float:
    return max((len(line) for line in lines), default=0) * LETTER


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """One line of text."""
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{mark}>{escape(words)}</text>'


def path(points: Sequence[tuple[float, float]]) -> str:
    """A line that ends with an arrow."""
    (x0, y0), (x, y) = points[-2:]
    there = [f"{'M' if not i else 'L'}{px:.0f} {py:.0f}" for i, (px, py) in enumerate(points)]
    if x == x0:
        tip = f"M{x:.0f} {y:.0f}l-4 {-7 if y > y0 else 7}h8z"
    else:
        tip = f"M{x:.0f} {y:.0f}l{-7 if x > x0 else 7} -4v8z"
    return f'<path class="step" d="{"".join(there)}"/><path class="head" d="{tip}"/>'


def framed(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """Return the whole file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="states" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" style="--natural: {width:.0f}px">'
    )
    paper = f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", paper, *body, "</svg>", ""])


class Drawing:
    """One diagram.  ``main`` and ``side`` are the columns, as names by row; ``mark`` is a line below a row."""

    def __init__(
        self,
        edges: Edges,
        main: Mapping[str, int],
        side: Mapping[str, int],
        *,
        mark: tuple[int, str, str] | None = None,
    ) -> None:
        places = {name: (column, row) for column, names in enumerate((main, side)) for name, row in names.items()}
        if drawn := {name for edge in edges for name in edge} ^ places.keys():
            raise ValueError(f"states and places differ: {sorted(drawn)}")
        goes_on = {before for before, after in edges if before != after}
        self.boxes = {
            name: _Box(name, column, row, _wrapped(edges.get((name, name), ())), name not in goes_on)
            for name, (column, row) in places.items()
        }
        self.mark = mark
        self._straight: dict[tuple[str, str], list[str]] = {}
        self._leave: list[tuple[_Stub, str]] = []  # a line's beginning, and the state it leads to
        self._arrive: dict[
            tuple[str, int, int], _Stub
        ] = {}  # by state, channel and side: one for all that come that way
        for (before, after), words in edges.items():
            if before != after:
                self._connect(self.boxes[before], self.boxes[after], list(words))
        self._place()

    def _connect(self, before: _Box, after: _Box, words: list[str]) -> None:
        between = [box for box in self.boxes.values() if box.column == 0 and before.row < box.row < after.row]
        if before.column == after.column == 0 and before.row < after.row and not between:
            self._straight[before.name, after.name] = words
            return
        if before.column != after.column:
            ways = (1, -1) if before.column == 0 else (-1, 1)
        else:
            ways = (-1, -1) if before.column == 0 else (1, 1)
        self._leave.append((_Stub(before, ways[0], _wrapped(words)), after.name))
        self._arrive.setdefault((after.name, self._channel(before, ways[0]), ways[1]), _Stub(after, ways[1], []))

    @staticmethod
    def _channel(box: _Box, way: int) -> int:
        """0 is left of the columns, 1 between them, 2 right of them."""
        return box.column + (way > 0)

    def _place(self) -> None:
        stubs = [*(stub for stub, _ in self._leave), *self._arrive.values()]

        def of(box: _Box, way: int) -> list[_Stub]:
            return [stub for stub in stubs if stub.box is box and stub.way == way]

        for box in self.boxes.values():
            needed = [sum(max(len(stub.lines), 1) * LINE + 4 for stub in of(box, way)) for way in (-1, 1)]
            box.height = max(30 + len(box.inside) * LINE, *(each + 10 for each in needed if each), 0)
        rows = sorted({box.row for box in self.boxes.values()})
        at, self.line = float(MARGIN), 0.0
        for row in rows:
            here = [box for box in self.boxes.values() if box.row == row]
            for box in here:
                box.top = at
            at += max(box.height for box in here) + GAP
            if self.mark and row == self.mark[0]:
                self.line = at
                at += GAP + LINE
        self.height = at - GAP + MARGIN
        for box in self.boxes.values():
            for way in (-1, 1):
                y = box.top
                for stub in of(box, way):
                    y += max(len(stub.lines), 1) * LINE + 4
                    stub.y = y // 8 * 8 + (4 if box.column else 0)  # lines from both columns never coincide

        rails: list[list[str]] = [[], [], []]
        for name, channel, _ in self._arrive:
            rails[channel].append(name)
        labels = [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]  # beside each channel: left and right
        for stub, _ in self._leave:
            side = labels[self._channel(stub.box, stub.way)]
            side[stub.way < 0] = max(side[stub.way < 0], _wide(stub.lines) + 8)
        left = MARGIN + len(rails[0]) * RAIL + labels[0][1] + (12 if rails[0] else 0)
        between = labels[1][0] + labels[1][1] + (len(rails[1]) + 1) * RAIL + 16
        self.columns = (left, left + BOX + between)
        self.width = self.columns[1] + BOX + labels[2][0] + (len(rails[2]) + 1) * RAIL + MARGIN
        starts = (MARGIN, left + BOX + labels[1][0] + RAIL, self.columns[1] + BOX + labels[2][0] + RAIL)
        self.rails = {
            (name, channel): starts[channel] + index * RAIL
            for channel, names in enumerate(rails)
            for index, name in enumerate(names)
        }

    def _edge(self, box: _Box, way: int) -> float:
        return self.columns[box.column] + (BOX if way > 0 else 0)

    def svg(self, title: str) -> str:
        """Return the drawing."""
        body: list[str] = []
        for (before, after), words in self._straight.items():
            x = self.columns[0] + BOX / 2
            upper, lower = self.boxes[before], self.boxes[after]
            body.append(path([(x, upper.top + upper.height), (x, lower.top)]))
            body += [
                text(x + 6, upper.top + upper.height + 17 + index * LINE, line)
                for index, line in enumerate(_wrapped(words))
            ]
        for stub, name in self._leave:
            channel = self._channel(stub.box, stub.way)
            x, rail = self._edge(stub.box, stub.way), self.rails[name, channel]
            there = self._arrive[name, channel, -1 if channel == 1 and stub.way > 0 else (1 if channel else -1)]
            end = self._edge(there.box, there.way)
            body.append(path([(x, stub.y), (rail, stub.y), (rail, there.y), (end, there.y)]))
            for index, line in enumerate(stub.lines):
                y = stub.y - 3 - (len(stub.lines) - 1 - index) * LINE
                body.append(text(x + 5 * stub.way, y, line, "start" if stub.way > 0 else "end"))
        if self.mark:
            _, above, below = self.mark
            y = self.line
            body.append(f'<path class="mark" d="M{MARGIN} {y:.0f}H{self.width - MARGIN:.0f}"/>')
            body.append(text(self.width - MARGIN, y - 6, above, "end", "marked"))
            body.append(text(self.width - MARGIN, y + 14, below, "end", "marked"))
        for box in self.boxes.values():
            x = self.columns[box.column]
            kind = "box end" if box.final else "box"
            body.append(
                f'<rect class="{kind}" x="{x:.0f}" y="{box.top:.0f}" width="{BOX}" height="{box.height:.0f}" rx="6"/>'
            )
            y = box.middle - len(box.inside) * LINE / 2 + 4
            body.append(text(x + BOX / 2, y, box.name, "middle", "name"))
            body += [text(x + BOX / 2, y + (i + 1) * LINE, line, "middle") for i, line in enumerate(box.inside)]
        return framed(self.width, self.height, title, body)
