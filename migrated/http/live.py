"""Serve what a page shows while a migration runs: changes of all migrations as one stream, page maps, figures over time.

`Feed` looks at the records twice a second for as long as somebody watches, and encodes what has changed once for all
watchers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from migrated.agent.answers import AgentChange, LogAnswer, PageMapAnswer
from migrated.agent.series import Series
from migrated.http.errors import json_answer
from migrated.http.openapi import Operation, add_route
from migrated.http.reading import (
    ABOUT,
    AGENT,
    KEEPALIVE_SECONDS,
    STOPPING,
    agent_of,
    answer_with_events,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from migrated.agent.host_agent import HostAgent
    from migrated.agent.record import Record

#: How often the feed looks for changes.
LOOK_SECONDS: Final = 0.5
#: The record of a migration that has ended may still change for so long.
SETTLED_SECONDS: Final = 10.0


class Feed:
    """The agent and its migrations as events, each with the number of the look that found it new.

    A watcher asks for what is newer than its last look.  So a slow one misses steps in between, and nothing piles up.
    """

    def __init__(self, agent: HostAgent[Any], about: dict[str, Any]) -> None:
        self._agent = agent
        self._about = about
        self._looks = 0
        self._looked = 0.0
        self._events: dict[str, tuple[int, bytes]] = {}  # by migration; "" is the agent
        self._settled: dict[str, Record] = {}

    def since(self, look: int) -> tuple[int, bytes]:
        """Return the number of the last look, and all events after ``look`` (0: all)."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS / 2 or not self._events:
            self._looked = now
            self._look()
        return self._looks, b"".join(event for number, event in self._events.values() if number > look)

    def _look(self) -> None:
        self._looks += 1
        status = summary(self._agent, self._about)
        ids = [record.id for record in status.migrations]
        self._note("", "agent", AgentChange(**{**msgspec.structs.asdict(status), "migrations": ids}))
        for record in status.migrations:
            if self._settled.get(record.id) is record:
                continue
            self._note(record.id, "record", record)
            if record.ended_at is not None and time.time() - record.ended_at > SETTLED_SECONDS:
                self._settled[record.id] = record
        known = {"", *ids}
        for gone in self._events.keys() - known:
            del self._events[gone]
            self._settled.pop(gone, None)

    def _note(self, key: str, kind: str, value: object) -> None:
        event = b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
        before = self._events.get(key)
        if before is None or before[1] != event:
            self._events[key] = (self._looks, event)


FEED: Final = web.AppKey("feed", Feed)


def add_live_routes(app: web.Application) -> None:
    """Add ``GET /v1/events``, ``/v1/migrations/ID/map`` and ``…/ID/series``."""
    app[FEED] = Feed(app[AGENT], app[ABOUT])
    for operation, handler in (
        (Operation("GET", "/v1/events", "The agent and every record at each change", "text/event-stream"), _get_events),
        (Operation("GET", "/v1/migrations/{id}/map", "The states of its memory", PageMapAnswer), _get_map),
        (Operation("GET", "/v1/migrations/{id}/series", "Its figures over time", Series), _get_series),
    ):
        add_route(app, operation, handler)


def add_log_route(app: web.Application) -> None:
    """Add ``GET /v1/migrations/ID/log``.  Only for the control socket: lines name paths and processes."""
    add_route(app, Operation("GET", "/v1/migrations/{id}/log", "The agent's log of it", LogAnswer), _get_log)


async def _get_log(request: web.Request) -> web.Response:
    history = await agent_of(request).history(request.match_info["id"])
    return json_answer(LogAnswer(history.log))


async def _get_map(request: web.Request) -> web.Response:
    return json_answer(PageMapAnswer(await agent_of(request).page_map(request.match_info["id"])))


async def _get_series(request: web.Request) -> web.Response:
    return json_answer((await agent_of(request).history(request.match_info["id"])).series)


async def _get_events(request: web.Request) -> web.StreamResponse:
    """Send the agent and every record as server-sent events, at first all of them and then what changes."""
    return await answer_with_events(request, lambda: _changes(request.app[FEED], request.app[STOPPING]))


async def _changes(feed: Feed, stopping: asyncio.Event) -> AsyncGenerator[bytes, None]:
    look, silent_since = 0, time.monotonic()
    while not stopping.is_set():
        look, events = feed.since(look)
        if events:
            yield events
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since >= KEEPALIVE_SECONDS:
            yield b": still here\n\n"
            silent_since = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await stopping.wait()
