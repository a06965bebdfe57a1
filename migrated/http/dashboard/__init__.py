"""Serve the dashboard: static files of this package, read once.

The page loads nothing from elsewhere and contains no code of its own, and its policy forbids both.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Final

from aiohttp import web

#: Requests to this site, its own scripts and style sheets, and nothing else.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: uPlot draws the plots: vendor/uPlot/VENDORED.md.
VENDORED: Final = "vendor/uPlot/"
_ASSETS: Final = {
    **dict.fromkeys(("words.js", "map.js", "plots.js", "migration.js", "dashboard.js"), "text/javascript"),
    "dashboard.css": "text/css",
    "icon.svg": "image/svg+xml",
    f"{VENDORED}uPlot.iife.min.js": "text/javascript",
    f"{VENDORED}uPlot.min.css": "text/css",
}


def read(name: str) -> str:
    """Return the text of a file of this package."""
    return importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def add_routes(app: web.Application) -> None:
    """Add ``/`` and ``/assets/…``."""
    page = {"index.html": "text/html"}
    for name, kind in {**page, **_ASSETS}.items():
        path = "/" if name in page else f"/assets/{name.removeprefix(VENDORED)}"
        app.router.add_get(path, functools.partial(_answer, read(name), kind))


async def _answer(text: str, kind: str, _request: web.Request) -> web.Response:
    headers = {"Content-Security-Policy": POLICY}
    return web.Response(text=text, content_type=kind, charset="utf-8", headers=headers)
