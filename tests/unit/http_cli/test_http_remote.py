"""Remote control: over TLS 1.3, for certificates that `control.peers` names, and for nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from migrated import config
from migrated.certificates import Authority
from migrated.client import Address, Client, RemoteError, StartRequest
from migrated.demo.pair import free_port
from migrated.errors import ConfigError, ConnectionLostError
from migrated.http import remote
from migrated.settings import TlsFiles
from tests.rig.pki import Pki, now, table
from tests.unit.http_cli.served import Served, serving

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = StartRequest(guest="vm1", to=Address("host-b", 7440))
OPERATOR = "operator.example"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
async def controlled(short_dir: Path, unused_port: int, port: int, pki: Pki) -> AsyncIterator[Served]:
    """A source agent, whose own certificate is a client's; that of the server lies beside it."""
    pki.write("target", place="agent")
    tables: dict[str, dict[str, Any]] = {
        "tls": table(pki.write("source", place="agent")),
        "control": {"listen": f"127.0.0.1:{port}", "peers": ["Operator.*"]},
    }
    async with serving(short_dir, "source", unused_port, **tables) as served:
        yield served


def client(port: int, files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("MIGRATED_TLS_DIR", str(files.ca.parent))
    return Client(f"https://127.0.0.1:{port}")


async def refused(port: int, files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client(port, files, monkeypatch) as connected:
        with pytest.raises(ConnectionLostError):
            await connected.migrations()


async def test_a_certificate_that_is_named_may_do_everything(
    controlled: Served, port: int, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pki.write("source", (OPERATOR,), place="operator")
    with capture_logs() as logs:
        async with client(port, files, monkeypatch) as connected:
            record = await connected.start(START)
            assert record.requested_by == f"the certificate of {OPERATOR}"
            assert [one.id for one in await connected.migrations()] == [record.id]
            assert (await connected.abort(record)).state == "aborted"
    commands = [entry for entry in logs if entry["event"] == "command"]
    assert [entry["path"] for entry in commands] == ["/v1/migrations", f"/v1/migrations/{record.id}/abort"]
    assert {entry["certificate"] for entry in commands} == {OPERATOR}


async def test_a_certificate_that_is_not_named_may_not_even_read(
    controlled: Served, port: int, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pki.write("source", ("host-c.example",), place="other")
    async with client(port, files, monkeypatch) as connected:
        for ask in (connected.migrations(), connected.start(START)):
            with pytest.raises(RemoteError, match=r"host-c\.example") as caught:
                await ask
            assert (caught.value.status, caught.value.code) == (403, "forbidden")
            assert "control.peers" in caught.value.hint
    assert controlled.agent.all == []


@pytest.mark.usefixtures("controlled")
async def test_certificates_that_prove_nothing_are_refused(
    port: int, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Authority.make("somebody else's authority", now=now())
    for place, options in {
        "foreign": {"signer": stranger},
        "expired": {"valid": (-2, -1)},
        "early": {"valid": (1, 2)},
        "server": {"as_role": "target"},
    }.items():
        files = pki.write("source", (OPERATOR,), place=place, **options)  # type: ignore[arg-type]  # of several types
        await refused(port, files, monkeypatch)


@pytest.mark.usefixtures("controlled")
async def test_without_a_certificate_or_with_an_older_tls_there_is_no_answer(port: int, pki: Pki) -> None:
    files = pki.write("source", (OPERATOR,), place="operator")
    without = ssl.create_default_context(cafile=str(files.ca))
    older = ssl.create_default_context(cafile=str(files.ca))
    older.load_cert_chain(files.cert, files.key)
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (without, older):
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(f"https://127.0.0.1:{port}", connector=connector) as http:
            with pytest.raises((aiohttp.ClientError, OSError)):
                await http.get("/v1/agent")


@pytest.mark.usefixtures("controlled")
async def test_nothing_is_answered_in_the_clear(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/agent HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in await reader.read()
    writer.close()


async def test_a_client_that_does_not_finish_its_handshake_is_left(
    short_dir: Path, unused_port: int, port: int, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_REQUEST_SECONDS", 0.2)
    tables: dict[str, dict[str, Any]] = {
        "tls": table(pki.write("target", place="agent")),
        "control": {"listen": f"127.0.0.1:{port}", "peers": ["*"]},
        "listen": {"address": "127.0.0.1:0"},
    }
    async with serving(short_dir, "target", unused_port, **tables):
        for sent in (b"", b"\x16\x03\x01"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            async with asyncio.timeout(60):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()


async def test_changed_certificates_are_used_without_a_restart(
    controlled: Served, port: int, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    del controlled
    before = pki.write("source", (OPERATOR,), place="operator")
    async with client(port, before, monkeypatch) as connected:
        assert await connected.migrations() == []
    pki.authority = Authority.make("the next authority", now=now())
    pki.write("target", place="agent")
    after = pki.write("source", (OPERATOR,), place="operator-2")
    async with client(port, after, monkeypatch) as connected:
        assert await connected.migrations() == []
    await refused(port, before, monkeypatch)


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"tls": {"insecure": True}, "control": {"listen": "127.0.0.1:1", "peers": ["a"]}}, "needs TLS"),
        ({"control": {"listen": "127.0.0.1:1"}}, "obey nobody"),
    ],
)
def test_remote_control_that_could_not_be_safe_is_refused(tables: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config.decode(tables, "source")


def test_no_file_no_remote_control(tmp_path: Path) -> None:
    files = TlsFiles.conventional("target", tmp_path)
    with pytest.raises(ConfigError, match=r"control\.listen"):
        remote.RemoteControl(Address("127.0.0.1", 0), files, ["*"])
