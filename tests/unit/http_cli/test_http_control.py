from __future__ import annotations

import asyncio
import stat
from typing import Any

import msgspec
import pytest

from migrated import errors
from migrated.agent.record import Record, State
from migrated.client import Address, Client, RemoteError, SetRequest, StartRequest
from migrated.errors import HostError, PeerError
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = {"guest": "vm1", "to": "host-b:7440"}
REQUEST = StartRequest.model_validate(START)


async def test_only_the_owner_may_open_the_control_socket(source: Served) -> None:
    assert stat.S_IMODE(source.settings.control_socket.stat().st_mode) == 0o600


async def test_start_answers_202_with_the_record_and_where_it_is(source: Served) -> None:
    async with source.control() as http, http.post("/v1/migrations", json={**START, "mode": "precopy"}) as answer:
        assert answer.status == 202
        record = msgspec.json.decode(await answer.read(), type=Record)
        assert answer.headers["Location"] == f"/v1/migrations/{record.id}"
        assert (record.guest, record.peer, record.mode) == ("vm1", "host-b:7440", "precopy")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/migrations", b"{", 400, "bad-request"),
        ("/v1/migrations", b"[]", 400, "bad-request"),
        ("/v1/migrations", b"", 400, "bad-request"),
        ("/v1/migrations", b'{"guest":"vm1"}', 400, "bad-request"),
        ("/v1/migrations", b'{"guest":"vm1","to":"b:1","sterams":1}', 400, "bad-request"),
        ("/v1/migrations", b'{"guest":"vm1","to":"b:1","streams":"two"}', 400, "bad-request"),
        ("/v1/migrations", b'{"guest":"nobody","to":"b:1"}', 404, "not-found"),
        ("/v1/migrations", b'{"guest":"refused","to":"b:1"}', 422, "guest-refused"),
        ("/v1/migrations", b'{"guest":"vm1","to":"b:1"}', 409, "conflict"),
        ("/v1/migrations/ffff/abort", b"", 404, "not-found"),
        ("/v1/migrations/other/abort", b'{"really":true}', 400, "bad-request"),
        ("/v1/migrations/other/abort", b"", 409, "conflict"),
        ("/v1/migrations/other/switchover", b"{}", 409, "conflict"),
        ("/v1/migrations/vm1/resume", b"", 409, "conflict"),
        ("/v1/migrations/vm1/set", b"", 400, "bad-request"),
        ("/v1/migrations/vm1/set", b'{"max_bandwidth":"fast"}', 400, "bad-request"),
        ("/v1/migrations/vm1/abandon", b"", 400, "bad-request"),
        ("/v1/migrations/vm1/abandon", b'{"confirm":"vm2"}', 409, "conflict"),
        ("/v1/migrations/vm1/force-run", b"", 400, "bad-request"),
        ("/v1/migrations/vm1/force-run", b'{"confirm":"vm2"}', 409, "conflict"),
        ("/v1/migrations/vm1/discard", b'{"confirm":"vm2"}', 409, "conflict"),
        ("/v1/migrations/vm1/fly", b"", 404, "not-found"),
    ],
)
async def test_what_does_not_fit_is_answered_with_an_error_object(
    source: Served, path: str, body: bytes, status: int, code: str
) -> None:
    async with source.control() as http:
        await (await http.post("/v1/migrations", json=START)).read()
        await (await http.post("/v1/migrations", json={**START, "guest": "other"})).read()
        await (await http.post("/v1/migrations/other/switchover")).read()
        async with http.post(path, data=body) as answer:
            error: dict[str, Any] = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (status, code)
            assert error["message"]
            assert set(error) <= {"code", "message", "hint", "state"}
            if status == 409:
                assert error["state"] in ("precopy", "postcopy")


async def test_guests_are_examined_for_whoever_may_open_the_control_socket_only(source: Served) -> None:
    async with source.control() as http, http.get("/v1/guests") as answer:
        report = await answer.json()
        assert answer.status == 200
        assert [(guest["name"], guest["migratable"]) for guest in report["guests"]] == [("vm1", True), ("other", False)]
        assert report["guests"][1]["error"]["code"] == "job-running"
    async with source.status() as http, http.get("/v1/guests") as answer:
        assert answer.status == 404


async def test_a_target_examines_no_guests(target: Served) -> None:
    async with target.control() as http, http.get("/v1/guests") as answer:
        assert answer.status == 409


async def test_a_body_without_end_is_refused(source: Served) -> None:
    async with source.control() as http, http.post("/v1/migrations", data=b" " * (1 << 20)) as answer:
        assert answer.status == 413
        assert "error" in await answer.json()


