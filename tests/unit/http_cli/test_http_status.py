from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from migrated import __version__, daemon
from migrated.agent.record import State
from migrated.agent.requests import StartRequest
from migrated.http import reading
from tests.unit.http_cli.served import Served, settings_for

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = StartRequest.model_validate({"guest": "vm1", "to": "b:1"})


async def metrics(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    async with served.status() as http, http.get("/metrics") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        text = await answer.text()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_status_says_who_how_and_what(source: Served) -> None:
    record = await source.agent.start(START)
    async with source.status() as http, http.get("/status") as answer:
        status = await answer.json()
    assert (status["name"], status["role"], status["version"]) == ("host-a", "source", __version__)
    assert status["guests"] == ["vm1", "other"]
    (migration,) = status["migrations"]
    assert migration["id"] == record.id
    promised = {
        *("id", "guest", "role", "state", "mode", "page_size", "total_bytes", "transferred_bytes", "remaining_bytes"),
        *(
            "round",
            "dirty_bytes_per_second",
            "throughput_bytes_per_second",
            "stale_pages",
            "stale_bytes",
            "downtime_seconds",
            "faults",
        ),
        *("fault_seconds", "started_at", "ended_at", "error"),
    }
    assert promised <= set(migration)
    assert set(migration["fault_seconds"]) == {"p50", "p99", "max", "histogram_log2_us"}


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7442", "127.0.0.1.evil.example", "evil.example.", "localhost.evil.example"),
        *("[::1", "", "::1", "[evil.example]:7442", "[::1]evil.example", "evil.example:@127.0.0.1", "0x7f.1", "127.1"),
    ],
)
@pytest.mark.parametrize("path", ["/status", "/metrics", "/"])
async def test_a_page_elsewhere_reads_nothing_by_a_name_that_leads_here(source: Served, path: str, host: str) -> None:
    """DNS rebinding: a browser takes the answer for its own site's, whose name has come to mean 127.0.0.1."""
    async with source.status() as http, http.get(path, headers={"Host": host}) as answer:
        assert answer.status == 421
        assert "http.status" in (await answer.json())["error"]["hint"]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]:7442", "localhost:7442", "LOCALHOST", "host-a", "192.0.2.7:80"])
async def test_addresses_and_the_names_of_this_host_are_answered(source: Served, host: str) -> None:
    async with source.status() as http, http.get("/healthz", headers={"Host": host}) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),  # a load balancer's check
        (b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 421),
        (b"GET http://evil.example/healthz HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 421),
    ],
)
async def test_every_host_counts_that_a_request_names(source: Served, request_: bytes, status: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(source.status_url.rpartition(":")[2]))
    writer.write(request_)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    # aiohttp itself refuses a second Host, in its newer versions.
    assert int(answer.split()[1]) in ({status, 400} if request_.count(b"Host") > 1 else {status})


