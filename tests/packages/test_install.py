"""``make install``: everything is where it belongs, and nothing of it knows where it was built."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from package import agents, manuals
from package.install import Installation
from tests.packages.conftest import ROOT, make_with_wheel

pytestmark = pytest.mark.timeout(300)  # the first one fetches the packages
PREFIX = Path("/opt/elsewhere")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed below this directory."""
    destdir = tmp_path_factory.mktemp("destdir")
    make_with_wheel("install", f"DESTDIR={destdir}", f"PREFIX={PREFIX}")
    return destdir


@pytest.fixture(scope="module")
def prefix(root: Path) -> Path:
    return root / PREFIX.relative_to("/")


def test_the_program_runs_in_its_own_environment(prefix: Path) -> None:
    python = prefix / "lib" / "migrated" / "bin" / "python3"
    script = "import aiohttp, sys; from migrated.cli import main; print(aiohttp.__file__); sys.exit(main())"
    said = subprocess.run([python, "-I", "-c", script, "check", "--help"], check=True, capture_output=True, text=True)
    assert said.stdout.startswith(str(prefix / "lib" / "migrated"))
    assert "Usage: migrated check" in said.stdout


def test_the_program_is_found_on_the_path(prefix: Path) -> None:
    program = prefix / "bin" / "migrated"
    assert program.resolve() == prefix / "lib" / "migrated" / "bin" / "migrated"
    assert os.access(program, os.X_OK)


def test_everything_of_systemd_is_there_and_starts_the_installed_program(prefix: Path) -> None:
    installed = {path.name: path.read_text() for path in (prefix / "lib" / "systemd" / "system").iterdir()}
    for source in (ROOT / "systemd").iterdir():
        if source.name.endswith(".conf"):
            name, kind, _ = source.name.rsplit(".", 2)
            assert (prefix / "lib" / f"{kind}.d" / f"{name}.conf").read_text() == source.read_text()
        else:
            assert "/usr/local" not in installed[source.name]
    assert f"ExecStart={PREFIX}/bin/migrated source" in installed["migrated-source.service"]


def test_the_configuration_is_private_and_an_existing_one_is_kept(root: Path) -> None:
    directory = root / "etc" / "migrated"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750
    for source in (ROOT / "config").glob("*.toml"):
        assert stat.S_IMODE((directory / source.name).stat().st_mode) == 0o640
    changed = directory / "target.toml"
    changed.write_text("# mine\n")
    Installation(root, PREFIX, agents.own_version()).add_configuration()
    assert changed.read_text() == "# mine\n"


def test_manual_pages_and_completions_are_there(prefix: Path) -> None:
    for page in manuals.pages():
        assert (prefix / "share" / "man" / f"man{page[-1]}" / page).is_file()
    for path in manuals.COMPLETIONS.values():
        assert (prefix / "share" / path).is_file()


def test_no_file_knows_where_it_was_built(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert str(root).encode() not in content, path
            assert str(ROOT).encode() not in content, path
