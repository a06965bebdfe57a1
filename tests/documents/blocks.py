"""The fenced blocks of the documents, and the commands in them.

A block says by its language what it is.  A line of a block of commands is a command if it begins with a prompt, or if no line
of the block does; every other line is output.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
COMMANDS = {"console", "sh"}
#: Blocks of other kinds.  What can be checked of them is checked where they are used.
OTHERS = {"toml", "ini", "text", "mermaid", "layers", "python", "json", "yaml", "xml", "c"}
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL
)
#: Before a block.
_NOTE = re.compile(r"<!-- setting: (.+?) -->\s*\Z")
_PROMPT = re.compile(r"^(?:(host[a-z])?[#$] )")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, with the setting that a comment before it names."""

    page: Path
    line: int
    language: str
    text: str
    setting: str

    @property
    def where(self) -> str:
        """What an editor understands."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One command of a block: the host of its prompt, and the output that the page shows below it."""

    where: str
    host: str
    text: str
    output: tuple[str, ...] = ()
    setting: str = ""


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        note = _NOTE.search(before)
        language = match["language"].strip().partition(" ")[0] or _guess(match["text"])
        lines = "".join(line.removeprefix(match["indent"]) for line in match["text"].splitlines(keepends=True))
        yield Block(page, before.count("\n") + 1, language, lines, note[1] if note else "")


def _guess(text: str) -> str:
    """The kind of a block that does not say what it is: commands, if it begins as one could."""
    first = text.lstrip().partition("\n")[0]
    if re.search(r"^ *host[a-z][#$] ", text, re.MULTILINE):
        return "console"
    return "sh" if re.match(r"(\w+=\S+ )*[a-z./][\w./+-]*( |$)", first) and not text[0].isspace() else "text"


def commands(block: Block) -> list[Command]:
    """The commands of a block of commands, without their prompts and comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    has_prompts = any(_PROMPT.match(line) for line in lines)
    found: list[tuple[str, str, list[str]]] = []
    for line in lines:
        prompt = _PROMPT.match(line)
        if has_prompts and prompt is None:
            if found:
                found[-1][2].append(line)
            continue
        text = re.sub(r"(^|\s)# .*", "", line[prompt.end() :] if prompt else line)
        text = re.sub(r"\s+", " ", text).strip()
        if text:
            found.append((prompt[1] or "" if prompt else "", text, []))
    return [Command(block.where, host, text, tuple(output), block.setting) for host, text, output in found]


ALL = [block for page in PAGES for block in blocks(page)]
