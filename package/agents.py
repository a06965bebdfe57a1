"""The packages that the agents need at run time, as package/agents.lock names them.

pip checks every file that it takes against the hashes of the lock.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

from package import lock


def own_version() -> str:
    """Return the version of the Python that runs this."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def own_python() -> Path:
    """Return the interpreter that this environment was made from, such as /usr/bin/python3.11."""
    return Path(sys._base_executable).resolve()  # type: ignore[attr-defined] # noqa: SLF001 - sys.executable is the venv's


def packages(version: str) -> Path:
    """Return a directory with the locked packages for a version of Python; made once for each lock."""
    requirements = lock.path("agents")
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    made = lock.ROOT / "build" / "agents" / f"{version}-{digest}"
    if not made.exists():
        scratch = made.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        which = ["--require-hashes", "--only-binary=:all:", f"--python-version={version}", f"--target={scratch}"]
        scratch.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, *which, f"--report={_report(made)}", f"--requirement={requirements}"], check=True)
        shutil.rmtree(scratch / "bin", ignore_errors=True)  # programs of these packages, which nobody needs
        scratch.replace(made)
    return made


def _report(made: Path) -> Path:
    return made.with_name(f"{made.name}.json")


def distributions(version: str) -> list[Distribution]:
    """Return the packages' metadata, by name."""
    found = importlib.metadata.distributions(path=[str(packages(version))])
    return sorted(found, key=lambda one: canonical(one.name))


def hashes(version: str) -> dict[str, str]:
    """Return the SHA-256 of the file that each package came from."""
    report = json.loads(_report(packages(version)).read_text())
    return {
        canonical(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in report["install"]
    }


def canonical(name: str) -> str:
    """Return a package's name in the one spelling that indexes use."""
    return re.sub(r"[-_.]+", "-", name).lower()
