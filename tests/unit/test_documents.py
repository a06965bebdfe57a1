"""What the documents name is there: files, directories and tests."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: Paths are written from the top of the checkout; those of Python modules also from `migrated/`.
TOPS = ("benchmarks", "config", "docs", "migrated", "native", "systemd", "tests")


def spans(document: Path) -> list[str]:
    """Everything between two backticks."""
    return re.findall(r"`([^`\n]+)`", document.read_text())


@cache
def text_of_tests() -> dict[str, str]:
    """The text of every file of tests, by its name."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "native" / "tests").glob("*.c")]
    return {path.name: path.read_text() for path in files}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    for span in spans(document):
        path = span.partition(":")[0].rstrip("/")
        if not re.fullmatch(r"[\w*-]+(/[\w.*-]+)+", path):
            continue
        if path.partition("/")[0] in TOPS:
            assert list(ROOT.glob(path)), span
        elif path.endswith(".py"):
            assert list((ROOT / "migrated").glob(path)), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_exist(document: Path) -> None:
    for span in spans(document):
        if match := re.fullmatch(r"(test_\w+)(\.py|\.c)?", span):
            name, suffix = match.groups()
            assert (
                span in text_of_tests() if suffix else any(f" {name}(" in text for text in text_of_tests().values())
            ), span
