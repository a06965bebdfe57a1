"""Every step of the two walks through the code in CONTRIBUTING.md names a function that is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WALKS = ("A page, from the socket to CONTINUE", "From `migrated start` to COMMIT")
REFERENCE = re.compile(r"`((?:migrated|native)/[\w./]+\.(?:py|c)):([\w.]+)`")
#: At the start of a line, as our clang-format breaks it: `type name(parameters)`, and the brace on the next line.
C_FUNCTION = re.compile(r"^[a-z][\w *]*?\b(\w+)\([^;{}]*\)\n\{", re.MULTILINE)


def steps() -> Iterator[tuple[str, str]]:
    """Each numbered step of each walk, with a name for it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for walk in WALKS:
        section = text.partition(f"\n## {walk}\n")[2].partition("\n## ")[0]
        for step in re.split(r"^(?=\d+\. )", section, flags=re.MULTILINE)[1:]:
            yield f"{walk}, {step.partition('.')[0]}", step.partition("\n\n")[0]


STEPS = dict(steps())


def functions(path: Path) -> set[str]:
    """What a file defines: ``name`` of a function, ``Class.name`` of a method."""
    text = path.read_text()
    if path.suffix == ".c":
        return set(C_FUNCTION.findall(text))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


@pytest.mark.parametrize("walk", WALKS)
def test_the_document_has_both_walks(walk: str) -> None:
    assert len([step for step in STEPS if step.startswith(walk)]) > 5


@pytest.mark.parametrize("step", STEPS)
def test_each_step_names_a_file_and_a_function_that_exist(step: str) -> None:
    references = REFERENCE.findall(STEPS[step])
    assert references, "no `path:function`"
    for name, function in references:
        path = ROOT / name
        assert path.is_file(), name
        assert function in functions(path), f"{name}:{function}"
