"""The locks fit what is required, say what every file must be, and nobody has to trust a particular registry."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from package import lock

NAMES = sorted(lock.wanted())


def entries(name: str) -> dict[str, str]:
    """Each package of a lock with the text that belongs to it."""
    text = lock.path(name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.partition("==")[0]: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_fits_what_is_required(name: str) -> None:
    """If it does not, run `make lock`."""
    locked = entries(name)
    for text in lock.wanted()[name]:
        wanted = Requirement(text)
        line = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(line.partition("==")[2].split()[0]), text


@pytest.mark.parametrize("name", NAMES)
def test_every_package_of_a_lock_has_hashes(name: str) -> None:
    for line in entries(name).values():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", line), line


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_names_no_registry(name: str) -> None:
    text = lock.path(name).read_text()
    assert "://" not in text
    assert "index" not in text
