"""`migrated.client`, as a program of somebody else's uses it: every request of the API, by the public names alone."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import inspect
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from migrated import client as public
from migrated.client import (
    Address,
    AgentChange,
    Client,
    ConnectionLostError,
    EvacuateRequest,
    MigratedError,
    NoAgentError,
    Record,
    RemoteError,
    RequestError,
    SetRequest,
    StartRequest,
    State,
    parse_address,
    parse_rate,
)
from migrated.http.access import Client as Asker
from migrated.http.access import Right
from migrated.http.control import control_app
from migrated.http.openapi import OPERATIONS
from migrated.http.status import status_app
from tests.unit.http_cli.fake_agent import GUEST, FakeAgent, evacuation_of

ABOUT = {"name": "host-a", "version": "1", "pid": 1}
HOST_B = Address("host-b", 7440)
START = StartRequest(guest=GUEST, to=HOST_B)
EVACUATE = EvacuateRequest(to=[HOST_B])
PATIENCE_SECONDS = 30.0


class Anybody:
    """Lets every client do everything."""

    hint = ""

    def client(self, _request: web.Request) -> Asker:
        return Asker("anybody", Right.CONTROL, {})


def control(agent: FakeAgent) -> web.Application:
    return control_app(agent, ABOUT, Anybody())


def status(agent: FakeAgent) -> web.Application:
    return status_app(agent, ABOUT)


@contextlib.asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[Client]:
    """A client of an application."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}") as client, asyncio.timeout(PATIENCE_SECONDS):
            yield client
    finally:
        await runner.cleanup()


# ---------------------------------------------------------------- every request


async def first(client: Client) -> AgentChange | Record:
    async with contextlib.aclosing(client.changes()) as changes:
        return await anext(changes)


#: A call of each method.  The migration `failed` has ended; the agent refuses what does not fit it.
CALLS: dict[str, Callable[[Client], Awaitable[object]]] = {
    "about": lambda client: client.about(),
    "abandon": lambda client: client.abandon("failed", confirm="other"),
    "abort": lambda client: client.abort("failed"),
    "abort_evacuation": lambda client: client.abort_evacuation("e1"),
    "changes": first,
    "discard": lambda client: client.discard("failed", confirm="other"),
    "evacuate": lambda client: client.evacuate(EVACUATE),
    "evacuation": lambda client: client.evacuation("e1"),
    "evacuations": lambda client: client.evacuations(),
    "events": lambda client: anext(client.events("failed")),
    "force_run": lambda client: client.force_run("failed", confirm="other"),
    "guests": lambda client: client.guests(),
    "health": lambda client: client.health(),
    "log": lambda client: client.log("failed"),
    "migration": lambda client: client.migration("failed"),
    "migrations": lambda client: client.migrations(),
    "openapi": lambda client: client.openapi(),
    "page_map": lambda client: client.page_map("failed"),
    "readiness": lambda client: client.readiness(),
    "resume": lambda client: client.resume("failed", to=HOST_B),
    "series": lambda client: client.series("failed"),
    "set": lambda client: client.set("failed", SetRequest(max_rounds=1)),
    "start": lambda client: client.start(START),
    "status": lambda client: client.status(),
    "switchover": lambda client: client.switchover("failed"),
    "wait": lambda client: client.wait("failed"),
}


