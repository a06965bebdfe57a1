"""Imports point downwards: from each part of `migrated` only into parts that docs/architecture.md shows below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "migrated"


def diagram() -> list[list[str]]:
    """The layers of the diagram, the topmost first, each a list of parts."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("```layers\n")[2].partition("```")[0]
    return [line.partition("│")[0].split() for line in text.splitlines() if line.strip()]


LAYERS = diagram()
DEPTH = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """The part a module belongs to: the longest name in the diagram that it begins with."""
    words = module.split(".")
    return next((name for end in range(len(words), 0, -1) if (name := ".".join(words[:end])) in DEPTH), module)


def modules() -> dict[str, Path]:
    """Every module below `migrated`, by its name without that word."""
    found = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]):
        words = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return {name: path for name, path in found.items() if name}


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module of ours that a file imports, wherever in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == "migrated":
                module = next((m for end in range(len(words), 1, -1) if (m := ".".join(words[1:end])) in MODULES), "")
                if module:  # else a name of the package itself, such as its version
                    yield node.lineno, module


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    path = MODULES[module]
    ours = part_of(module)
    for line, imported in imports(path):
        theirs = part_of(imported)
        assert ours == theirs or DEPTH[ours] < DEPTH[theirs], f"{path.relative_to(ROOT)}:{line} imports {imported}"


def test_the_diagram_shows_each_part_once_and_no_other() -> None:
    parts = [part for layer in LAYERS for part in layer]
    assert len(parts) == len(set(parts))
    assert not [part for part in parts if part not in MODULES]
    packages = {part.rpartition(".")[0] for part in parts}  # of parts that the diagram shows one by one
    assert not [module for module in MODULES if part_of(module) not in DEPTH and module not in packages]
    assert not [module for module in packages & MODULES.keys() if [*imports(MODULES[module])]]
