"""What is built once for all tests of packages."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from package import deb

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


@functools.cache
def build_wheel() -> Path:
    """Build the wheel for everybody; the sdist that it was built from is beside it."""
    make("wheel")
    (path,) = (ROOT / "build" / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def wheel() -> Path:
    return build_wheel()


def make_with_wheel(*arguments: str) -> None:
    """Run ``make`` for a target that takes the wheel, without building it once more."""
    build_wheel()
    make("--assume-old=build/wheel", *arguments)


@functools.cache
def debian_packages() -> tuple[Path, Path]:
    """Two revisions of the Debian package for the release under test; a skip says why there are none."""
    suite = suite_under_test()
    if suite not in deb.SUITES or shutil.which("dpkg-deb") is None:
        pytest.skip(f"no Debian package for this release: {suite or 'not Debian'}")
    make_with_wheel("deb", f"SUITE={suite}", "ARGS=--revision 1 2")
    directory, version, release = ROOT / "build" / "dist", deb.project_version(), deb.SUITES[suite][1]
    (former,), (latter,) = (directory.glob(f"migrated_{version}-{revision}+deb{release}_*.deb") for revision in "12")
    return former, latter


def suite_under_test() -> str:
    """This machine's release, or another one."""
    return os.environ.get("MIGRATED_TEST_SUITE") or platform.freedesktop_os_release().get("VERSION_CODENAME", "")
