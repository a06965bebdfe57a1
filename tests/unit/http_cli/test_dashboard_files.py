"""The files of the dashboard: complete, as their authors published them, and free of anything from elsewhere."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from importlib.resources.abc import Traversable

import pytest

from migrated.http import dashboard
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

FILES = importlib.resources.files(dashboard)
OURS = sorted(file.name for file in FILES.iterdir() if file.name.endswith((".html", ".css", ".js", ".svg")))


def vendored() -> Traversable:
    return FILES.joinpath("vendor", "uPlot")


def test_the_charting_library_is_as_it_was_published() -> None:
    note = vendored().joinpath("VENDORED.md").read_text()
    listed = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.*)$", note, re.MULTILINE)}
    there = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in vendored().iterdir()}
    del there["VENDORED.md"]
    assert there == listed
    assert "MIT License" in vendored().joinpath("LICENSE").read_text()


async def test_every_file_that_the_page_names_is_served_under_its_policy(source: Served) -> None:
    async with source.status() as http:
        async with http.get("/") as answer:
            page = await answer.text()
            assert answer.content_type == "text/html"
            policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        named = re.findall(r'(?:src|href)="(assets/[^"]+)"', page)
        assert len(named) == 9
        for name in named:
            async with http.get(f"/{name}") as answer:
                assert answer.status == 200, name
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
                assert answer.content_type == kind
        async with http.get("/assets/index.html") as answer:
            assert answer.status == 404
        async with http.get("/assets/..%2f__init__.py") as answer:
            assert answer.status == 404


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_ours_names_nothing_elsewhere_and_makes_no_markup_of_text(name: str) -> None:
    text = FILES.joinpath(name).read_text()
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    if name.endswith(".html"):
        assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=", text)  # the policy would refuse it
