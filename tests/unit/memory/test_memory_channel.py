"""Page connections over TLS before an engine has them: handshake, names, preamble, refusals."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

from migrated.errors import ConnectionLostError, MigratedError, TlsError
from migrated.memory.channel import Channel, Tls
from tests.rig.authority import Authority

pytestmark = pytest.mark.usefixtures("no_descriptor_left")

PREAMBLE = bytes(range(64))


class Pair:
    """Both ends of a connection, the server's first."""

    def __init__(self, server: Tls, client: Tls, name: str) -> None:
        left, right = socket.socketpair()
        self.server = Channel.tls(left.detach(), server)
        self.client = Channel.tls(right.detach(), client, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.client.close()

    async def handshakes(self) -> None:
        await asyncio.gather(self.server.handshake(), self.client.handshake())


async def test_each_side_knows_the_names_of_the_other(authority: Authority) -> None:
    with Pair(authority.side("host-b", server=True), authority.side("host-a", server=False), "host-b") as pair:
        await pair.handshakes()
        assert pair.server.peer_names() == ("host-a", "127.0.0.1")
        assert pair.client.peer_names() == ("host-b", "127.0.0.1")


async def test_what_follows_the_preamble_is_kept(authority: Authority) -> None:
    with Pair(authority.side("host-b", server=True), authority.side("host-a", server=False), "127.0.0.1") as pair:
        await pair.handshakes()
        await pair.client.send(PREAMBLE + b"the first frame")
        assert await pair.server.receive(64) == PREAMBLE
        assert await pair.server.receive(15) == b"the first frame"


async def test_more_than_the_socket_takes_is_sent_as_the_peer_reads(authority: Authority) -> None:
    data = os.urandom(1 << 20)
    with Pair(authority.side("host-b", server=True), authority.side("host-a", server=False), "host-b") as pair:
        await pair.handshakes()
        _, received = await asyncio.gather(pair.client.send(data), pair.server.receive(len(data)))
        assert received == data


async def test_a_plain_connection_has_the_same_calls_and_no_names() -> None:
    left, right = socket.socketpair()
    with right:
        channel = Channel.plain(left.detach())
        await channel.handshake()
        assert channel.peer_names() == ()
        receiving = asyncio.ensure_future(channel.receive(4))
        right.send(b"ab")
        right.send(b"cdef")
        assert await receiving == b"abcd"
        await channel.send(b"answer")
        assert right.recv(6) == b"answer"
        right.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionLostError, match="closed by the peer"):
            await channel.receive(3)
        channel.close()
    with pytest.raises(MigratedError, match="already closed"):
        channel.take()


async def test_the_client_refuses_a_server_of_another_name(authority: Authority) -> None:
    with Pair(authority.side("host-b", server=True), authority.side("host-a", server=False), "host-c") as pair:
        server = asyncio.ensure_future(pair.server.handshake())
        with pytest.raises(TlsError, match=r"certificate is for host-b 127\.0\.0\.1, not for host-c"):
            await pair.client.handshake()
        with pytest.raises(TlsError, match="the peer refuses us: it does not accept our certificate"):
            await server


async def test_the_server_refuses_a_client_of_another_ca(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path).side("host-a", server=False)
    both = Tls(server=False, ca=authority.ca, certificate=tmp_path / "host-a.pem", key=tmp_path / "host-a.key")
    assert stranger.validity()[0] <= time.time() < stranger.validity()[1]
    with Pair(authority.side("host-b", server=True), both, "host-b") as pair:
        client = asyncio.ensure_future(pair.client.handshake())
        with pytest.raises(TlsError, match=r"\(/CN=host-a\) is not signed by our CA"):
            await pair.server.handshake()
        await client  # its side is complete: the refusal comes later
        with pytest.raises(TlsError, match="the peer refuses us: its CA did not sign our certificate"):
            await pair.client.receive(1)


async def test_the_end_of_a_connection_is_no_tls_error(authority: Authority) -> None:
    with Pair(authority.side("host-b", server=True), authority.side("host-a", server=False), "host-b") as pair:
        client = asyncio.ensure_future(pair.client.handshake())
        await asyncio.sleep(0)
        pair.server.close()
        with pytest.raises(ConnectionLostError, match="closed by the peer"):
            await client


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> dict[str, Path]:
    authority.side("host-a", server=False)
    (tmp_path / "text").write_text("not PEM")
    return {
        "ca": authority.ca,
        "certificate": authority.directory / "host-a.pem",
        "key": authority.directory / "host-a.key",
    }


@pytest.mark.parametrize("which", ["ca", "certificate", "key"])
def test_an_unusable_file_is_named(files: dict[str, Path], which: str, tmp_path: Path) -> None:
    with pytest.raises(TlsError, match=r"/missing: No such file or directory"):
        Tls(server=True, **files | {which: tmp_path / "missing"})
    with pytest.raises(TlsError, match=r"/text: "):
        Tls(server=True, **files | {which: tmp_path / "text"})


def test_a_key_of_another_certificate_is_refused(files: dict[str, Path], authority: Authority) -> None:
    with pytest.raises(TlsError, match=r"ca\.key: key values mismatch"):
        Tls(server=True, **files | {"key": authority.directory / "ca.key"})


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(files: dict[str, Path], tmp_path: Path) -> None:
    command = ("openssl", "pkey", "-aes128", "-passout", "pass:secret", "-in", files["key"], "-out", tmp_path / "key")
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(TlsError, match="the key is encrypted with a password"):
        Tls(server=True, **files | {"key": tmp_path / "key"})
