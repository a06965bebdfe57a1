"""What docs/ says of the protocol is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from migrated.protocol.messages import AnyMessage

DOCS = Path(__file__).parents[3] / "docs"


def test_every_message_is_listed_with_its_fields() -> None:
    rows = re.findall(r"^\| (`.+?) \| \S+ \| (.*?) ?\| .* \|$", (DOCS / "protocol.md").read_text(), re.MULTILINE)
    listed = {tag: fields for tags, fields in rows for tag in re.findall(r"`([^`]+)`", tags)}
    assert listed == {
        str(message.__struct_config__.tag): ", ".join(message.__struct_fields__) for message in AnyMessage.__args__
    }
