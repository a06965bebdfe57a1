"""Serve the control API: the verbs of `HostAgent` over HTTP on the agent's Unix socket.

`migrated.http.access` decides who may use it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from aiohttp import web
from pydantic import ValidationError

from migrated.agent.evacuation import Evacuation
from migrated.agent.host_agent import HostAgent
from migrated.agent.record import Record
from migrated.agent.requests import (
    ConfirmRequest,
    EvacuateRequest,
    GuestList,
    ResumeRequest,
    SetRequest,
    StartRequest,
)
from migrated.http.access import Judge, only_for
from migrated.http.errors import REFUSED, BadRequestError, errors_as_json, json_answer
from migrated.http.live import add_live_routes, add_log_route
from migrated.http.openapi import Operation, add_document, add_route
from migrated.http.reading import ABOUT, AGENT, add_reading_routes, agent_of
from migrated.settings import Table, explain

MAX_BODY_BYTES: Final = 64 * 1024
#: How long a client may take to send a body.
BODY_SECONDS: Final = 10.0

JUDGE: Final = web.AppKey("judge", Judge)
Body = TypeVar("Body", bound=Table)


class EmptyBody(Table):
    """No keys."""


#: For each verb of a migration, what it does, the body it takes and the request it makes to the agent.
_VERBS: Final[dict[str, tuple[str, type[Table], Callable[[HostAgent[Any], str, Any], Awaitable[Record]]]]] = {
    "abort": (
        "Abort it; the guest runs on at its source",
        EmptyBody,
        lambda agent, migration, _: agent.abort(migration),
    ),
    "switchover": ("End pre-copy now", EmptyBody, lambda agent, migration, _: agent.switchover(migration)),
    "resume": (
        "Reconnect a paused post-copy now",
        ResumeRequest,
        lambda agent, migration, body: agent.resume(migration, body.to and str(body.to)),
    ),
    "set": ("Change its limits", SetRequest, lambda agent, migration, body: agent.set(migration, body)),
    "abandon": (
        "Give up the pages that never arrived",
        ConfirmRequest,
        lambda agent, migration, body: agent.abandon(migration, confirm=body.confirm),
    ),
    "force-run": (
        "Run the guest on this host",
        ConfirmRequest,
        lambda agent, migration, body: agent.force_run(migration, confirm=body.confirm),
    ),
    "discard": (
        "End what is left of the guest on this host",
        ConfirmRequest,
        lambda agent, migration, body: agent.discard(migration, confirm=body.confirm),
    ),
}


def control_app(agent: HostAgent[Any], about: dict[str, Any], judge: Judge) -> web.Application:
    """Build the application for the control socket."""
    # In this order, `only_for` sees the status of every answer, and its own refusals become answers, too.
    app = web.Application(middlewares=[errors_as_json, only_for(judge), errors_as_json], client_max_size=MAX_BODY_BYTES)
    app[AGENT] = agent
    app[REFUSED] = agent.refused
    app[ABOUT] = about
    app[JUDGE] = judge
    add_reading_routes(app)
    add_live_routes(app)
    add_log_route(app)
    add_route(app, Operation("GET", "/v1/guests", "Guests, and why some cannot be migrated", GuestList), _get_guests)
    start = Operation("POST", "/v1/migrations", "Start a migration", Record, StartRequest, statuses=(202,))
    add_route(app, start, _post_migration)
    summary = "Migrate many guests away; a dry run only plans"
    evacuate = Operation("POST", "/v1/evacuations", summary, Evacuation, EvacuateRequest, statuses=(200, 202))
    add_route(app, evacuate, _post_evacuation)
    summary = "Start nothing further, and abort what can be aborted"
    abort = Operation("POST", "/v1/evacuations/{id}/abort", summary, Evacuation, EmptyBody)
    add_route(app, abort, _post_evacuation_abort)
    for verb, (summary, kind, ask) in _VERBS.items():
        operation = Operation("POST", f"/v1/migrations/{{id}}/{verb}", summary, Record, kind)
        add_route(app, operation, functools.partial(_post_verb, kind, ask))
    add_document(app, "migrated: control of an agent")
    return app


async def _get_guests(request: web.Request) -> web.Response:
    # Not on the status site: it takes the guests' monitors for a moment.
    return json_answer(await agent_of(request).survey())


async def _post_migration(request: web.Request) -> web.Response:
    traceparent = request.headers.get("traceparent", "")
    record = await agent_of(request).start(await _body(request, StartRequest), traceparent=traceparent)
    record.requested_by = request.app[JUDGE].client(request).name
    answer = json_answer(record, status=202)
    answer.headers["Location"] = f"/v1/migrations/{record.id}"
    return answer


async def _post_evacuation(request: web.Request) -> web.Response:
    evacuation = await agent_of(request).evacuate(await _body(request, EvacuateRequest))
    evacuation.requested_by = request.app[JUDGE].client(request).name
    answer = json_answer(evacuation, status=200 if evacuation.ended else 202)
    if not evacuation.ended:  # a dry run's plan is not kept
        answer.headers["Location"] = f"/v1/evacuations/{evacuation.id}"
    return answer


async def _post_evacuation_abort(request: web.Request) -> web.Response:
    await _body(request, EmptyBody)
    return json_answer(await agent_of(request).abort_evacuation(request.match_info["id"]))


async def _post_verb(
    kind: type[Table], ask: Callable[[HostAgent[Any], str, Any], Awaitable[Record]], request: web.Request
) -> web.Response:
    body = await _body(request, kind)
    agent = agent_of(request)
    # The agent looks the migration up: an id, a prefix of one, or the guest's name.  So all interfaces agree.
    record = agent.record(request.match_info["id"])
    return json_answer(await ask(agent, record.id, body))


async def _body(request: web.Request, kind: type[Body]) -> Body:
    """Decode the body; an absent one counts as ``{}``.  Raises BadRequestError."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    try:
        return kind.model_validate_json(data or b"{}")
    except ValidationError as error:
        problem, hint = explain(error, kind)
        raise BadRequestError(f"the body of {request.method} {request.path}: {problem}", hint=hint) from error
