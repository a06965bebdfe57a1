"""What the documents name is there: files, functions and tests; and each step of a walk through the code names one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: Paths are written from the top of the checkout; those of Python modules also from `migrated/`.
TOPS = ("benchmarks", "config", "docs", "migrated", "native", "package", "systemd", "tests")
#: A function is named with its file.
FUNCTION = re.compile(r"((?:migrated|native)/[\w./]+\.(?:py|c)):([\w.]+)")
#: At the start of a line, as our clang-format breaks it: `type name(parameters)`, and the brace on the next line.
C_FUNCTION = re.compile(r"^[a-z][\w *]*?\b(\w+)\([^;{}]*\)\n\{", re.MULTILINE)
WALKS = ("A page, from the socket to CONTINUE", "From `migrated start` to COMMIT")


def spans(text: str) -> list[str]:
    """Everything between two backticks."""
    return re.findall(r"`([^`\n]+)`", text)


@cache
def functions(path: Path) -> frozenset[str]:
    """What a file defines: ``name`` of a function, ``Class.name`` of a method."""
    text = path.read_text()
    if path.suffix == ".c":
        return frozenset(C_FUNCTION.findall(text))
    body = ast.parse(text).body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in body:
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return frozenset(found)


@cache
def text_of_tests() -> dict[str, str]:
    """The text of every file of tests, by its name."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "native" / "tests").glob("*.c")]
    return {path.name: path.read_text() for path in files}


def steps() -> dict[str, str]:
    """Each numbered step of each walk, with a name for it."""
    found = {}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for walk in WALKS:
        section = text.partition(f"\n## {walk}\n")[2].partition("\n## ")[0]
        for step in re.split(r"^(?=\d+\. )", section, flags=re.MULTILINE)[1:]:
            found[f"{walk}, {step.partition('.')[0]}"] = step.partition("\n\n")[0]
    return found


STEPS = steps()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    for span in spans(document.read_text()):
        path = span.partition(":")[0].rstrip("/")
        if not re.fullmatch(r"[\w*-]+(/[\w.*-]+)+", path):
            continue
        if path.partition("/")[0] in TOPS:
            assert list(ROOT.glob(path)), span
        elif path.endswith(".py"):
            assert list((ROOT / "migrated").glob(path)), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_functions_that_a_document_names_exist(document: Path) -> None:
    for span in spans(document.read_text()):
        if match := FUNCTION.fullmatch(span):
            assert match[2] in functions(ROOT / match[1]), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_exist(document: Path) -> None:
    for span in spans(document.read_text()):
        if match := re.fullmatch(r"(test_\w+)(\.py|\.c)?", span):
            name, suffix = match.groups()
            assert span in text_of_tests() if suffix else any(f" {name}(" in text for text in text_of_tests().values())


@pytest.mark.parametrize("walk", WALKS)
def test_there_is_a_walk(walk: str) -> None:
    assert len([step for step in STEPS if step.startswith(walk)]) > 5


@pytest.mark.parametrize("step", STEPS)
def test_each_step_of_a_walk_names_a_function(step: str) -> None:
    assert any(FUNCTION.fullmatch(span) for span in spans(STEPS[step]))
