"""What docs/ and ``--help`` say of keys and options is what their declarations say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from migrated import config
from migrated.cli.command import root
from migrated.guests.process.config import ProcessSourceConfig, ProcessTargetConfig
from migrated.guests.qemu.config import QemuSourceConfig, QemuTargetConfig
from migrated.options import Limits, MigrationOptions
from migrated.settings import Table, Timeouts, allowed

DOCS = Path(__file__).parents[3] / "docs"
INSECURE = {"tls": {"insecure": True}}
SOURCE, TARGET = config.decode(INSECURE, "source"), config.decode(INSECURE, "target")
#: Defaults that depend on the role.
BY_ROLE = {
    "state_dir": f"`{SOURCE.state_dir}`, `{TARGET.state_dir}`",
    "status": f"source `{SOURCE.status_address}`, target `{TARGET.status_address}`",
}


def documented(table: type[Table]) -> str:
    """The table of docs/configuration.md."""
    lines = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    shown: dict[str, Any] = table.model_construct().model_dump(mode="json")
    for name, field in table.model_fields.items():
        if field.is_required():
            default = "required"
        elif field.default is None:
            default = BY_ROLE.get(name, "")
        else:
            value = shown[name]
            default = f"{value:g}" if isinstance(value, float) else f"`{json.dumps(value)}`"
        if name != "driver":
            lines.append(f"| `{name}` | {default} | {allowed(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("[agent]", config.AgentSection),
        ("[listen] (target only)", config.ListenSection),
        ("[http]", config.HttpSection),
        ("[tls]", config.TlsSection),
        ("[migration]", MigrationOptions),
        ("[timeouts]", Timeouts),
        ("[limits]", config.LimitsSection),
        ('driver = "qemu" on a source', QemuSourceConfig),
        ('driver = "qemu" on a target', QemuTargetConfig),
        ('driver = "process" on a source', ProcessSourceConfig),
        ('driver = "process" on a target', ProcessTargetConfig),
    ],
)
def test_a_table_of_keys_is_the_declaration(heading: str, table: type[Table]) -> None:
    text = (DOCS / "configuration.md").read_text()
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    assert documented(table) in section[1], f"put this below {heading}:\n\n{documented(table)}"


def test_every_section_is_documented() -> None:
    text = (DOCS / "configuration.md").read_text()
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