async def test_a_bug_in_a_verb_is_an_error_object_and_the_daemon_lives_on(
    source: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_request: object, **_: object) -> Record:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(source.agent, "start", broken)
    with pytest.raises(RemoteError, match="ZeroDivisionError: oh") as caught:
        await client.start(REQUEST)
    assert (caught.value.status, caught.value.code) == (500, "internal")
    assert await client.migrations() == []


def every_error() -> list[type[errors.MigratedError]]:
    kinds = [errors.MigratedError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [kind for kind in kinds if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", every_error())
async def test_only_a_bug_is_answered_as_one(
    source: Served, client: Client, monkeypatch: pytest.MonkeyPatch, kind: type[errors.MigratedError]
) -> None:
    async def fails(_request: object, **_: object) -> Record:
        raise kind("oh", kind=1) if kind is errors.NativeError else kind("oh")

    monkeypatch.setattr(source.agent, "start", fails)
    with pytest.raises(RemoteError) as caught:
        await client.start(REQUEST)
    bugs = (errors.MigratedError, errors.ProtocolError, errors.LocalProtocolError)
    assert (caught.value.status == 500) == (kind in bugs)


async def test_what_the_peer_said_reaches_the_user(
    source: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(_request: object, **_: object) -> Record:
        raise PeerError("host-b: no pages left", code="no-pages", hint="raise vm.nr_hugepages")

    monkeypatch.setattr(source.agent, "start", refused)
    with pytest.raises(RemoteError) as caught:
        await client.start(REQUEST)
    assert caught.value.as_dict() == {
        "code": "no-pages",
        "message": "host-b: no pages left",
        "hint": "raise vm.nr_hugepages",
    }


async def test_the_life_of_a_migration(client: Client) -> None:
    record = await client.start(REQUEST)
    assert record.state is State.PRECOPY
    limited = await client.set(record, SetRequest(max_bandwidth=1_250_000_000))
    assert limited.max_bandwidth_bytes_per_second == 1_250_000_000
    assert (await client.switchover(record.id[:12])).state is State.POSTCOPY
    resumed = await client.resume("vm1", to=Address("host-c", 7440))
    assert (resumed.state, resumed.peer) == (State.COMPLETED, "host-c:7440")
    assert [one.id for one in await client.migrations()] == [record.id]
    assert await client.migrations(ended=False) == []


async def test_events_tell_every_state_and_end_with_the_migration(source: Served, client: Client) -> None:
    record = await client.start(REQUEST)
    seen: list[State] = []
    async with asyncio.timeout(20):
        async for latest in client.events(record.id):
            seen.append(latest.state)
            if latest.state is State.PRECOPY:
                await source.agent.abort(record.id)
    assert seen == [State.PRECOPY, State.ABORTED]


async def test_events_are_server_sent_events(source: Served) -> None:
    async with source.control() as http:
        await (await http.post("/v1/migrations", json=START)).read()
        await (await http.post("/v1/migrations/vm1/abort")).read()
        async with http.get("/v1/migrations/vm1/events") as answer:
            assert answer.content_type == "text/event-stream"
            text = (await answer.read()).decode()
    event, data, empty = text.split("\n", 2)
    assert event == "event: record"
    assert msgspec.json.decode(data.removeprefix("data: "), type=Record).state is State.ABORTED
    assert empty == "\n"


async def test_events_of_an_unknown_migration_are_404(client: Client) -> None:
    with pytest.raises(RemoteError) as caught:
        await anext(aiter(client.events("ffff")))
    assert caught.value.status == 404


async def test_a_watcher_that_goes_away_leaves_nothing_behind(source: Served) -> None:
    await source.agent.start(REQUEST)
    async with source.control() as http, http.get("/v1/migrations/vm1/events") as answer:
        await answer.content.readline()
    async with source.control() as http, http.get("/v1/migrations/vm1/events") as answer:
        assert (await answer.content.readline()) == b"event: record\n"


async def test_stopping_ends_open_event_streams(source: Served) -> None:
    """The fixture's end would wait for this one otherwise: the test's own time limit is the assertion."""
    await source.agent.start(REQUEST)
    async with Client(str(source.settings.control_socket)) as client:
        assert (await anext(aiter(client.events("vm1")))).state is State.PRECOPY


async def test_a_target_starts_nothing(target: Served) -> None:
    async with Client(str(target.settings.state_dir)) as client:
        with pytest.raises(RemoteError, match="a target starts no migrations") as caught:
            await client.start(REQUEST)
    assert caught.value.status == 409


async def test_no_agent_is_said_so() -> None:
    async with Client("/nonexistent/control.sock") as client:
        with pytest.raises(HostError, match="no agent answers at /nonexistent"):
            await client.migrations()
