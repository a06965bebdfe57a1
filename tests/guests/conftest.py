"""What the tests with real guests need of this machine, found once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.demo.qemu_guest import QEMU
from tests.rig.pages import PagesUnavailableError, more_pages

MIB = 1 << 20
KVM = Path("/dev/kvm")
#: Source and target of a 256 MiB guest, and another pair for a guest that a module shares.
POOL_BYTES = 1024 * MIB


@pytest.fixture(scope="session")
def machine() -> None:
    """Root and QEMU, or a skip that says what is lacking."""
    if os.geteuid() != 0:
        pytest.skip("needs root: huge pages, and reaching into an unmodified QEMU")
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")


@pytest.fixture(scope="session")
def page_pool(machine: None) -> Iterator[None]:
    """2 MiB pages for everything in this folder, given back at the end."""
    try:
        with more_pages(POOL_BYTES // (2 * MIB), 2 * MIB):
            yield
    except PagesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["tcg", "kvm"], scope="module")
def accel(request: pytest.FixtureRequest) -> str:
    """Both ways to run a guest; KVM where this machine has it."""
    kind = str(request.param)
    if kind == "kvm" and not KVM.exists():
        pytest.skip(f"{KVM} is not there: guests run under TCG only")
    return kind


@pytest.fixture(scope="session")
def fast_accel() -> str:
    """The faster of what this machine has."""
    return "kvm" if KVM.exists() else "tcg"
