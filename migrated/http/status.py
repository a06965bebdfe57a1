"""The status site: looks, never touches.  ``/status /metrics /healthz /readyz /`` and the reading half of ``/v1``."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from migrated.http.errors import errors_as_json, json_answer
from migrated.http.metrics import exposition, make_registry
from migrated.http.reading import ABOUT, AGENT, add_reading_routes, agent_of, summary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from migrated.agent import Agent

#: There is nothing to upload here.
MAX_BODY_BYTES: Final = 1024
_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def status_app(agent: Agent, about: dict[str, Any]) -> web.Application:
    """Build the application for the status address."""
    app = web.Application(middlewares=[_common_headers, errors_as_json, _read_only], client_max_size=MAX_BODY_BYTES)
    app[AGENT] = agent
    app[ABOUT] = about
    add_reading_routes(app)
    registry = make_registry(agent, about)
    page = importlib.resources.files("migrated.http").joinpath("dashboard.html").read_text(encoding="utf-8")
    policy = _content_security_policy(page)

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=exposition(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def get_dashboard(_request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": policy}
        return web.Response(text=page, content_type="text/html", charset="utf-8", headers=headers)

    app.router.add_get("/", get_dashboard)
    app.router.add_get("/metrics", get_metrics)
    app.router.add_get("/status", _get_status)
    app.router.add_get("/healthz", _get_healthz)
    app.router.add_get("/readyz", _get_readyz)
    return app


async def _get_status(request: web.Request) -> web.Response:
    return json_answer(summary(agent_of(request), request.app[ABOUT]))


async def _get_healthz(request: web.Request) -> web.Response:
    health = agent_of(request).health()
    return json_answer({"healthy": health.healthy, "reasons": health.reasons}, status=200 if health.healthy else 503)


async def _get_readyz(request: web.Request) -> web.Response:
    health = agent_of(request).health()
    ready = health.healthy and health.ready
    return json_answer({"ready": ready, "reasons": health.reasons}, status=200 if ready else 503)


@web.middleware
async def _read_only(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    # Before "not found", so that a verb sent here by mistake learns why it cannot work.
    if request.method not in ("GET", "HEAD"):
        raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD"])
    return await handler(request)


@web.middleware
async def _common_headers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    answer = await handler(request)
    if not answer.prepared:
        answer.headers.setdefault("Cache-Control", "no-store")
        answer.headers.setdefault("X-Content-Type-Options", "nosniff")
        answer.headers.setdefault("X-Frame-Options", "DENY")
    return answer


def _content_security_policy(page: str) -> str:
    """Allow the page's own inline script and style by their hashes, requests to this site, and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for tag, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}"
    )
