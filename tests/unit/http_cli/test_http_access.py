"""Who may use the control socket: ordinary users with and without the groups of the configuration."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from migrated import config
from migrated.agent.record import State
from migrated.agent.requests import StartRequest
from migrated.errors import ConfigError
from migrated.http.access import Access, Peer, Right
from tests.unit.http_cli.served import Served, serving

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = {"guest": "vm1", "to": "host-b:7440"}
USER, CONTROLLERS, READERS, OTHERS = 64001, 64002, 64003, 64004

INTERPRETER = os.path.realpath("/proc/self/exe")
#: A client that needs nothing but the interpreter, since an ordinary user may not be able to read this checkout.
CLIENT = """
import socket, sys
path, method, where, body = sys.argv[1:]
end = socket.socket(socket.AF_UNIX)
end.connect(path)
end.sendall(f"{method} {where} HTTP/1.1\\r\\nHost: agent\\r\\nConnection: close\\r\\n"
            f"Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
while data := end.recv(65536):
    sys.stdout.buffer.write(data)
"""


async def ask(served: Served, method: str, path: str, body: object = "", **user: Any) -> tuple[int, Any]:
    """One request of another user: its status and answer."""
    text = json.dumps(body) if body else ""
    process = await asyncio.create_subprocess_exec(
        *(INTERPRETER, "-I", "-S", "-c", CLIENT),
        *(str(served.settings.control_socket), method, path, text),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd="/",
        **user,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    if process.returncode:
        raise ConnectionRefusedError(err.decode())
    head, _, answer = out.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(answer)


def user(*groups: int, primary: int = OTHERS) -> dict[str, Any]:
    return {"user": USER, "group": primary, "extra_groups": groups}


@pytest.fixture
def open_dir(short_dir: Path) -> Iterator[Path]:
    """A directory that everybody may pass through, with a usual umask: modes must be set, not inherited."""
    short_dir.chmod(0o711)
    former = os.umask(0o022)
    yield short_dir
    os.umask(former)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.root
@pytest.mark.parametrize("groups", [{"primary": CONTROLLERS}, {}], ids=["primary", "supplementary"])
async def test_members_of_the_group_control_the_agent(open_dir: Path, unused_port: int, groups: dict[str, int]) -> None:
    async with serving(open_dir, "source", unused_port, control={"group": str(CONTROLLERS)}) as served:
        path = served.settings.control_socket
        assert (mode(path), path.stat().st_gid) == (0o660, CONTROLLERS)
        assert mode(path.parent) == 0o710
        with capture_logs() as logs:
            status, record = await ask(served, "POST", "/v1/migrations", START, **user(CONTROLLERS, **groups))
            assert status == 202, record
            assert record["requested_by"] == f"uid {USER}"
            assert (await ask(served, "GET", "/v1/agent", **user(CONTROLLERS, **groups)))[0] == 200
    (logged,) = (entry for entry in logs if entry["event"] == "command")
    assert {"method": "POST", "path": "/v1/migrations", "uid": USER}.items() <= logged.items()
    assert logged["pid"] > 1


@pytest.mark.root
async def test_other_users_cannot_even_connect(open_dir: Path, unused_port: int) -> None:
    for control in ({}, {"group": str(CONTROLLERS)}, {"owner": str(OTHERS)}):
        async with serving(open_dir, "source", unused_port, control=control) as served:
            with pytest.raises(ConnectionRefusedError, match="PermissionError"):
                await ask(served, "GET", "/v1/agent", **user(READERS))


@pytest.mark.root
async def test_the_owner_controls_the_agent(open_dir: Path, unused_port: int) -> None:
    async with serving(open_dir, "source", unused_port, control={"owner": str(USER)}) as served:
        assert (served.settings.control_socket.stat().st_uid, mode(served.settings.control_socket)) == (USER, 0o600)
        assert (await ask(served, "POST", "/v1/migrations", START, **user()))[0] == 202


@pytest.mark.root
async def test_readers_read_and_are_told_what_they_lack(open_dir: Path, unused_port: int) -> None:
    control = {"group": str(CONTROLLERS), "read_group": str(READERS)}
    async with serving(open_dir, "source", unused_port, control=control) as served:
        await served.agent.start(StartRequest.model_validate(START))
        assert (await ask(served, "GET", "/v1/migrations/vm1", **user(READERS)))[0] == 200
        assert (await ask(served, "GET", "/v1/guests", **user(READERS)))[0] == 200
        with capture_logs() as logs:
            for who, words in ((user(READERS), "may only read"), (user(), "may not use the control API")):
                for path, body in (("/v1/migrations", START), ("/v1/migrations/vm1/abort", ""), ("/nothing", "")):
                    status, answer = await ask(served, "POST", path, body, **who)
                    assert (status, answer["error"]["code"]) == (403, "forbidden")
                    assert words in answer["error"]["message"]
                    assert f"uid {USER}" in answer["error"]["message"]
                    assert f"the group {CONTROLLERS} (control.group" in answer["error"]["hint"]
        assert {entry["event"] for entry in logs} == {"command refused"}
        assert len(logs) == 6
        assert (await ask(served, "GET", "/v1/agent", **user()))[0] == 403
        assert (await ask(served, "GET", "/v1/agent", **user(CONTROLLERS)))[0] == 200
        assert served.agent.record("vm1").state is State.PRECOPY


async def test_a_command_that_fails_is_logged_with_its_status(source: Served) -> None:
    with capture_logs() as logs:
        async with source.control() as http, http.post("/v1/migrations/nobody/abort") as answer:
            assert answer.status == 404
    (asked, failed) = logs
    assert (asked["event"], failed["event"], failed["status"]) == ("command", "command failed", 404)
    assert (asked["uid"], asked["pid"]) == (os.geteuid(), os.getpid())


async def test_reading_is_not_logged(source: Served) -> None:
    with capture_logs() as logs:
        async with source.control() as http, http.get("/v1/agent") as answer:
            assert answer.status == 200
    assert logs == []


@pytest.mark.parametrize("key", ["owner", "group", "read_group"])
def test_a_name_that_this_host_does_not_know_is_named(key: str) -> None:
    settings = config.decode({"control": {key: "no-such-name"}, "tls": {"insecure": True}}, "source", path="x.toml")
    with pytest.raises(ConfigError, match=f"x.toml: control.{key}: .* 'no-such-name'"):
        Access.of(settings.control, settings.path)


def test_rights() -> None:
    access = Access(owner=7, group=8, read_group=9)
    rights = {
        Peer(1, 0, frozenset({0})): Right.CONTROL,
        Peer(1, os.geteuid(), frozenset({1})): Right.CONTROL,
        Peer(1, 7, frozenset({1})): Right.CONTROL,
        Peer(1, 70, frozenset({8, 9})): Right.CONTROL,
        Peer(1, 70, frozenset({9})): Right.READ,
        Peer(1, 70, frozenset({7, 10})): Right.NONE,
    }
    assert {peer: access.right(peer) for peer in rights} == rights
    assert Access().right(Peer(1, 70, frozenset({0, 2**32 - 1}))) is Right.NONE
