"""What docs/ says of the protocol is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from migrated.protocol import transitions
from migrated.protocol.messages import AnyMessage
from migrated.protocol.transitions import Role

DOCS = Path(__file__).parents[3] / "docs"


def test_the_diagrams_are_drawn_from_the_tables() -> None:
    text = (DOCS / "commit.md").read_text()
    assert text.endswith(transitions.diagrams()), (
        "run: python -m migrated.protocol.transitions, and put it into docs/commit.md"
    )


def test_the_diagrams_show_every_step_and_every_loss() -> None:
    for role in Role:
        drawn = transitions.mermaid(role)
        edges = re.findall(r"^    (\S+) --> (\S+): (.+)$", drawn, re.MULTILINE)
        steps = {(before, word, after) for before, after, words in edges for word in words.split(", ")}
        table = transitions.TABLE[role]
        wanted = {
            (str(at.state), step, str(after.state)) for at, known in table.items() for step, after in known.items()
        }
        losses = {(str(at.state), "lost", str(transitions.lost(role, at).state)) for at in table}
        assert steps == wanted | {(before, word, after) for before, word, after in losses if before != after}


def test_every_message_is_listed_with_its_fields() -> None:
    rows = re.findall(r"^\| (`.+?) \| \S+ \| (.*?) ?\| .* \|$", (DOCS / "protocol.md").read_text(), re.MULTILINE)
    listed = {tag: fields for tags, fields in rows for tag in re.findall(r"`([^`]+)`", tags)}
    assert listed == {
        str(message.__struct_config__.tag): ", ".join(message.__struct_fields__) for message in AnyMessage.__args__
    }
