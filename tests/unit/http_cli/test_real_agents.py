"""Both real agents behind the daemon's sites, without guests, after a restart: what the fake agent only pretends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from migrated import config, daemon
from migrated.agent import archive
from migrated.agent.archive import Archive
from migrated.agent.record import Record, State

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

PATIENCE_SECONDS = 20.0
ENDED = "000000000001"
ROLES: tuple[config.Role, ...] = ("source", "target")


@contextlib.asynccontextmanager
async def restarted(directory: Path, role: config.Role, port: int) -> AsyncIterator[aiohttp.ClientSession]:
    """The control socket of an agent in whose directory an earlier one completed a migration."""
    table: dict[str, Any] = {
        "agent": {"state_dir": str(directory / "state")},
        "http": {"status": f"127.0.0.1:{port}"},
        "tls": {"insecure": True},
    }
    if role == "target":
        table["listen"] = {"address": "127.0.0.1:0"}
    settings = config.decode(table, role)
    settings.state_dir.mkdir()
    former = Record(id=ENDED, guest="vm1", role=role, mode="hybrid", state=State.COMPLETED, ended_at=1.0)
    Archive(settings.state_dir / archive.NAME, keep=10).add(former)
    stop = asyncio.Event()
    serving = asyncio.create_task(daemon.serve(settings, daemon.build_agent(settings), stop))
    try:
        async with aiohttp.ClientSession(
            "http://agent", connector=aiohttp.UnixConnector(str(settings.control_socket))
        ) as session:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not await ready(session):
                    assert not serving.done(), serving.result()
                    await asyncio.sleep(0.01)
            yield session
    finally:
        stop.set()
        await serving


async def ready(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/v1/agent") as answer:
            return bool((await answer.json())["ready"])
    except aiohttp.ClientError:
        return False


@pytest.mark.parametrize("role", ROLES)
async def test_an_earlier_agents_migrations_are_listed_and_not_counted(
    short_dir: Path, unused_port: int, role: config.Role
) -> None:
    async with restarted(short_dir, role, unused_port) as agent:
        async with agent.get("/v1/migrations") as answer:
            assert [record["id"] for record in (await answer.json())["migrations"]] == [ENDED]
        async with agent.get("/v1/migrations?ended=false") as answer:
            assert (await answer.json())["migrations"] == []
        async with agent.get(f"/v1/migrations/{ENDED}/events") as answer:
            assert (await answer.text()).count("event: record") == 1
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{unused_port}/metrics") as answer:
            assert "\nmigrated_migrations_started_total 0.0\n" in await answer.text()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("verb", "body"),
    [("abort", {}), ("switchover", {}), ("resume", {}), ("set", {"max_rounds": 2}), ("abandon", {"confirm": "vm1"})],
)
async def test_no_verb_fits_a_migration_that_an_earlier_agent_ended(
    short_dir: Path, unused_port: int, role: config.Role, verb: str, body: dict[str, Any]
) -> None:
    async with restarted(short_dir, role, unused_port) as agent:
        for wanted in (ENDED, ENDED[:4], "vm1"):
            async with agent.post(f"/v1/migrations/{wanted}/{verb}", json=body) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"], error["state"]) == (409, "conflict", "completed")
        async with agent.post(f"/v1/migrations/nobody/{verb}", json=body) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not-found")


@pytest.mark.parametrize(("role", "status", "code"), [("source", 404, "unknown-guest"), ("target", 409, "conflict")])
async def test_a_guest_that_is_not_here_cannot_be_moved_from_here(
    short_dir: Path, unused_port: int, role: config.Role, status: int, code: str
) -> None:
    body = {"guest": "vm1", "to": "b:1"}
    async with (
        restarted(short_dir, role, unused_port) as agent,
        agent.post("/v1/migrations", json=body) as answer,
    ):
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (status, code)
        assert error["hint"]
