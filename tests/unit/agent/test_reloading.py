"""A running agent takes over another configuration at once, whatever closing and opening the guests' sockets takes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from migrated import config, daemon
from migrated.agent.requests import StartRequest
from migrated.errors import NotFoundError
from migrated.guests.process.source import ProcessHub
from migrated.source.agent import SourceAgent

PATIENCE_SECONDS = 20.0


def settings(directory: Path, *guests: str) -> config.AgentConfig:
    tables = {name: {"driver": "process", "socket": str(directory / f"{name}.sock")} for name in guests}
    return config.decode(
        {"agent": {"state_dir": str(directory)}, "tls": {"insecure": True}, "guests": tables}, "source"
    )


async def test_a_guest_that_is_gone_is_unknown_while_its_socket_is_still_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = SourceAgent(settings(tmp_path, "old"))
    agent._started = True
    closing, closed = asyncio.Event(), asyncio.Event()

    async def close(_hub: ProcessHub, *_: object) -> None:
        closing.set()
        await closed.wait()

    request = StartRequest.model_validate({"guest": "old", "to": "127.0.0.1:1"})
    async with agent._guests:
        with monkeypatch.context() as patched:
            patched.setattr(ProcessHub, "__aexit__", close)
            reloading = asyncio.create_task(agent.reload(settings(tmp_path, "new")))
            async with asyncio.timeout(PATIENCE_SECONDS):
                await closing.wait()
            try:
                with pytest.raises(NotFoundError):
                    await agent.start(request)
            finally:
                closed.set()
                await reloading
        assert agent.guests() == ["new"]


async def test_a_reload_that_fails_unforeseen_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, event, tries = SourceAgent(settings(tmp_path)), asyncio.Event(), asyncio.Queue[int]()

    def load(*_: object) -> config.AgentConfig:
        tries.put_nowait(1)
        raise OSError("unforeseen")

    monkeypatch.setattr(config, "load", load)
    task = asyncio.create_task(daemon._reload_on(event, agent))
    try:
        for _ in range(2):
            event.set()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await tries.get()
    finally:
        task.cancel()
        await asyncio.wait({task})
