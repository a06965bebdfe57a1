"""Sphinx's configuration (docs/site/__main__.py runs it)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "migrated"
extensions = ["myst_parser"]
myst_heading_anchors = 4
highlight_language = "none"  # for blocks that name no language
lexers["layers"] = TextLexer()  # docs/architecture.md

html_theme = "furo"
html_title = "migrated"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_show_search_summary = False  # it is fetched, which a browser does not do for files
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"


def _inline(app: Sphinx, tree: nodes.document, _: str) -> None:
    """Put our diagrams into the page itself, so that they have the colours of its theme."""
    for image in list(tree.findall(nodes.image)):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".svg" and 'class="states"' in (drawn := path.read_text()):
            image.replace_self(nodes.raw("", f'<div class="drawing">{drawn}</div>', format="html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what is above."""
    app.connect("doctree-resolved", _inline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
