"""What can be read while a guest moves and afterwards: the status site, metrics, events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.place import CRAWL, Guest, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Of each migration, as promised to whoever reads them.
FIELDS = {
    *("id", "guest", "role", "state", "mode", "page_size", "total_bytes", "transferred_bytes", "remaining_bytes"),
    *("round", "dirty_bytes_per_second", "throughput_bytes_per_second", "stale_pages", "downtime_seconds"),
    "downtime_breakdown",
    *("faults", "fault_seconds", "started_at", "ended_at", "error"),
}
FAULTS = {"current", "stale", "missing"}
FAULT_SECONDS = {"p50", "p99", "max", "histogram_log2_us"}


async def metrics(here: Place, agent: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(await here.get("/metrics", agent))}


def value(families: dict[str, Metric], name: str, suffix: str = "", **labels: str) -> float:
    """The one sample with these labels."""
    found = [
        sample.value
        for sample in families[name].samples
        if sample.name == name + suffix and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, families[name].samples
    return float(found[0])


async def status_of(here: Place, agent: str, migration: str) -> dict[str, Any]:
    status = json.loads(await here.get("/status", agent))
    assert {"name", "version", "role", "guests", "healthy", "ready", "migrations"} <= status.keys()
    assert (status["role"], status["healthy"], status["ready"]) == (agent, True, True)
    (record,) = [one for one in status["migrations"] if one["id"] == migration]
    assert record.keys() >= FIELDS
    assert record["faults"].keys() == FAULTS
    assert record["fault_seconds"].keys() == FAULT_SECONDS
    return dict(record)


async def test_figures_during_precopy(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    await here.until(migration, lambda record: record["throughput_bytes_per_second"] > 0)
    for agent in ("source", "target"):
        record = await status_of(here, agent, migration)
        assert (record["state"], record["guest"], record["role"]) == ("precopy", guest.name, agent)
        assert record["total_bytes"] == here.memory_bytes
        assert 0 < record["transferred_bytes"] < here.memory_bytes
        assert record["error"] is record["ended_at"] is record["downtime_seconds"] is None
        families = await metrics(here, agent)
        assert value(families, "migrated_migrations", state="precopy") == 1
        labels = {"migration": migration, "guest": guest.name}
        assert value(families, "migrated_migration_total_bytes", **labels) == here.memory_bytes
    sent = await metrics(here, "source")
    assert value(sent, "migrated_migration_remaining_bytes", migration=migration) > 0
    assert value(sent, "migrated_migration_bandwidth_limit_bytes_per_second", migration=migration) == 500_000
    await here.cli("abort", migration)
    await here.over(migration)
    await here.over(migration, "target")
    families = await metrics(here, "source")
    assert value(families, "migrated_migrations", state="precopy") == 0
    assert value(families, "migrated_migrations_ended", "_total", result="aborted") == 1
    assert families["migrated_migration_total_bytes"].samples == []
    await guest.assert_sound()


async def test_figures_during_postcopy_and_after(here: Place) -> None:
    guest = await here.guest("idle")
    before = await metrics(here, "target")
    migration = await here.start("idle", mode="postcopy", drain_bandwidth=CRAWL)
    for agent in ("source", "target"):  # the target knows it only once it has begun
        await here.until(migration, lambda record: record["state"] == "postcopy", agent)
    during = await status_of(here, "target", migration)
    assert during["stale_pages"] > 0
    assert value(await metrics(here, "target"), "migrated_migrations", state="postcopy") == 1
    await guest.arrived()  # touches every page: every stale one is a fault
    source = await here.over(migration)
    assert source["state"] == "completed"
    record = await here.over(migration, "target")
    for side, steps in (
        (source, {"stop", "scan", "map", "transfer", "load", "commit", "run"}),
        (record, {"load", "journal", "commit", "run"}),
    ):
        assert side["downtime_breakdown"].keys() >= steps
        assert sum(side["downtime_breakdown"].values()) == pytest.approx(side["downtime_seconds"])
    assert record == await status_of(here, "target", migration)
    faults = record["faults"]
    assert faults["stale"] > 0
    latency = record["fault_seconds"]
    assert sum(latency["histogram_log2_us"]) == sum(faults.values())
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    after = await metrics(here, "target")
    assert after["migrated_fault_latency_seconds"].type == "histogram"
    for kind in FAULTS:
        name = "migrated_fault_latency_seconds"
        grown = value(after, name, "_count", kind=kind) - value(before, name, "_count", kind=kind)
        assert grown == faults[kind]
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for sample in after[name].samples
            if sample.name.endswith("_bucket") and sample.labels["kind"] == kind
        ]
        assert buckets == sorted(buckets)
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        assert buckets[-1] == (float("inf"), value(after, name, "_count", kind=kind))
        assert value(after, "migrated_faults", "_total", kind=kind) >= faults[kind]
    assert value(after, "migrated_fault_latency_seconds", "_sum", kind="stale") > 0
    assert value(after, "migrated_downtime_seconds", "_count") >= 1


async def test_events_end_with_the_migration(here: Place, guest: Guest) -> None:
    migration = await here.start()
    records = [record async for record in here.source.events(migration)]
    assert records[-1]["state"] == "completed"
    assert all(record.keys() >= FIELDS for record in records)
    changes = [len(record["timeline"]) for record in records]
    assert changes == sorted(changes)
    sent = [record["transferred_bytes"] for record in records]
    assert sent == sorted(sent)
    assert [record["state"] async for record in here.source.events(migration)] == ["completed"]
    await guest.arrived()


async def test_health_while_nothing_is_wrong(here: Place) -> None:
    for agent in ("source", "target"):
        assert json.loads(await here.get("/healthz", agent))["healthy"] is True
        assert json.loads(await here.get("/readyz", agent))["ready"] is True
