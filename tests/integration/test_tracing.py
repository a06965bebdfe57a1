"""With `[tracing]`, a collector of OpenTelemetry gets one trace of each migration; one that fails disturbs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from migrated.waiting import within
from tests.integration.place import CRAWL, PATIENCE_SECONDS, Guest, Place, place

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclasses.dataclass(frozen=True)
class Span:
    """A span as it came."""

    role: str
    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]
    failed: bool


def attributes_of(described: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in described.attributes}


class Collector:
    """Takes spans over OTLP/HTTP.  ``refusing``: answers 400; ``hanging``: does not answer."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.asked: set[str] = set()  # roles of the agents that have sent something
        self.refusing = False
        self.hanging: asyncio.Event | None = None
        self._came = asyncio.Condition()

    async def take(self, request: web.Request) -> web.Response:
        body = ExportTraceServiceRequest.FromString(await request.read())
        async with self._came:
            self.asked |= {attributes_of(one.resource)["migrated.role"] for one in body.resource_spans}
            self._came.notify_all()
        if self.hanging is not None:
            await self.hanging.wait()
        if self.refusing or self.hanging is not None:
            return web.Response(status=400)
        for of_resource in body.resource_spans:
            resource = attributes_of(of_resource.resource)
            assert resource["service.name"] == "migrated"
            for span in (span for scope in of_resource.scope_spans for span in scope.spans):
                self.spans.append(
                    Span(
                        role=resource["migrated.role"],
                        name=span.name,
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        began=span.start_time_unix_nano,
                        ended=span.end_time_unix_nano,
                        attributes=attributes_of(span),
                        failed=span.status.code == span.status.STATUS_CODE_ERROR,
                    )
                )
        async with self._came:
            self._came.notify_all()
        return web.Response(body=b"", content_type="application/x-protobuf")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with within(PATIENCE_SECONDS, "the collector"), self._came:
            await self._came.wait_for(condition)

    async def trace(self, migration: str) -> list[Span]:
        """All spans of a migration, once it has ended on both sides."""

        def outer() -> list[Span]:
            return [span for span in self.spans if span.attributes.get("migrated.migration.id") == migration]

        await self.until(lambda: len(outer()) >= 2)
        (trace,) = {span.trace for span in outer()}
        return [span for span in self.spans if span.trace == trace]


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    """A collector and its address."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield collector, f"http://{host}:{port}"
    finally:
        if collector.hanging is not None:
            collector.hanging.set()
        await runner.cleanup()


def trace_everything(here: Place) -> None:
    for agent in (here.source, here.target):
        agent.table["tracing"] = {"enabled": True}


@contextlib.contextmanager
def variables(url: str) -> Iterator[None]:
    """What the agents get in their environment: nothing of this machine's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            patch.delenv(name)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as (one, url):
        with variables(url):
            yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agents(program: Path, collector: Collector) -> AsyncIterator[Place]:
    async with place(program, prepare=trace_everything) as here:
        yield here


def below(spans: list[Span], parent: Span) -> list[Span]:
    return sorted((span for span in spans if span.parent == parent.id), key=lambda span: span.began)


