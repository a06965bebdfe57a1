"""Serve the read-only routes, which the control socket and the status site share.

One of them streams a migration's record as server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from migrated.agent.answers import AgentStatus, Certificate, MigrationList
from migrated.agent.evacuation import Evacuation, EvacuationList
from migrated.agent.host_agent import HostAgent
from migrated.agent.record import Record
from migrated.errors import MigratedError, NotFoundError, error_fields
from migrated.http.errors import BadRequestError, json_answer
from migrated.http.openapi import Operation, add_route

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from migrated.link.credentials import Credentials

AGENT: Final = web.AppKey("agent", HostAgent[Any])
ABOUT: Final = web.AppKey("about", dict)
STOPPING: Final = web.AppKey("stopping", asyncio.Event)
#: The clients' addresses, one per event stream.  An application without it does not limit them.
WATCHERS: Final = web.AppKey("watchers", list)

#: A silent event stream carries a comment this often, so that we notice a client that has closed the connection.
KEEPALIVE_SECONDS: Final = 15.0
#: The limit of the status site, which anybody who reaches it may watch: each stream costs a task and a socket.
MAX_WATCHERS: Final = 64
#: Of these, one address may have so many.
MAX_WATCHERS_OF_ONE: Final = 48
#: How long a watcher may leave its events unread.
UNREAD_SECONDS: Final = 30.0


def agent_of(request: web.Request) -> HostAgent[Any]:
    """Return the agent behind this application."""
    return request.app[AGENT]


def summary(agent: HostAgent[Any], about: dict[str, Any], *, ended: bool = True) -> AgentStatus:
    """Return the answer of ``/status``: who we are, our health, and every migration."""
    health = agent.health()
    return AgentStatus(
        **about,
        role=agent.role,
        guests=agent.guests(),
        healthy=health.healthy,
        ready=health.ready,
        reasons=health.reasons,
        certificate=_certificate(agent.credentials),
        migrations=agent.records(ended=ended),
    )


def _certificate(credentials: Credentials | None) -> Certificate | None:
    if credentials is None:
        return None
    credentials.current()  # the files may have changed
    return Certificate(expires_at=credentials.expires_at, problems=credentials.problems())


def add_reading_routes(app: web.Application) -> None:
    """Add ``GET /v1/agent``, ``/v1/migrations``, ``/v1/migrations/ID`` and ``…/ID/events``, ``/v1/evacuations``, ``…/ID``."""
    for operation, handler in (
        (
            Operation("GET", "/v1/agent", "Who the agent is, its health and its active migrations", AgentStatus),
            _get_agent,
        ),
        (Operation("GET", "/v1/migrations", "All migrations", MigrationList, flags=("ended",)), _get_migrations),
        (Operation("GET", "/v1/migrations/{id}", "One migration", Record), _get_migration),
        (Operation("GET", "/v1/migrations/{id}/events", "Its record at each change", "text/event-stream"), _get_events),
        (Operation("GET", "/v1/evacuations", "Evacuations, the oldest first", EvacuationList), _get_evacuations),
        (Operation("GET", "/v1/evacuations/{id}", "One evacuation", Evacuation), _get_evacuation),
    ):
        add_route(app, operation, handler)
    app[STOPPING] = asyncio.Event()
    app.on_shutdown.append(_end_streams)


async def _end_streams(app: web.Application) -> None:
    app[STOPPING].set()


async def _get_agent(request: web.Request) -> web.Response:
    answer = summary(agent_of(request), request.app[ABOUT], ended=False)
    return json_answer(answer)


async def _get_migrations(request: web.Request) -> web.Response:
    ended = _flag(request, "ended", default=True)
    return json_answer(MigrationList(agent_of(request).records(ended=ended)))


async def _get_migration(request: web.Request) -> web.Response:
    return json_answer(agent_of(request).record(request.match_info["id"]))


async def _get_evacuations(request: web.Request) -> web.Response:
    return json_answer(EvacuationList(agent_of(request).evacuations()))


async def _get_evacuation(request: web.Request) -> web.Response:
    wanted = request.match_info["id"]
    for evacuation in agent_of(request).evacuations():
        if evacuation.id == wanted:
            return json_answer(evacuation)
    raise NotFoundError(f"no evacuation {wanted!r}", hint="`migrated evacuate --status` shows the last one")


async def _get_events(request: web.Request) -> web.StreamResponse:
    """Send the record as server-sent events, now and whenever it changes, until the migration has ended."""
    agent = agent_of(request)
    record = agent.record(request.match_info["id"])  # NotFoundError before the stream begins
    return await answer_with_events(request, lambda: _server_sent(agent.events(record.id), request.app[STOPPING]))


async def answer_with_events(
    request: web.Request, make: Callable[[], AsyncGenerator[bytes, None]]
) -> web.StreamResponse:
    """Send events, already encoded, until there are no more, or the client does not read them."""
    client = request.remote or ""
    watchers: list[str] | None = request.app.get(WATCHERS)
    if watchers is None:
        watchers = []
    elif len(watchers) >= MAX_WATCHERS or watchers.count(client) >= MAX_WATCHERS_OF_ONE:
        raise web.HTTPServiceUnavailable(reason="Too many event streams")
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    watchers.append(client)
    try:
        await answer.prepare(request)
        async with contextlib.aclosing(make()) as events:
            async for event in events:
                async with asyncio.timeout(UNREAD_SECONDS):
                    await answer.write(event)
        await answer.write_eof()
    except (ConnectionError, TimeoutError):
        pass  # the watcher closed the connection, as it may, or does not read
    finally:
        watchers.remove(client)
    return answer


async def _server_sent(records: AsyncIterator[Record], stopping: asyncio.Event) -> AsyncGenerator[bytes, None]:
    stop = asyncio.ensure_future(stopping.wait())
    upcoming: asyncio.Future[Record] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(records))
            while not upcoming.done() and not stop.done():
                await asyncio.wait({upcoming, stop}, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done() and not stop.done():
                    yield b": still here\n\n"
            if not upcoming.done():
                return
            try:
                yield b"event: record\ndata: " + msgspec.json.encode(upcoming.result()) + b"\n\n"
            except StopAsyncIteration:
                return
            except MigratedError as error:
                yield b"event: error\ndata: " + msgspec.json.encode({"error": error_fields(error)}) + b"\n\n"
                return
    finally:
        for future in (stop, upcoming):
            if future is not None:
                future.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                    await future
        if (close := getattr(records, "aclose", None)) is not None:
            await close()


def _flag(request: web.Request, name: str, *, default: bool) -> bool:
    text = request.query.get(name)
    if text is None:
        return default
    if text not in ("0", "1", "true", "false"):
        message = f"query {name}={text!r}: expected true or false"
        raise BadRequestError(message, hint="see docs/http.md")
    return text in ("1", "true")
