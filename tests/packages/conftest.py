"""What is built once for all tests of packages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*arguments: str, directory: Path = ROOT) -> None:
    """Run ``make`` as a user would, also below a ``make test``."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    done = subprocess.run(
        ["make", *arguments], cwd=directory, check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel for everybody; the sdist that it was built from is beside it."""
    make("wheel")
    (path,) = (ROOT / "build" / "dist").glob("*.whl")
    return path
