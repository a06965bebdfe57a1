"""Waiting until an incoming QEMU has loaded: by its events where they say enough, else by asking."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qemu.qmp import Message, QMPClient

from migrated.errors import GuestError
from migrated.guests.qemu.qmp import Monitor


class Answers(QMPClient):
    """Answers queries from a table, and counts them."""

    def __init__(self) -> None:
        super().__init__("vm")
        self.answers: dict[str, dict[str, Any]] = {
            "query-migrate": {"status": "completed"},
            "query-status": {"status": "paused"},
        }
        self.asked: list[str] = []

    async def execute(self, cmd: str, *_: object, **__: object) -> object:
        self.asked.append(cmd)
        return self.answers[cmd]


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Answers]:
    yield Answers()


async def loaded(client: Answers, *events: tuple[str, str]) -> str:
    """Wait for the end of loading on a monitor that sends these events, of ``(name, status)``."""
    with socket.socket(socket.AF_UNIX) as sock:
        monitor = Monitor("vm", Path("vm.qmp"), client, sock)
        for name, status in events:
            await monitor._events.put(Message({"event": name, "data": {"status": status} if status else {}}))
        return await monitor.wait_loaded(limit=5.0)


BEGIN = (("MIGRATION", "setup"), ("MIGRATION", "active"))


async def test_the_event_of_the_end_saves_the_queries(client: Answers) -> None:
    assert await loaded(client, *BEGIN, ("MIGRATION", "completed")) == "paused"
    assert client.asked == []


async def test_a_guest_that_was_resumed_meanwhile_is_asked_for_its_state(client: Answers) -> None:
    client.answers["query-status"] = {"status": "running"}
    assert await loaded(client, *BEGIN, ("RESUME", ""), ("MIGRATION", "completed")) == "running"


async def test_an_event_that_was_lost_is_made_up_for_by_queries(client: Answers) -> None:
    assert await loaded(client) == "paused"
    assert set(client.asked) == {"query-migrate", "query-status"}


async def test_a_failure_is_told_in_qemus_words(client: Answers) -> None:
    client.answers["query-migrate"] = {"status": "failed", "error-desc": "no such device"}
    with pytest.raises(GuestError, match="no such device") as caught:
        await loaded(client, *BEGIN, ("MIGRATION", "failed"))
    assert caught.value.code == "migration-failed"
