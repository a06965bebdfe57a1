"""Serve the read-only status site: ``/status /metrics /healthz /readyz /`` and the reading half of ``/v1``.

It refuses other methods, and requests for host names that are not its own.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from migrated.agent.answers import AgentStatus, Healthy, Ready
from migrated.http import dashboard
from migrated.http.errors import errors_as_json, json_answer
from migrated.http.live import add_live_routes
from migrated.http.metrics import exposition, make_registry
from migrated.http.openapi import Operation, add_document, add_route
from migrated.http.reading import ABOUT, AGENT, WATCHERS, add_reading_routes, agent_of, summary

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp.typedefs import Handler, Middleware

    from migrated.agent.host_agent import HostAgent

#: Nothing can be uploaded here.
MAX_BODY_BYTES: Final = 1024


def status_app(agent: HostAgent[Any], about: dict[str, Any], *, hosts: Collection[str] = ()) -> web.Application:
    """Build the application for the status address; ``hosts`` are the host names it answers to, beside localhost."""
    app = web.Application(
        middlewares=[_common_headers, errors_as_json, _only_for_hosts({"localhost", *hosts}), _read_only],
        client_max_size=MAX_BODY_BYTES,
    )
    app[AGENT] = agent
    app[ABOUT] = about
    app[WATCHERS] = []
    add_reading_routes(app)
    registry = make_registry(agent, about)
    add_live_routes(app)

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=exposition(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    dashboard.add_routes(app)
    app.router.add_get("/metrics", get_metrics)
    for operation, handler in (
        (Operation("GET", "/status", "Who the agent is, its health and its migrations", AgentStatus), _get_status),
        (
            Operation("GET", "/healthz", "Whether the agent works; 503 if not", Healthy, statuses=(200, 503)),
            _get_healthz,
        ),
        (
            Operation("GET", "/readyz", "Whether the agent accepts migrations; 503 if not", Ready, statuses=(200, 503)),
            _get_readyz,
        ),
    ):
        add_route(app, operation, handler)
    add_document(app, "migrated: status of an agent")
    return app


async def _get_status(request: web.Request) -> web.Response:
    return json_answer(summary(agent_of(request), request.app[ABOUT]))


async def _get_healthz(request: web.Request) -> web.Response:
    health = agent_of(request).health()
    return json_answer(Healthy(health.healthy, health.reasons), status=200 if health.healthy else 503)


async def _get_readyz(request: web.Request) -> web.Response:
    health = agent_of(request).health()
    ready = health.healthy and health.ready
    return json_answer(Ready(ready, health.reasons), status=200 if ready else 503)


@web.middleware
async def _read_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    # Check this before "not found", so that the answer to a verb sent here by mistake says why it cannot work.
    if request.method not in ("GET", "HEAD"):
        raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD"])
    return await handler(request)


def _only_for_hosts(names: Collection[str]) -> Middleware:
    """Refuse requests for other host names: a web page can make its name resolve to our address (DNS rebinding).

    An address needs no check: for a browser, the answer then belongs to that address and not to a page's name.
    """
    known = {name.lower() for name in names}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        # None at all is HTTP/1.0: every browser sends one.
        for host in request.headers.getall("Host", []):
            if not _is_address(host) and host.partition(":")[0].lower() not in known:
                raise web.HTTPMisdirectedRequest
        return await handler(request)

    return check


def _is_address(host: str) -> bool:
    """Whether it is ``192.0.2.7``, ``192.0.2.7:80``, ``[2001:db8::7]`` or ``[2001:db8::7]:80``."""
    bracketed = re.fullmatch(r"\[(.*)\](?::\d*)?", host)
    try:
        ipaddress.ip_address(bracketed[1] if bracketed else host.partition(":")[0])
    except ValueError:
        return False
    return True


@web.middleware
async def _common_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    answer = await handler(request)
    if not answer.prepared:
        answer.headers.setdefault("Cache-Control", "no-store")
        answer.headers.setdefault("X-Content-Type-Options", "nosniff")
        answer.headers.setdefault("X-Frame-Options", "DENY")
    return answer
