"""The Debian package as Debian's own checker sees it; tests/systemd installs it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from package.deb import TEMPLATES
from tests.packages.conftest import debian_packages

pytestmark = pytest.mark.timeout(600)  # the first one fetches the packages


def test_lintian_finds_nothing_but_what_has_a_reason() -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    command = ["lintian", "--allow-root", "--fail-on=error,warning", str(debian_packages()[0])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_override_of_lintian_has_a_reason() -> None:
    lines = (TEMPLATES / "lintian-overrides").read_text().splitlines()
    assert lines[0].startswith("# ")
    for before, line in zip(["", *lines], lines, strict=False):
        assert line.startswith(("# ", "migrated: ")), line
        if line.startswith("# "):
            assert not before.startswith("# "), before
