"""The Dockerfile: its steps are carried out without a container engine, and what they make runs."""

from __future__ import annotations

import os

import pytest

from tests.packages import dockerfile
from tests.packages.conftest import ROOT
from tests.rig import supervisor
from tests.rig.trees import TreeUnavailableError

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root directory"),
    pytest.mark.skipif(
        not os.environ.get("MIGRATED_TEST_IMAGE"),
        reason="it takes minutes: `make test-packages` sets MIGRATED_TEST_IMAGE",
    ),
]


def test_the_steps_of_the_dockerfile_make_an_image_that_runs() -> None:
    with supervisor.directory("migrated-image-", "/var/tmp") as scratch:
        try:
            image = dockerfile.build(ROOT / "Dockerfile", scratch)
        except TreeUnavailableError as error:
            pytest.skip(str(error))
        assert "Usage: migrated" in image.start()
        assert image.start("--version").startswith("migrated ")
        for role in ("source", "target"):
            assert "Usage: migrated" in image.start(role, "--help")
            assert (image.files / "etc" / "migrated" / f"{role}.toml").is_file()
        assert "QEMU emulator version" in image.run("qemu-system-x86_64", "--version")
