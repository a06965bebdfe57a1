"""The wheel: one for all versions of Python, nothing in it that is not ours, and the same bytes wherever it is built."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.packages.conftest import ROOT, make

pytestmark = pytest.mark.timeout(300)  # the first one fetches what builds it

#: Of the distribution; all else would have to be in the wheel.
LIBRARIES = {"libc.so.6", "libzstd.so.1", "libssl.so.3", "libcrypto.so.3"}
LOADER = re.compile(r"ld-linux.*")


def test_one_wheel_serves_every_python_and_every_distribution_of_its_age(wheel: Path) -> None:
    assert re.fullmatch(rf"migrated-[\d.]+-cp311-abi3-manylinux_2_\d+_{platform.machine()}\.whl", wheel.name)


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    package = [path.relative_to(ROOT) for path in (ROOT / "migrated").rglob("*") if path.is_file()]
    ours = {str(path) for path in package if path.suffix != ".so" and "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}
    assert names == {*ours, "migrated/_native.abi3.so"}


def test_the_wheel_needs_no_library_that_a_distribution_lacks(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("migrated/_native.abi3.so", tmp_path)
    said = subprocess.run(["readelf", "--dynamic", library], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", said))
    assert "libzstd.so.1" in needed
    assert not {name for name in needed - LIBRARIES if not LOADER.fullmatch(name)}


def digests(directory: Path) -> dict[str, str]:
    """Of the wheel and the sdist."""
    files = [*directory.glob("*.whl"), *directory.glob("*.tar.gz")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_sources_make_the_same_wheel_elsewhere(wheel: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sources of another place"
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns("build", ".venv", ".*_cache", "__pycache__")
    )
    (copy / "build").mkdir()
    (copy / "build" / "builder").symlink_to(ROOT / "build" / "builder")
    (copy / "build" / "stamps").mkdir()
    (copy / "build" / "stamps" / "builder").touch()
    make("wheel", directory=copy)
    assert digests(copy / "build" / "dist") == digests(wheel.parent)
