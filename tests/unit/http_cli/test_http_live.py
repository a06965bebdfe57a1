"""What a page watches: every migration in one stream, page maps, figures over time; and the log, for the operator."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from migrated.agent.history import Kept
from migrated.agent.record import State
from migrated.agent.requests import StartRequest
from migrated.agent.series import Series
from migrated.http import live, reading
from migrated.log_lines import Line
from migrated.memory.page_map import PageMap
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = StartRequest.model_validate({"guest": "vm1", "to": "b:1"})
PATIENCE_SECONDS = 30.0


@contextlib.asynccontextmanager
async def watching(served: Served) -> AsyncIterator[AsyncIterator[tuple[str, dict[str, Any]]]]:
    """The events of ``/v1/events`` as they come."""

    async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        kind = ""
        async for line in answer.content:
            if line.startswith(b"event: "):
                kind = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield kind, json.loads(line[6:])

    async with asyncio.timeout(PATIENCE_SECONDS), served.status() as http, http.get("/v1/events") as answer:
        assert answer.content_type == "text/event-stream"
        yield events(answer)


async def test_a_watcher_gets_everything_and_then_what_changes(source: Served) -> None:
    first = await source.agent.start(START)
    first.guest = "moved"  # so that another of this name can start
    await source.agent.abort(first.id)
    second = await source.agent.start(START)
    async with watching(source) as events:
        kind, agent = await anext(events)
        assert (kind, agent["name"], agent["role"]) == ("agent", "host-a", "source")
        assert agent["migrations"] == [first.id, second.id]
        assert [(await anext(events))[1]["id"] for _ in range(2)] == [first.id, second.id]
        await source.agent.switchover(second.id)
        kind, record = await anext(events)  # and nothing of the other one
        assert (kind, record["id"], record["state"]) == ("record", second.id, "postcopy")
        source.agent.sick = ["fault thread of vm1 is silent"]
        kind, agent = await anext(events)
        assert (kind, agent["healthy"], agent["reasons"]) == ("agent", False, ["fault thread of vm1 is silent"])


async def test_a_watcher_learns_which_migrations_the_agent_has_forgotten(source: Served) -> None:
    record = await source.agent.start(START)
    async with watching(source) as events:
        assert (await anext(events))[1]["migrations"] == [record.id]
        await anext(events)
        source.agent.all.clear()
        kind, agent = await anext(events)
        assert (kind, agent["migrations"]) == ("agent", [])


async def test_a_record_that_has_settled_is_not_looked_at_again(
    source: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SETTLED_SECONDS", -1.0)
    record = await source.agent.start(START)
    await source.agent.abort(record.id)
    feed = live.Feed(source.agent, {"name": "host-a", "version": "1", "pid": 1})
    look, events = feed.since(0)
    assert b'"aborted"' in events
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.0)
    record.transferred_bytes += 1
    assert feed.since(look)[1] == b""
    source.agent.all[0] = await source.agent.move(type(record)(**{**_fields(record), "ended_at": None}), State.FAILED)
    assert b'"failed"' in feed.since(look)[1]  # another record of the same migration: a later agent continued it


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


async def test_streams_of_everything_count_as_watchers(source: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_WATCHERS", 1)
    await source.agent.start(START)
    async with source.status() as http, http.get("/v1/events") as first:
        assert first.status == 200
        for path in ("/v1/events", "/v1/migrations/vm1/events"):
            async with http.get(path) as second:
                assert second.status == 503


async def test_page_map_and_figures_over_time(source: Served) -> None:
    record = await source.agent.start(START)
    async with source.status() as http:
        async with http.get("/v1/migrations/vm1/map") as answer:
            assert await answer.json() == {"map": None}
        source.agent.kept[record.id] = Kept(
            series=Series(at=[1.0, 2.0], remaining_bytes=[7, 5]),
            page_map=PageMap(at=2.0, cell_bytes=4096, bytes_by_state={"sent": 4096}, cells={"sent": b"\xff\x00"}),
        )
        async with http.get("/v1/migrations/vm1/map") as answer:
            shown = (await answer.json())["map"]
            assert base64.b64decode(shown["cells"]["sent"]) == b"\xff\x00"
            assert (shown["cell_bytes"], shown["bytes_by_state"]) == (4096, {"sent": 4096})
        async with http.get("/v1/migrations/vm1/series") as answer:
            series = await answer.json()
            assert (series["at"], series["remaining_bytes"]) == ([1.0, 2.0], [7, 5])
        for what in ("map", "series"):
            async with http.get(f"/v1/migrations/nobody/{what}") as answer:
                assert answer.status == 404


async def test_the_log_is_for_the_control_socket_only(source: Served) -> None:
    record = await source.agent.start(START)
    source.agent.kept[record.id] = Kept(log=[Line(1.0, "info", "state", {"state": "precopy"})])
    async with source.control() as http, http.get("/v1/migrations/vm1/log") as answer:
        (line,) = (await answer.json())["log"]
        assert (line["level"], line["event"], line["fields"]) == ("info", "state", {"state": "precopy"})
    async with source.status() as http, http.get("/v1/migrations/vm1/log") as answer:
        assert answer.status == 404
