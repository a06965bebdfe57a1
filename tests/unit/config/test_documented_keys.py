"""What docs/ and ``--help`` say of keys and options is what their declarations say."""

from __future__ import annotations

import re

import click
import pytest

from migrated import config
from migrated.cli.command import root
from migrated.options import Limits, MigrationOptions
from migrated.settings import Table, allowed
from tests.rig import documented_keys

DOCS = documented_keys.PAGE.parent


def test_the_page_of_the_configuration_is_up_to_date() -> None:
    assert documented_keys.PAGE.read_text() == documented_keys.page(), "run: make docs"


def test_every_section_is_documented() -> None:
    text = documented_keys.PAGE.read_text()
    for section in config.TargetConfig.model_fields:
        assert re.search(rf"^## \[{section}(\.NAME)?\]", text, re.MULTILINE), section


def flags(verb: str) -> dict[str, click.Option]:
    return {str(option.name): option for option in root.commands[verb].params if isinstance(option, click.Option)}


@pytest.mark.parametrize(("verb", "table"), [("start", MigrationOptions), ("set", Limits)])
def test_every_option_is_a_flag_with_its_description(verb: str, table: type[Table]) -> None:
    text = (DOCS / "cli.md").read_text()
    for name, field in table.model_fields.items():
        option = flags(verb)[name]
        assert (option.help or "").lower() == f"{field.description} ({allowed(field)}).".lower()
        assert f"`{option.opts[0]}" in text


@pytest.mark.parametrize(("path", "table"), [("/v1/migrations", MigrationOptions), ("/v1/migrations/ID/set", Limits)])
def test_every_option_is_a_field_of_the_request(path: str, table: type[Table]) -> None:
    row = re.search(rf"^\| `POST {path}` \| (.*?) \|", (DOCS / "http.md").read_text(), re.MULTILINE)
    assert row is not None
    assert set(table.model_fields) <= set(re.findall(r"\w+", row[1]))
