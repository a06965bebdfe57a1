"""Make a page about one migration that needs nothing but itself: for a ticket, or a mail."""

from __future__ import annotations

import base64
import hashlib
import html
from typing import TYPE_CHECKING, Final

import msgspec

from migrated.http.dashboard import VENDORED, read

if TYPE_CHECKING:
    from migrated.agent.record import Record
    from migrated.agent.series import Series
    from migrated.memory.page_map import PageMap

_STYLES: Final = (f"{VENDORED}uPlot.min.css", "dashboard.css", "report.css")
_SCRIPTS: Final = (f"{VENDORED}uPlot.iife.min.js", "words.js", "map.js", "plots.js", "migration.js", "report.js")
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="soft">{about}</p></header>
<main id="detail"></main>
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


def make(record: Record, series: Series, page_map: PageMap | None, *, agent: str, version: str) -> str:
    """Return the page; ``agent`` and ``version`` are those of the agent that has seen it."""
    style = "\n".join(read(name) for name in _STYLES)
    scripts = [read(name) for name in _SCRIPTS]
    assert not any("</script" in text for text in scripts)
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}"
    data = msgspec.json.encode({"record": record, "series": series, "map": page_map}).decode()
    return _PAGE.format(
        policy=html.escape(policy),
        title=html.escape(f"Migration of {record.guest}"),
        about=html.escape(f"as seen by the {record.role} {agent}, migrated {version}"),
        style=style,
        data=data.replace("<", "\\u003c"),  # what guests are called must not end the element
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
