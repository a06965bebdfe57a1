"""The OpenAPI document describes what the sites do: schemathesis makes requests from it and checks every answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.core.result import Ok

from migrated.agent.record import ErrorInfo, Record, State
from migrated.agent.requests import EvacuateRequest
from migrated.http.access import Client, Right
from migrated.http.control import control_app
from migrated.http.openapi import OPERATIONS
from migrated.http.status import status_app
from tests.unit.http_cli.fake_agent import GUEST, FakeAgent, evacuation_of

ABOUT = {"name": "host-a", "version": "1", "pid": 1}
EXAMPLES = 20
#: A request that the schema allows may still be refused (text has rules that a schema cannot say), but never with a 500,
#: and never with an answer that is not described.
CHECKED = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


class Anybody:
    """Lets every client do everything; the socket's own judge does not know those that come over TCP."""

    hint = ""

    def client(self, _request: web.Request) -> Client:
        return Client("anybody", Right.CONTROL, {})


def control() -> web.Application:
    return control_app(agent(), ABOUT, Anybody())


def status() -> web.Application:
    return status_app(agent(), ABOUT)


def agent() -> FakeAgent:
    made = FakeAgent("source")
    for state in (State.FAILED, State.PRECOPY):
        made.all.append(Record(id=state.value, guest=GUEST, role="source", mode="hybrid", state=state))
    made.evacuated.append(evacuation_of(GUEST, EvacuateRequest.model_validate({"to": ["b:7440"]})))
    made.all[0].error = ErrorInfo(code="guest-died", message="it has exited")
    return made


@contextlib.contextmanager
def served(make: Callable[[], web.Application]) -> Iterator[str]:
    """Serve an application from a thread of its own; its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[web.AppRunner, int]:
        runner = web.AppRunner(make(), access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def ask(operation: schemathesis.APIOperation[Any, Any, Any, Any], url: str) -> set[int]:
    """Make requests, and check their answers; the statuses of these."""
    statuses: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def one(case: schemathesis.Case[Any]) -> None:
        if case.path_parameters and len(case.path_parameters["id"]) % 2:  # a migration that exists
            case.path_parameters["id"] = GUEST
        answer = case.call(base_url=url)
        statuses.add(answer.status_code)
        assert answer.status_code != 500, answer.text
        case.validate_response(answer, checks=CHECKED)

    one()
    return statuses


@pytest.mark.parametrize("make", [control, status])
def test_every_answer_is_as_the_document_says(make: Callable[[], web.Application]) -> None:
    with served(make) as url:
        schema = schemathesis.openapi.from_url(f"{url}/v1/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
        assert operations
        for operation in operations:
            if not operation.path.endswith(
                "/events"
            ):  # a stream ends with its migration: test_http_control.py reads it
                statuses = ask(operation, url)
                assert statuses - {404} or operation.label == "POST /v1/migrations", f"{operation.label}: {statuses}"


@pytest.mark.parametrize("make", [control, status])
def test_every_route_is_described(make: Callable[[], web.Application]) -> None:
    app = make()
    described = {(one.method, one.path) for one in app[OPERATIONS]}
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    pages = {("GET", "/"), ("GET", "/metrics")}  # for people and for Prometheus
    pages |= {route for route in routes if route[1].startswith("/assets/")}
    assert {route for route in routes if route[0] != "HEAD"} - pages == described
