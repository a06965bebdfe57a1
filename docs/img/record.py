"""Record a terminal: run a command in a pty, and write what it wrote, when it wrote it, as an animated SVG.

    python docs/img/record.py docs/img/demo.svg make -s demo

Lines appear as they did in the terminal; pauses are cut at `PAUSE_SECONDS`.  A viewer without animation shows the last
screen.  Progress lines that the command takes back are not in the picture, everything else is as it was printed.
"""  # noqa: INP001 - a script

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 92, 50
#: How long the picture waits at most where the command did.
PAUSE_SECONDS = 1.5
#: As rich's own, without the fonts that it loads from elsewhere.
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
APPEAR
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""
_CONTROL = re.compile(rb"\x1b\[(\??[0-9;]*)([A-Za-z])|(\r)|(\n)")


def record(command: list[str]) -> list[tuple[float, bytes]]:
    """Everything the command wrote to its terminal, with the seconds since its start.  Its exit status must be 0."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)  # noqa: S606 - the person at the keyboard names it
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    began = time.monotonic()
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # EIO: the other end is closed
            break
        if not piece:
            break
        pieces.append((time.monotonic() - began, piece))
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        told = b"".join(piece for _, piece in pieces).decode(errors="replace")
        raise SystemExit(f"{' '.join(command)} failed:\n{told}")
    return pieces


def screen(data: bytes) -> list[str]:
    """The lines that stand at the end; colours stay as escape sequences."""
    lines, row, at = [b""], 0, 0
    fresh = True  # the cursor is at the beginning of its line: what comes replaces it

    def put(text: bytes) -> None:
        nonlocal fresh
        lines[row] = text if fresh else lines[row] + text
        fresh = False

    for match in _CONTROL.finditer(data):
        if match.start() > at:
            put(data[at : match.start()])
        at = match.end()
        if match[3]:
            fresh = True
        elif match[4]:
            row, fresh = row + 1, True
            lines.extend([b""] * (row + 1 - len(lines)))
        elif match[2] == b"A":
            row = max(0, row - int(match[1] or 1))
        elif match[2] == b"K":
            lines[row] = b""
        elif match[2] == b"m":
            put(match[0])
    return [line.decode(errors="replace").rstrip() for line in lines]


def times(pieces: list[tuple[float, bytes]]) -> list[float]:
    """When each line of the last screen was first as it is there, with pauses cut."""
    shown: list[float] = []
    last = screen(b"".join(piece for _, piece in pieces))
    data, now, before = b"", 0.5, pieces[0][0]
    for at, piece in pieces:
        data, now, before = data + piece, now + min(PAUSE_SECONDS, at - before), at
        lines = screen(data)
        while len(shown) < len(last) and len(shown) < len(lines) and lines[len(shown)] == last[len(shown)]:
            shown.append(now)
    return shown


def main(output: str, *command: str) -> None:
    """Run, draw, write."""
    pieces = record(list(command))
    lines = screen(b"".join(piece for _, piece in pieces))
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    text = "\n".join(lines).rstrip("\n")
    console.print(Text.from_ansi(f"$ {' '.join(word for word in command if word != '-s')}\n{text}"))
    drawn = console.export_svg(title="", code_format=FORMAT, unique_id="demo")
    # The first line is the command itself, which is there from the beginning.
    appear = "".join(
        f'[clip-path="url(#demo-line-{row})"] {{ animation: appear 1ms {seconds:.1f}s backwards; }}\n'
        for row, seconds in enumerate(times(pieces), 1)
    )
    rules = (
        f"@media (prefers-reduced-motion: no-preference) {{\n{appear}}}\n@keyframes appear {{ from {{ opacity: 0; }} }}"
    )
    Path(output).write_text(drawn.replace("APPEAR", rules), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
