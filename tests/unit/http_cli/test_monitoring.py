"""What config/ offers for Prometheus and Grafana: valid, and about metrics that an agent has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrated.agent.record import SOURCE_STEPS, ErrorInfo, Faults, FaultSeconds, Record, State
from migrated.http.metrics import exposition, make_registry
from tests.unit.http_cli.fake_agent import FakeAgent

CONFIG = Path(__file__).parent.parent.parent.parent / "config"
RULES = CONFIG / "prometheus" / "migrated.rules.yml"
GRAFANA = CONFIG / "grafana" / "migrated.json"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian package prometheus)")


def metrics() -> str:
    agent = FakeAgent()
    registry = make_registry(agent, {"name": "host-a", "version": "1"})
    for state in (State.PRECOPY, State.COMPLETED):
        record = Record(id=state.value, guest="vm1", role="source", mode="hybrid", state=state, downtime_seconds=0.02)
        record.faults, record.fault_seconds = Faults(stale=1), FaultSeconds(max=0.003)
        record.faults_by_kind_us = {"stale": [0] * 11 + [1]}
        record.bytes_by_kind = {"payload": 1}
        record.downtime_breakdown = {"stop": 0.0004, "save": 0.0156, "run": 0.004}
        agent.all.append(record)
    agent.all[-1].error = ErrorInfo(code="abandoned", message="some pages never arrived")
    agent.refused["unknown-guest"] += 1
    return exposition(registry).decode()


def promtool(*arguments: str, given: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60, cwd=RULES.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_metrics_follow_the_rules_of_prometheus() -> None:
    assert promtool("check", "metrics", given=metrics()) == ""


@needs_promtool
def test_alerts_are_valid_and_fire_when_they_should() -> None:
    promtool("check", "rules", RULES.name)
    promtool("test", "rules", "migrated.test.yml")


@pytest.mark.parametrize("path", [RULES, GRAFANA], ids=["rules", "grafana"])
def test_every_metric_that_is_used_exists(path: Path) -> None:
    there = {sample.name for family in text_string_to_metric_families(metrics()) for sample in family.samples}
    text = path.read_text()
    used = set(re.findall(r"\b(?:migrated|process)_[a-z_]+", text))
    assert used
    assert used <= there


def test_the_grafana_dashboard_has_a_query_in_every_panel_and_no_panel_on_another() -> None:
    dashboard = json.loads(GRAFANA.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert all(target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
        assert place["x"] + place["w"] <= 24
    assert {one["name"] for one in dashboard["templating"]["list"]} == {"datasource", "instance"}


def test_error_codes_are_a_bounded_set_of_labels() -> None:
    agent = FakeAgent()
    registry = make_registry(agent, {"name": "host-a", "version": "1"})
    for number, code in enumerate(("not-converging", "not-converging", "of-some-peer", "of-another")):
        record = Record(id=str(number), guest="vm1", role="source", mode="hybrid", state=State.FAILED)
        record.error = ErrorInfo(code=code, message="no")
        agent.all.append(record)
    agent.refused.update({"unknown-guest": 2, "no-code-of-ours": 1})
    found = {
        (sample.name, sample.labels["code"]): sample.value
        for family in text_string_to_metric_families(exposition(registry).decode())
        for sample in family.samples
        if "code" in sample.labels
    }
    assert found == {
        ("migrated_migrations_failed_total", "not-converging"): 2,
        ("migrated_migrations_failed_total", "other"): 2,
        ("migrated_requests_refused_total", "unknown-guest"): 2,
        ("migrated_requests_refused_total", "other"): 1,
    }


def test_the_longest_stall_of_a_migration_is_one_observation() -> None:
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(metrics())
        for sample in family.samples
        if sample.name.startswith("migrated_longest_stall_seconds")
    }
    assert samples["migrated_longest_stall_seconds_bucket", "0.0025"] == 0
    assert samples["migrated_longest_stall_seconds_bucket", "0.005"] == 1
    assert samples["migrated_longest_stall_seconds_count", None] == 1  # the active one has not ended
    assert samples["migrated_longest_stall_seconds_sum", None] == 0.003


def test_the_steps_of_the_downtime_are_one_observation_each_and_add_up_to_it() -> None:
    samples = {
        (sample.name, sample.labels.get("step"), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(metrics())
        for sample in family.samples
        if sample.name.startswith("migrated_downtime_")
    }
    step = "migrated_downtime_step_seconds"
    assert {name for metric, name, _ in samples if metric == f"{step}_count"} == {*SOURCE_STEPS}
    assert samples[f"{step}_bucket", "stop", "0.00025"] == 0
    assert samples[f"{step}_bucket", "stop", "0.0005"] == samples[f"{step}_count", "stop", None] == 2
    assert samples[f"{step}_count", "send", None] == 0
    added = sum(samples[f"{step}_sum", name, None] for name in SOURCE_STEPS)
    assert added == pytest.approx(samples["migrated_downtime_seconds_sum", None, None])
