"""The tables of docs/configuration.md, from the declarations of the keys: ``python -m tests.rig.documented_keys``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from migrated import config
from migrated.guests.libvirt.config import (
    LibvirtSourceConfig,
    LibvirtSourceSection,
    LibvirtTargetConfig,
    LibvirtTargetSection,
)
from migrated.guests.libvirt.replace import Replacements
from migrated.guests.process.config import ProcessSourceConfig, ProcessTargetConfig
from migrated.guests.qemu.config import QemuSourceConfig, QemuTargetConfig
from migrated.options import MigrationOptions
from migrated.settings import Table, Timeouts, allowed

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
SECTIONS: dict[str, type[Table]] = {
    "[agent]": config.AgentSection,
    "[listen] (target only)": config.ListenSection,
    "[control]": config.ControlSection,
    "[http]": config.HttpSection,
    "[tls]": config.TlsSection,
    "[migration]": MigrationOptions,
    "[timeouts]": Timeouts,
    "[limits]": config.LimitsSection,
    "[hooks] on a source": config.SourceHooksSection,
    "[hooks] on a target": config.TargetHooksSection,
    "[tracing]": config.TracingSection,
    "[evacuation] (source only)": config.EvacuationSection,
    "[[evacuation.guests]]": config.GuestRank,
    "[libvirt] on a source": LibvirtSourceSection,
    "[libvirt] on a target": LibvirtTargetSection,
    'driver = "qemu" on a source': QemuSourceConfig,
    'driver = "qemu" on a target': QemuTargetConfig,
    'driver = "libvirt" on a source': LibvirtSourceConfig,
    'driver = "libvirt" on a target': LibvirtTargetConfig,
    "replace on a target": Replacements,
    'driver = "process" on a source': ProcessSourceConfig,
    'driver = "process" on a target': ProcessTargetConfig,
}

INSECURE = {"tls": {"insecure": True}}
SOURCE, TARGET = config.decode(INSECURE, "source"), config.decode(INSECURE, "target")
SECURE_SOURCE, SECURE = config.decode({}, "source"), config.decode({}, "target")
assert SECURE_SOURCE.tls_files is not None
assert SECURE.tls_files is not None
#: Defaults that depend on the role.
BY_ROLE = {
    "state_dir": f"`{SOURCE.state_dir}`, `{TARGET.state_dir}`",
    "address": f"`{SECURE.listen_address}`; with `tls.insecure` alone `{TARGET.listen_address}`",
    "ca": f"`{SECURE.tls_files.ca}`",
    "cert": f"source `{SECURE_SOURCE.tls_files.cert}`, target `{SECURE.tls_files.cert}`",
    "key": f"source `{SECURE_SOURCE.tls_files.key}`, target `{SECURE.tls_files.key}`",
    "status": f"source `{SOURCE.status_address}`, target `{TARGET.status_address}`",
}


def documented(table: type[Table]) -> str:
    """The keys of a table, one line each."""
    lines = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    shown: dict[str, Any] = table.model_construct().model_dump(mode="json")
    for name, field in table.model_fields.items():
        if field.is_required():
            default = "required"
        elif field.default is None or isinstance(field.default, Table):
            default = BY_ROLE.get(name, "")
        else:
            value = shown[name]
            default = f"{value:g}" if isinstance(value, float) else f"`{json.dumps(value)}`"
        if name != "driver":
            lines.append(f"| `{name}` | {default} | {allowed(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page, with the table below each heading of `SECTIONS` as it should be."""
    text = PAGE.read_text()
    for heading, table in SECTIONS.items():
        below = re.compile(rf"(^#+ {re.escape(heading)}\n(?:[^#|\n].*\n|\n)*)(?:\|.*\n)*", re.MULTILINE)
        text, found = below.subn(lambda match, table=table: match[1] + documented(table), text)  # type: ignore[misc]
        assert found == 1, f"{PAGE} has no section {heading}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
