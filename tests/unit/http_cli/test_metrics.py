"""What Prometheus sees of a real agent that was started again: its own migrations, not those of the agent before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from migrated import config
from migrated.agent import archive
from migrated.agent.archive import Archive
from migrated.agent.record import Record, State
from migrated.http.metrics import exposition, make_registry
from migrated.source.agent import SourceAgent
from migrated.source.migration import SourceMigration

INSECURE: dict[str, Any] = {"tls": {"insecure": True}}


def ended(number: int) -> Record:
    return Record(
        id=f"{number:012x}",
        guest="vm1",
        role="source",
        mode="hybrid",
        state=State.COMPLETED,
        transferred_bytes=1000,
        downtime_seconds=0.01,
        ended_at=1.0,
    )


class Ended:
    """A migration of this agent's own that has ended."""

    def __init__(self, record: Record) -> None:
        self.id, self.record, self.on_end = record.id, record, None
        self.over = True


def restarted(state_dir: Path, records: int) -> SourceAgent:
    """A source agent in whose directory an earlier one recorded so many completed migrations."""
    kept = Archive(state_dir / archive.NAME, keep=200)
    for number in range(records):
        kept.add(ended(number))
    return SourceAgent(config.decode({**INSECURE, "agent": {"state_dir": str(state_dir)}}, "source"))


def totals(text: bytes) -> dict[str, float]:
    """Every counter, summed over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name.startswith("migrated_") and sample.name.endswith(("_total", "_count")):
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_counters_start_anew_with_the_agent(tmp_path: Path) -> None:
    agent = restarted(tmp_path, 3)
    assert len(agent.records()) == 3
    registry = make_registry(agent, {"version": "1", "name": "host-a"})
    assert set(totals(exposition(registry)).values()) == {0.0}


def test_a_migration_that_a_restarted_agent_takes_up_is_counted_once(tmp_path: Path) -> None:
    agent = restarted(tmp_path, 3)
    registry = make_registry(agent, {"version": "1", "name": "host-a"})
    agent._migrations.add(cast("SourceMigration", Ended(ended(1))))
    for _ in range(2):
        now = totals(exposition(registry))
        assert now["migrated_migrations_started_total"] == 1
        assert now["migrated_migrations_ended_total"] == 1
        assert now["migrated_transferred_bytes_total"] == 1000
        assert now["migrated_downtime_seconds_count"] == 1


# ---------------------------------------------------------------- docs/http.md


DOCUMENT = Path(__file__).parents[3] / "docs" / "http.md"


def test_every_field_of_a_record_is_documented() -> None:
    text = DOCUMENT.read_text()
    described = text[text.index("\nA record: ") : text.index("\nStates: ")]
    for field in msgspec.structs.fields(Record):
        assert re.search(rf"[ \n`]{field.name}\b", described), field.name


def test_every_metric_is_documented(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    described = text[text.index("\n## Metrics") :]
    agent = restarted(tmp_path, 0)
    for family in text_string_to_metric_families(
        exposition(make_registry(agent, {"version": "1", "name": "a"})).decode()
    ):
        short = re.sub(r"^migrated_(agent|migration)_", "_", family.name)
        assert f"`{family.name}" in described or f"`{short}`" in described, family.name
