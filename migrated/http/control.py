"""The control API: the verbs of `HostAgent` over HTTP on the agent's Unix socket.

Whoever may open the socket (mode 0600) may do everything; there is no other right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from aiohttp import web

from migrated.agent.host_agent import HostAgent
from migrated.agent.requests import SetRequest, StartRequest
from migrated.http.errors import BadRequestError, errors_as_json, json_answer
from migrated.http.reading import ABOUT, AGENT, add_reading_routes, agent_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from migrated.agent.record import Record

MAX_BODY_BYTES: Final = 64 * 1024

Body = TypeVar("Body", bound=msgspec.Struct)


class EmptyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``abort`` and ``switchover``: nothing."""


class ResumeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``resume``; ``to``: HOST:PORT where the target is now, if it has moved."""

    to: str | None = None


class ConfirmBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``abandon``, ``force-run`` and ``discard``; ``confirm`` is the guest's name."""

    confirm: str


def control_app(agent: HostAgent[Any], about: dict[str, Any]) -> web.Application:
    """Build the application for the control socket."""
    app = web.Application(middlewares=[errors_as_json], client_max_size=MAX_BODY_BYTES)
    app[AGENT] = agent
    app[ABOUT] = about
    add_reading_routes(app)
    app.router.add_post("/v1/migrations", _post_migration)
    app.router.add_post("/v1/migrations/{id}/abort", _post_abort)
    app.router.add_post("/v1/migrations/{id}/switchover", _post_switchover)
    app.router.add_post("/v1/migrations/{id}/resume", _post_resume)
    app.router.add_post("/v1/migrations/{id}/set", _post_set)
    app.router.add_post("/v1/migrations/{id}/abandon", _post_abandon)
    app.router.add_post("/v1/migrations/{id}/force-run", _post_force_run)
    app.router.add_post("/v1/migrations/{id}/discard", _post_discard)
    return app


async def _post_migration(request: web.Request) -> web.Response:
    record = await agent_of(request).start(await _body(request, StartRequest))
    answer = json_answer(record, status=202)
    answer.headers["Location"] = f"/v1/migrations/{record.id}"
    return answer


async def _post_abort(request: web.Request) -> web.Response:
    await _body(request, EmptyBody)
    return await _verb(request, agent_of(request).abort)


async def _post_switchover(request: web.Request) -> web.Response:
    await _body(request, EmptyBody)
    return await _verb(request, agent_of(request).switchover)


async def _post_resume(request: web.Request) -> web.Response:
    body = await _body(request, ResumeBody)
    return await _verb(request, lambda migration: agent_of(request).resume(migration, body.to))


async def _post_set(request: web.Request) -> web.Response:
    body = await _body(request, SetRequest)
    if all(value is None for value in msgspec.structs.asdict(body).values()):
        message = "nothing to set"
        raise BadRequestError(message, hint=f"give at least one of {', '.join(SetRequest.__struct_fields__)}")
    return await _verb(request, lambda migration: agent_of(request).set(migration, body))


async def _post_abandon(request: web.Request) -> web.Response:
    body = await _body(request, ConfirmBody)
    return await _verb(request, lambda migration: agent_of(request).abandon(migration, confirm=body.confirm))


async def _post_force_run(request: web.Request) -> web.Response:
    body = await _body(request, ConfirmBody)
    return await _verb(request, lambda migration: agent_of(request).force_run(migration, confirm=body.confirm))


async def _post_discard(request: web.Request) -> web.Response:
    body = await _body(request, ConfirmBody)
    return await _verb(request, lambda migration: agent_of(request).discard(migration, confirm=body.confirm))


async def _verb(request: web.Request, verb: Callable[[str], Awaitable[Record]]) -> web.Response:
    # The agent looks the migration up: an id, a prefix of one, or the guest's name, so that all ways in agree.
    record = agent_of(request).record(request.match_info["id"])
    return json_answer(await verb(record.id))


async def _body(request: web.Request, kind: type[Body]) -> Body:
    """Decode the body, an absent one as ``{}``.  Raises BadRequestError."""
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        message = f"the body of {request.method} {request.path}: {error}"
        raise BadRequestError(message, hint=f"fields: {', '.join(kind.__struct_fields__) or 'none'}") from error