async def operations_called(make: Callable[[FakeAgent], web.Application]) -> tuple[set[object], set[object]]:
    """The operations that an application describes, and those that it was asked for when every method was called."""
    agent = FakeAgent("source")
    agent.all.append(Record(id="failed", guest=GUEST, role="source", mode="hybrid", state=State.FAILED))
    agent.evacuated.append(evacuation_of("e1", EVACUATE))
    app = make(agent)
    called: set[object] = set()

    @web.middleware
    async def note(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        resource = request.match_info.route.resource
        called.add((request.method, resource.canonical if resource is not None else request.path))
        return await handler(request)

    app.middlewares.insert(0, note)
    described: set[object] = {(one.method, one.path) for one in app[OPERATIONS]}
    async with served(app) as client:
        for call in CALLS.values():
            with contextlib.suppress(RemoteError):  # an answer that is not understood is another error
                await call(client)
    return described, called


@pytest.mark.parametrize("make", [control, status])
async def test_every_operation_that_the_document_describes_has_a_method(
    make: Callable[[FakeAgent], web.Application],
) -> None:
    described, called = await operations_called(make)
    assert described - called == set()


def methods() -> dict[str, Callable[..., object]]:
    return {name: method for name, method in inspect.getmembers(Client, inspect.isfunction) if name[0] != "_"}


def test_every_method_is_called_above() -> None:
    assert methods().keys() == CALLS.keys()


# ---------------------------------------------------------------- types


def test_the_signatures_use_public_names_only() -> None:
    known = {*public.__all__, *dir(builtins), "AsyncGenerator"}
    for name, method in methods().items():
        words = {word for text in inspect.get_annotations(method).values() for word in re.findall(r"\w+", text)}
        assert words <= known, name
        assert "Any" not in words, name


def test_every_public_name_is_there_and_documented() -> None:
    assert [*public.__all__] == sorted(public.__all__)
    for name in public.__all__:
        assert inspect.getdoc(getattr(public, name)), name


def test_the_client_loads_nothing_of_an_agents_machinery() -> None:
    script = "import migrated.client, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    machinery = {
        *("_cffi_backend", "aiohttp.web", "click", "cryptography", "libvirt", "msgpack", "prometheus_client"),
        *("qemu", "rich", "structlog", "uvloop"),
    }
    assert loaded & machinery == set()
    ours = {name.removeprefix("migrated.") for name in loaded if name.startswith("migrated.")}
    words = {"address", "errors", "log_lines", "options", "paths", "settings", "units", "memory", "memory.page_map"}
    data = {"agent", *(f"agent.{name}" for name in ("answers", "evacuation", "record", "requests", "series"))}
    assert {name for name in ours if name.partition(".")[0] != "client"} <= words | data


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(public.__file__).parents[1] / "py.typed").exists()


# ---------------------------------------------------------------- requests


