"""The documentation builds as a site without a warning, asks nobody for anything, and its diagrams are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from playwright.async_api import Browser, expect

from docs.site import diagrams
from migrated.agent.record import NEXT
from migrated.protocol import transitions
from migrated.protocol.transitions import Role
from tests.dashboard.browser import PATIENCE_MS, opened

pytest_plugins = ["tests.dashboard.browser_fixtures"]

ROOT = Path(__file__).parents[2]
#: What a browser fetches by itself, unlike the link of an <a>.
FETCHED = {
    ("link", "href"),
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "srcset"),
    ("object", "data"),
}


class Page(HTMLParser):
    """The links of a page, its anchors, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id" and value:
                self.anchors.add(value)
            elif (tag, key) in FETCHED and value:
                self.fetched.append(value)
            elif (tag, key) == ("a", "href") and value:
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    path = tmp_path_factory.mktemp("site") / "site"
    built = subprocess.run([sys.executable, "-m", "docs.site", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return path


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.glob("*.html")}


def test_every_document_is_a_page(pages: dict[Path, Page]) -> None:
    names = {path.stem for path in pages}
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    assert documents | {"index", "security", "contributing", "search"} <= names


def test_the_site_fetches_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    fetched = {url for page in pages.values() for url in page.fetched}
    fetched |= {
        url
        for path in site.rglob("*.css")
        for url in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", path.read_text())
    }
    assert not [url for url in fetched if re.match(r"(\w+:)?//", url)]


def test_every_link_within_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            target, anchor = urldefrag(link.partition("?")[0] if not link.startswith("#") else link)
            if re.match(r"\w+:", target):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            assert there.is_file(), f"{path.name}: {link}"
            if anchor and there in pages:
                assert unquote(anchor) in pages[there].anchors, f"{path.name}: {link}"


@pytest.mark.asyncio(loop_scope="module")
async def test_every_page_fits_a_phone_and_the_search_works_from_files_alone(
    site: Path, pages: dict[Path, Page], browser: Browser
) -> None:
    phone = {"viewport": {"width": 375, "height": 740}}
    async with opened(browser, f"file://{site}", **phone) as watched:
        for path in pages:
            await watched.page.goto(path.as_uri())
            beyond = await watched.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert beyond <= 0, f"{path.name} is wider than the window"
        await watched.page.goto(f"{(site / 'search.html').as_uri()}?q=poisoned")
        await expect(watched.page.locator("#search-results li").first).to_be_visible(timeout=PATIENCE_MS)


@pytest.mark.parametrize("name", diagrams.diagrams())
def test_a_diagram_is_drawn_from_the_tables_as_they_are(name: str) -> None:
    assert (diagrams.IMAGES / name).read_text() == diagrams.diagrams()[name], "run: make docs"


@pytest.mark.parametrize("role", Role)
def test_the_diagrams_show_every_step_and_every_loss(role: Role) -> None:
    drawn = {
        (before.rstrip("'"), word, after.rstrip("'"))
        for (before, after), words in diagrams.steps(role).items()
        for word in words
    }
    table = transitions.TABLE[role]
    wanted = {(str(at.state), step, str(after.state)) for at, known in table.items() for step, after in known.items()}
    losses = {(str(at.state), "lost", str(transitions.lost(role, at).state)) for at in table}
    assert drawn == wanted | {(before, word, after) for before, word, after in losses if before != after}
    text = (diagrams.IMAGES / f"{role}-states.svg").read_text()
    for before, word, after in drawn:
        assert all(f">{state}</text>" in text for state in (before, after))
        assert word in text


@pytest.mark.parametrize("role", Role)
def test_commit_alone_crosses_the_line_and_nothing_comes_back(role: Role) -> None:
    main, side = diagrams.ROWS[role]
    rows = main | side
    line = diagrams.COMMIT[role]
    crossing = {
        edge: words for edge, words in diagrams.steps(role).items() if (rows[edge[0]] > line) != (rows[edge[1]] > line)
    }
    assert list(crossing) == [("loaded", "committed")]


def test_the_diagram_of_a_migration_has_a_line_for_each_step_of_its_table() -> None:
    drawn = (diagrams.IMAGES / "migration-states.svg").read_text()
    assert drawn.count('class="step"') == sum(len(after) for after in NEXT.values())


def test_the_sequence_has_the_messages_of_a_migration_in_which_nothing_fails() -> None:
    words = [word for _, messages in diagrams.conversation() for _, word in messages if not word.endswith("…")]
    assert words == ["hello", "ready", "switchover", "stale-map-end", "loaded", "commit", "running", "done", "released"]