@pytest.mark.parametrize("path", ["/v1/migrations", "/v1/migrations/vm1/abort", "/status", "/", "/nothing"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_nothing_can_be_changed_over_the_status_site(source: Served, method: str, path: str) -> None:
    await source.agent.start(START)
    async with source.status() as http, http.request(method, path, json={}) as answer:
        assert answer.status == 405
        assert "read-only" in (await answer.json())["error"]["hint"]
    assert source.agent.record("vm1").state is State.PRECOPY


async def test_reading_half_of_the_api_is_there(source: Served) -> None:
    await source.agent.start(START)
    await source.agent.abort("vm1")
    async with source.status() as http:
        async with http.get("/v1/migrations?ended=false") as answer:
            assert (await answer.json())["migrations"] == []
        async with http.get("/v1/migrations/vm1") as answer:
            assert (await answer.json())["state"] == "aborted"
        async with http.get("/v1/migrations?ended=maybe") as answer:
            assert answer.status == 400
        async with http.get("/v1/migrations/nobody") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not-found")


async def test_a_head_request_opens_no_event_stream(source: Served) -> None:
    await source.agent.start(START)
    async with source.status() as http, http.head("/v1/migrations/vm1/events") as answer:
        assert answer.status == 405


async def test_event_streams_are_few_on_the_status_site_and_unlimited_on_the_control_socket(
    source: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_WATCHERS", 1)
    await source.agent.start(START)
    events = "/v1/migrations/vm1/events"
    async with source.status() as http, http.get(events) as first, http.get(events) as second:
        assert (first.status, second.status) == (200, 503)
        assert "event streams" in (await second.json())["error"]["message"]
    async with source.control() as http, http.get(events) as first, http.get(events) as second:
        assert (first.status, second.status) == (200, 200)


async def test_health_and_readiness(source: Served) -> None:
    async with source.status() as http:
        for path in ("/healthz", "/readyz"):
            async with http.get(path) as answer:
                assert answer.status == 200
        source.agent.sick = ["fault thread of vm1 is silent"]
        for path in ("/healthz", "/readyz"):
            async with http.get(path) as answer:
                assert answer.status == 503
                assert (await answer.json())["reasons"] == ["fault thread of vm1 is silent"]


async def test_metrics_follow_a_migration(source: Served) -> None:
    agent = source.agent
    record = await agent.start(START)
    now = await metrics(source)
    labels = (("guest", "vm1"), ("migration", record.id))
    assert now["migrated_agent_info", (("name", "host-a"), ("role", "source"), ("version", __version__))] == 1
    assert now["migrated_migrations", (("state", "precopy"),)] == 1
    assert now["migrated_migration_remaining_bytes", labels] == 1 << 29
    assert now["migrated_migrations_started_total", ()] == 1

    await agent.switchover(record.id)
    await agent.resume(record.id)
    now = await metrics(source)
    assert ("migrated_migration_remaining_bytes", labels) not in now
    assert now["migrated_migrations", (("state", "precopy"),)] == 0
    assert now["migrated_migrations_ended_total", (("result", "completed"),)] == 1
    assert now["migrated_transferred_bytes_total", ()] == 1000
    assert now["migrated_memory_bytes_total", (("kind", "zero"),)] == 24
    assert now["migrated_faults_total", (("kind", "stale"),)] == 2
    bucket = "migrated_fault_latency_seconds_bucket"
    assert now[bucket, (("kind", "current"), ("le", "6.4e-05"))] == 0
    assert now[bucket, (("kind", "current"), ("le", "0.000128"))] == 5
    assert now[bucket, (("kind", "missing"), ("le", "8.388608"))] == 0
    assert now[bucket, (("kind", "missing"), ("le", "+Inf"))] == 1
    assert now["migrated_fault_latency_seconds_sum", (("kind", "missing"),)] == 3.0
    assert now["migrated_downtime_seconds_bucket", (("le", "0.01"),)] == 0
    assert now["migrated_downtime_seconds_bucket", (("le", "0.025"),)] == 1


async def test_counters_never_fall_when_the_agent_forgets_a_record(source: Served) -> None:
    agent = source.agent
    for runs in (1, 2):
        record = await agent.start(START)
        await agent.switchover(record.id)
        await agent.resume(record.id)
        record.id = f"{runs:012x}"
        before = await metrics(source)
        agent.all.clear()
        after = await metrics(source)
        ours = [
            key for key in before if key[0].startswith("migrated") and key[0].endswith(("_total", "_bucket", "_sum"))
        ]
        assert {key: after[key] for key in ours} == {key: before[key] for key in ours}
        assert after["migrated_migrations_started_total", ()] == runs
        assert after["migrated_faults_total", (("kind", "current"),)] == 5 * runs
        assert after["migrated_downtime_seconds_count", ()] == runs


async def test_units_are_in_the_names(source: Served) -> None:
    for name, _labels in await metrics(source):
        assert name.startswith(("migrated_", "process_"))
        assert not re.search(r"_(ms|us|kb|mb|percent)\b", name)


@pytest.mark.parametrize(("status", "warned"), [("127.0.0.1:0", False), ("[::1]:0", False), ("0.0.0.0:0", True)])
def test_a_status_site_that_others_can_reach_is_warned_of(short_dir: Path, status: str, *, warned: bool) -> None:
    with capture_logs() as logs:
        daemon._warn_of_openness(settings_for(short_dir, "source", status))
    assert [entry["log_level"] for entry in logs] == ["warning"] * warned
