"""The list of components and their licences: complete, and in the form that other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from package import agents, sbom
from tests.packages.conftest import make
from tests.packages.test_lock import entries

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)  # the first one fetches the packages


@pytest.fixture(scope="module")
def text() -> str:
    make("sbom")
    return (ROOT / "build" / "dist" / "migrated.cdx.json").read_text()


def test_the_list_of_components_follows_its_schema(text: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_every_locked_package_is_a_component_with_the_hash_of_a_locked_file(text: str) -> None:
    locked = entries("agents")
    components = [one for one in json.loads(text)["components"] if one["purl"].startswith("pkg:pypi/")]
    assert {agents.canonical(one["name"]) for one in components} == set(locked)
    for one in components:
        line = locked[agents.canonical(one["name"])]
        assert f"=={one['version']} " in line
        assert f"sha256:{one['hashes'][0]['content']}" in line


def test_every_component_is_needed_by_another_one(text: str) -> None:
    needed = {name for one in json.loads(text)["dependencies"] for name in one["dependsOn"]}
    assert needed == {one["bom-ref"] for one in json.loads(text)["components"]}


def test_what_is_vendored_is_a_component(text: str) -> None:
    directories = {path.name for path in (ROOT / "migrated").glob("**/vendor/*/")}
    assert {one["name"] for one in json.loads(text)["components"] if one["purl"].startswith("pkg:npm/")} == directories


def test_the_page_of_licences_is_what_the_packages_say() -> None:
    """If it is not, run `make lock`."""
    assert (ROOT / "docs" / "licences.md").read_text() == sbom.licences(agents.own_version())