def test_a_request_takes_what_a_program_has_and_sends_what_the_agent_reads() -> None:
    request = StartRequest(
        guest="vm1", to=Address("fe80::1", 7440), max_bandwidth=parse_rate("1Gbit"), downtime_limit_ms=30
    )
    sent = request.model_dump_json(exclude_unset=True)
    assert msgspec.json.decode(sent) == {
        "guest": "vm1",
        "to": "[fe80::1]:7440",
        "max_bandwidth": "125000000B",
        "downtime_limit_ms": 30,
    }
    assert StartRequest.model_validate_json(sent) == request
    two = EvacuateRequest(to=[HOST_B, parse_address("host-c:7440")])
    assert EvacuateRequest.model_validate_json(two.model_dump_json(exclude_unset=True)) == two
    assert (
        SetRequest.model_validate_json(SetRequest(max_bandwidth=0).model_dump_json(exclude_unset=True)).max_bandwidth
        == 0
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StartRequest(guest="vm1", to=HOST_B, streams=99), "StartRequest: streams: 99 is not allowed"),
        (lambda: StartRequest(guest="vm1", to=HOST_B, max_bandwidth=-1), "max_bandwidth: '-1B' is not a rate"),
        (lambda: StartRequest(guest="vm1", to=Address("host-b", 0)), "to: 'host-b:0' is not an address"),
        (lambda: StartRequest(guest="vm1", to=HOST_B, stream=2), "stream: no such key"),  # type: ignore[call-arg] # refused by the type checker, too
        (lambda: EvacuateRequest(to=[HOST_B, HOST_B]), "to: host-b:7440 is named twice"),
        (lambda: EvacuateRequest(to=[]), "to: "),
        (SetRequest, "nothing to set"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_it_is_sent(make: Callable[[], object], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        make()
    assert says in caught.value.message
    assert caught.value.code == "bad-request"
    assert caught.value.hint


# ---------------------------------------------------------------- errors


def answering(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], *paths: str) -> web.Application:
    app = web.Application()
    for path in paths:
        app.router.add_get(path, handler)
    return app


async def test_a_refusal_has_the_status_and_the_state() -> None:
    async with served(control(FakeAgent("source"))) as client:
        record = await client.start(START)
        with pytest.raises(RemoteError) as caught:
            await client.start(START)
    assert record.state is State.PRECOPY
    assert (caught.value.status, caught.value.code, caught.value.state) == (409, "conflict", "precopy")
    assert isinstance(caught.value, MigratedError)


async def test_an_answer_of_something_else_is_refused_with_its_status() -> None:
    async def page(_request: web.Request) -> web.Response:
        return web.Response(status=502, text="<html>Bad Gateway</html>")

    async with served(answering(page, "/v1/agent")) as client:
        with pytest.raises(RemoteError) as caught:
            await client.about()
    assert (caught.value.status, caught.value.code) == (502, "bad-answer")


async def test_nobody_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    async with Client(tmp_path / "control.sock") as client:
        with pytest.raises(NoAgentError) as caught:
            await client.about()
    assert caught.value.code == "no-agent"


async def test_a_client_that_is_not_entered_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Client("/nowhere").about()


# ---------------------------------------------------------------- events


async def test_the_status_site_answers_whether_the_agent_is_well() -> None:
    agent = FakeAgent("source")
    async with served(status(agent)) as client:
        assert not (await client.readiness()).ready
        agent.started.set()
        assert (await client.readiness()).ready
        agent.sick = ["fault thread of vm1 is silent"]
        health = await client.health()
        assert (health.healthy, health.reasons) == (False, agent.sick)
        assert (await client.about()).reasons == agent.sick


async def test_waiting_ends_with_the_migration() -> None:
    agent = FakeAgent("source")
    async with served(control(agent)) as client:
        record = await client.start(START)
        waiting = asyncio.create_task(client.wait(record))
        async with contextlib.aclosing(client.events(GUEST)) as events:
            assert (await anext(events)).state is State.PRECOPY
            await client.abort(record)
            assert (await anext(events)).state is State.ABORTED
        assert (await waiting).state is State.ABORTED


async def test_changes_begin_with_everything() -> None:
    agent = FakeAgent("source")
    async with served(control(agent)) as client:
        record = await client.start(START)
        async with contextlib.aclosing(client.changes()) as changes:
            about, latest = await anext(changes), await anext(changes)
            assert isinstance(about, AgentChange)
            assert about.migrations == [record.id]
            assert isinstance(latest, Record)
            await client.abort(record)
            changed = await anext(changes)
            assert isinstance(changed, Record)
            assert (changed.id, changed.state) == (record.id, State.ABORTED)


@pytest.mark.parametrize("state", [State.COMPLETED, State.POSTCOPY])
async def test_a_stream_that_breaks_off_is_not_taken_for_the_end(state: State) -> None:
    """The agent stops: its stream ends, and it may still answer."""

    async def events(_request: web.Request) -> web.Response:
        record = Record(id="1", guest=GUEST, role="source", mode="hybrid", state=State.POSTCOPY)
        body = b"event: record\ndata: " + msgspec.json.encode(record) + b"\n\n"
        return web.Response(body=body, content_type="text/event-stream")

    async def now(_request: web.Request) -> web.Response:
        record = Record(id="1", guest=GUEST, role="source", mode="hybrid", state=state)
        return web.Response(body=msgspec.json.encode(record), content_type="application/json")

    app = answering(now, "/v1/migrations/1")
    app.router.add_get(f"/v1/migrations/{GUEST}/events", events)
    async with served(app) as client:
        if state is State.COMPLETED:
            assert (await client.wait(GUEST)).state is state
        else:
            with pytest.raises(ConnectionLostError, match="stopped while migration 1 was in state postcopy") as caught:
                await client.wait(GUEST)
            assert caught.value.code == "agent-stopped"


async def test_as_many_migrations_can_be_followed_as_there_are() -> None:
    agent = FakeAgent("source")
    agent.all += [
        Record(id=f"{n:04}", guest=f"vm{n}", role="source", mode="hybrid", state=State.PRECOPY) for n in range(150)
    ]
    async with served(control(agent)) as client, contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(contextlib.aclosing(client.events(record))) for record in agent.all]
        assert {record.id for record in [await anext(stream) for stream in streams]} == {one.id for one in agent.all}
        assert (await client.about()).name == "host-a"