def named(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def check_nesting(spans: list[Span]) -> None:
    """No span ends before it begins, or lies outside of its parent on the same host; ids are unique."""
    by_id = {span.id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans:
        assert span.began <= span.ended, span
        parent = by_id.get(span.parent)
        if parent is not None and parent.role == span.role:
            assert parent.began <= span.began, (parent, span)
            assert span.ended <= parent.ended, (parent, span)


async def test_a_migration_is_one_trace_over_both_agents_and_part_of_the_callers(
    here: Place, guest: Guest, collector: Collector
) -> None:
    caller, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(here.source.socket))) as session,
        session.post(
            "http://agent/v1/migrations",
            json={"guest": guest.name, "to": here.address},
            headers={"traceparent": f"00-{caller}-{parent}-01"},
        ) as answer,
    ):
        migration = (await answer.json())["id"]
    records = {agent: await here.over(migration, agent) for agent in ("source", "target")}
    await guest.arrived()
    spans = await collector.trace(migration)
    assert {span.trace for span in spans} == {caller}
    check_nesting(spans)
    outer = {"source": named(spans, "migration"), "target": named(spans, "incoming migration")}
    assert (outer["source"].parent, outer["target"].parent) == (parent, outer["source"].id)
    assert outer["source"].attributes["server.port"] == int(here.address.rpartition(":")[2])
    for role, record in records.items():
        mine = [span for span in spans if span.role == role]
        phases = [span for span in below(mine, outer[role]) if span.name != "incoming migration"]
        assert [span.name for span in phases] == [step["state"] for step in record["timeline"]][:-1]
        assert outer[role].attributes["migrated.result"] == "completed"
        assert not any(span.failed for span in mine)
        steps = below(mine, named(mine, "switchover"))
        assert [step.name for step in steps] == list(record["downtime_breakdown"])
        for step in steps:
            seconds = record["downtime_breakdown"][step.name]
            assert (step.ended - step.began) / 1e9 == pytest.approx(seconds, abs=1e-6)
    rounds = below(spans, named([span for span in spans if span.role == "source"], "precopy"))
    numbers = list(range(1, len(rounds) + 1))
    assert rounds
    assert [(span.name, span.attributes["migrated.round.number"]) for span in rounds] == [("round", n) for n in numbers]


async def test_without_a_caller_the_trace_has_the_migrations_id(
    here: Place, guest: Guest, collector: Collector
) -> None:
    migration = await here.precopying()
    await here.cli("abort", migration)
    for agent in ("source", "target"):
        await here.over(migration, agent)
    spans = await collector.trace(migration)
    check_nesting(spans)
    assert {span.trace for span in spans} == {migration}
    for name in ("migration", "incoming migration"):
        outer = named(spans, name)
        assert outer.attributes["migrated.result"] == outer.attributes["error.type"] == "aborted"
        assert not outer.failed  # somebody asked for it
    await guest.assert_sound()


async def test_an_agent_that_takes_up_a_migration_continues_its_trace(here: Place, collector: Collector) -> None:
    guest = await here.guest("idle")
    migration = await here.start("idle", mode="postcopy", drain_bandwidth=CRAWL)
    for agent in (here.source, here.target):
        await here.until(migration, lambda record: record["state"] == "postcopy", agent.role)
    # What has ended is sent at once: the source's span and its post-copy are lost with the agent.
    await collector.until(
        lambda: (
            {("source", "switchover"), ("target", "switchover")}
            <= {(span.role, span.name) for span in collector.spans if span.trace == migration}
        )
    )
    await here.source.kill()
    await here.source.start()
    await here.until(migration, lambda record: record["state"] == "postcopy")
    await guest.arrived()  # touches every page
    for role in ("source", "target"):
        assert (await here.over(migration, role))["state"] == "completed"
    spans = await collector.trace(migration)
    check_nesting(spans)
    outer = named(spans, "migration")
    assert named(spans, "incoming migration").parent == outer.id
    names = [span.name for span in below(spans, outer) if span.role == "source"]
    assert names[:4] == ["setup", "precopy", "switchover", "postcopy-paused"]
    assert names[-1] == "postcopy"
    assert set(names[3:-1]) == {"postcopy-paused", "recovering"}
    interrupted = [span for span in spans if span.role == "target" and span.name == "postcopy"]
    assert {span.failed for span in interrupted} == {True, False}
    assert not max(interrupted, key=lambda span: span.began).failed


@pytest.mark.parametrize("how", ["refuses", "hangs"])
async def test_a_collector_that_fails_disturbs_no_migration_and_no_agents_end(program: Path, how: str) -> None:
    async with collecting() as (collector, url):
        if how == "refuses":
            collector.refusing = True
        else:
            collector.hanging = asyncio.Event()
        with variables(url):
            async with place(program, prepare=trace_everything) as here:
                guest = await here.guest()
                migration = await here.start()
                for agent in ("source", "target"):
                    assert (await here.over(migration, agent))["state"] == "completed"
                await collector.until(lambda: collector.asked == {"source", "target"})
                await guest.arrived()
                assert [*await asyncio.gather(here.source.stop(), here.target.stop())] == [0, 0]
                if how == "refuses":
                    for role in ("source", "target"):
                        assert "OpenTelemetry" in [line["event"] for line in here.logged(role, "warning")]
    assert collector.spans == []
