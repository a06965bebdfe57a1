"""Agents show each other certificates: who is refused, in which words, and that guests move and recover over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migrated.address import parse_address
from migrated.certificates import Authority
from migrated.errors import PeerError
from migrated.link.credentials import Credentials
from migrated.link.dialing import Dialer, DialTerms
from migrated.protocol import framing
from migrated.protocol.messages import PROTOCOL_VERSION, Abort
from migrated.protocol.preamble import Preamble, Purpose, encode, preface
from migrated.recovery.journal import Journal, SourceEntry
from migrated.settings import Timeouts, TlsFiles
from migrated.waiting import within
from tests.integration.place import CRAWL, PATIENCE_SECONDS, Guest, Place, place
from tests.rig.pki import LOOPBACK, Pki, now
from tests.unit.link.ends import HELLO

pytestmark = pytest.mark.asyncio(loop_scope="module")

STANDING = "g2"
#: The target logs so many lines about strangers in so long (migrated.log.Sparing).
SPARING_LINES, SPARING_SECONDS = 20, 10.0
CONTROL = Preamble(Purpose.CONTROL, HELLO.session, HELLO.token)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secure(program: Path, pki: Pki) -> AsyncIterator[Place]:
    """Both agents with TLS.  They know each other by name."""
    tables = pki.tables()
    tables["source"]["peers"] = ["host-b.example"]
    tables["target"]["peers"] = ["*-a.example"]
    async with place(program, tls=tables) as here:
        yield here


@pytest_asyncio.fixture(loop_scope="module")
async def here(secure: Place, pki: Pki) -> AsyncIterator[Place]:
    """The agents with valid certificates, and no guest before or after."""
    pki.tables()
    yield secure
    await secure.without_guests()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing(secure: Place) -> AsyncIterator[Guest]:
    """A guest that no refused migration touches."""
    guest = Guest(secure, STANDING)
    await guest.start()
    yield guest
    await guest.stop()


# ---------------------------------------------------------------- refusals between two agents

Wrong = Callable[[Pki], object]
STRANGER = Authority.make("another authority", now=now())


def source(**wrong: Any) -> Wrong:
    return lambda pki: pki.write("source", **wrong)


def target(**wrong: Any) -> Wrong:
    return lambda pki: pki.write("target", **wrong)


#: What is wrong; what the source's record says, with its code; what the target's log says.
REFUSALS: dict[str, tuple[Wrong, str, str, str]] = {
    "source-wrong-ca": (
        source(signer=STRANGER),
        "tls",
        "refuses us: its CA did not sign our certificate",
        "host-a.example.*is not signed by our CA",
    ),
    "source-expired": (
        source(valid=(-20, -10)),
        "tls",
        "refuses us: our certificate has expired",
        "host-a.example.*expired on",
    ),
    "source-not-yet-valid": (
        source(valid=(10, 20)),
        "tls",
        "refuses us: it does not accept our certificate",
        "host-a.example.*is not valid before",
    ),
    "source-not-in-peers": (
        source(names=("host-c.example", LOOPBACK)),
        "tls-peer-refused",
        "certificate is for host-c.example, 127.0.0.1, which `peers` does not allow",
        "certificate is for host-c.example, 127.0.0.1, which `peers` does not allow",
    ),
    "source-with-a-servers-certificate": (
        source(as_role="target"),
        "tls",
        "refuses us: our certificate is not meant for this side",
        "is not meant for clients",
    ),
    "target-wrong-ca": (
        target(signer=STRANGER),
        "tls",
        "the peer's certificate .*host-b.example.* is not signed by our CA",
        "refuses us: its CA did not sign our certificate",
    ),
    "target-expired": (target(valid=(-20, -10)), "tls", "the peer's certificate .* expired on", "has expired"),
    "target-not-yet-valid": (
        target(valid=(10, 20)),
        "tls",
        "the peer's certificate .* is not valid before",
        "refuses us",
    ),
    "target-wrong-name": (
        target(names=("host-b.example", "192.0.2.1")),
        "tls",
        "certificate is for host-b.example 192.0.2.1, not for 127.0.0.1",
        "refuses us",
    ),
    "target-not-in-peers": (
        target(names=("host-c.example", LOOPBACK)),
        "tls-peer-refused",
        "certificate is for host-c.example, 127.0.0.1, which `peers` does not allow",
        "",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_who_cannot_prove_who_it_is_gets_no_guest_and_gives_none(
    here: Place, pki: Pki, standing: Guest, case: str
) -> None:
    """The files are replaced while the agents run: the next connection uses them."""
    wrong, code, said, logged = REFUSALS[case]
    before = refusals(here)
    wrong(pki)
    record = await here.over(await here.start(STANDING))
    assert record["state"] == "failed", record
    assert record["error"]["code"] == code, record["error"]
    assert re.search(said, record["error"]["message"]), record["error"]
    assert record["error"]["hint"]
    if logged:
        await refused(here, logged, after=before)
    await standing.assert_sound()
    assert here.left_of(STANDING) == []


def refusals(here: Place) -> int:
    """How many the target has logged."""
    return sum(line["event"] == "connection refused" for line in here.logged("target", "warning"))


async def refused(here: Place, why: str, *, after: int = 0) -> None:
    """Wait until the target has logged a refusal that says this, or as many lines as it logs of strangers in a while."""
    async with within(PATIENCE_SECONDS, f"the target to log {why}"):
        while True:
            lines = [line for line in here.logged("target", "warning") if line["event"] == "connection refused"]
            if any(re.search(why, line["error"]) for line in lines[after:]):
                return
            newest = [dt.datetime.fromisoformat(line["timestamp"]) for line in lines[-SPARING_LINES:]]
            if len(newest) == SPARING_LINES and (newest[-1] - newest[0]).total_seconds() < SPARING_SECONDS:
                return
            await asyncio.sleep(0.02)


# ---------------------------------------------------------------- strangers, with Python's TLS


def client(files: TlsFiles | None, pki: Pki) -> ssl.SSLContext:
    """A client with these files, or with no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(TlsFiles.conventional("source", pki.directory / "source").ca)
    if files is not None:
        context.load_cert_chain(files.cert, files.key)
    return context


async def answer(here: Place, first: bytes, context: ssl.SSLContext | None = None, then: bytes = b"") -> bytes:
    """Connect, send ``first``, with a context also ``then`` inside TLS; return everything until the target closes."""

    def talk() -> bytes:
        host, _, port = here.address.rpartition(":")
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS))
            sock.sendall(first)
            if context is not None:
                sock = stack.enter_context(context.wrap_socket(sock, server_hostname=LOOPBACK))
                sock.sendall(then)
            data = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(1 << 16):
                    data += piece
            return data

    return await asyncio.to_thread(talk)


def abort_in(data: bytes) -> Abort:
    (message,) = framing.FrameDecoder().feed(data)
    assert isinstance(message, Abort)
    return message


async def test_a_client_without_a_certificate(here: Place, pki: Pki) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        await answer(here, preface(CONTROL), client(None, pki), encode(CONTROL))
    await refused(here, "the peer sent no certificate")


async def test_a_client_with_an_older_tls(here: Place, pki: Pki) -> None:
    context = client(pki.write("source", place="older"), pki)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        await answer(here, preface(CONTROL), context)
    await refused(here, "does not offer TLS 1.3")


async def test_a_source_without_tls_is_told_so_without_tls(here: Place) -> None:
    refusal = abort_in(await answer(here, encode(CONTROL) + framing.encode(HELLO)))
    assert refusal.code == "tls-required"
    assert "TLS only" in refusal.message
    assert refusal.hint


async def test_the_version_inside_tls_counts(here: Place, pki: Pki) -> None:
    """Whoever changes the preface on its way makes nobody speak an older version."""
    context = client(pki.write("source", place="older"), pki)
    older = bytearray(encode(CONTROL))
    older[4:6] = (PROTOCOL_VERSION - 1).to_bytes(2, "big")
    for first in (preface(CONTROL), b"MGRS" + bytes(older[4:8])):
        refusal = abort_in(await answer(here, first, context, bytes(older) + framing.encode(HELLO)))
        assert refusal.code == "version-mismatch"
        assert f"version {PROTOCOL_VERSION - 1}" in refusal.message
    assert await answer(here, b"MGRS" + bytes(older[4:8]), context, encode(CONTROL)) == b""
    await refused(here, "differs from the preamble inside TLS")


async def test_a_preface_of_another_purpose_than_the_preamble(here: Place, pki: Pki) -> None:
    context = client(pki.write("source", place="other"), pki)
    pages = preface(Preamble(Purpose.BULK, HELLO.session, HELLO.token, stream=1))
    assert await answer(here, pages, context, encode(CONTROL)) == b""
    await refused(here, "differs from the preamble inside TLS")


@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x01\x00\x01\x00"], ids=["nothing", "half-a-record"])
async def test_a_slow_handshake_ends_after_its_limit(here: Place, begun: bytes) -> None:
    before = refusals(here)
    assert await answer(here, preface(CONTROL) + begun) == b""
    await refused(here, "waited 2 s for a connection to say what it is", after=before)


async def test_what_is_no_tls_after_the_preface(here: Place) -> None:
    await answer(here, preface(CONTROL) + b"GET / HTTP/1.1\r\n\r\n")
    await refused(here, "TLS: handshake: ")


async def test_a_frame_that_is_too_large(here: Place, pki: Pki) -> None:
    context = client(pki.write("source", place="other"), pki)
    await answer(here, preface(CONTROL), context, encode(CONTROL) + b"\xff\xff\xff\xff" + bytes(1000))
    await refused(here, "control frame of 4294967295 bytes")


async def test_the_secret_of_a_session_opens_no_other(here: Place, pki: Pki) -> None:
    """Even for a host that may migrate guests: it sees the sessions' ids, and knows the secrets of its own."""
    context = client(pki.write("source", place="other"), pki)
    guests = [await here.guest(name) for name in ("g0", "g1")]
    migrations = [await here.precopying(guest.name) for guest in guests]
    entries = Journal(here.source.state_dir / "journal", SourceEntry).load()
    hellos = [entries[migration].hello for migration in migrations]
    for purpose in Purpose:
        wrong = Preamble(purpose, hellos[0].session, hellos[1].token)
        assert await answer(here, preface(wrong), context, encode(wrong)) == b""
    await refused(here, "the token is not this session's")
    for guest, migration in zip(guests, migrations, strict=True):
        assert (await here.source.record(migration))["state"] == "precopy"
        assert (await here.cli("abort", migration)).code == 0
        await here.over(migration)
        await here.over(migration, "target")
        await guest.assert_sound()
    for purpose in (Purpose.BULK, Purpose.URGENT):  # replayed
        former = Preamble(purpose, hellos[0].session, hellos[0].token)
        assert await answer(here, preface(former), context, encode(former)) == b""
    await refused(here, "a page connection for a session that")
    replayed = Preamble(Purpose.CONTROL, HELLO.session, hellos[0].token)
    assert await answer(here, preface(replayed), context, encode(replayed) + framing.encode(hellos[0])) == b""
    await refused(here, "session or token differ")


async def test_a_page_connection_of_a_host_that_is_not_allowed(here: Place, pki: Pki) -> None:
    guest = await here.guest()
    migration = await here.precopying()
    hello = Journal(here.source.state_dir / "journal", SourceEntry).load()[migration].hello
    context = client(pki.write("source", ("host-c.example",), place="c"), pki)
    wanted = Preamble(Purpose.URGENT, hello.session, hello.token)
    assert await answer(here, preface(wanted), context, encode(wanted)) == b""
    await refused(here, "is for host-c.example, which `peers` does not allow")
    assert (await here.source.record(migration))["state"] == "precopy"
    assert (await here.cli("abort", migration)).code == 0
    await here.over(migration)
    await guest.assert_sound()


async def test_a_source_with_tls_and_a_target_without(agents: Place, pki: Pki) -> None:
    """The refusal comes without TLS, and the source reads it all the same."""
    credentials = Credentials(pki.write("source"), role="source")
    dialer = Dialer(
        parse_address(agents.address),
        session_id=HELLO.session,
        token=HELLO.token,
        terms=DialTerms(Timeouts(), credentials),
    )
    with pytest.raises(PeerError, match="takes connections without TLS only") as caught:
        await dialer.control()
    assert caught.value.code == "tls-not-offered"
    assert agents.address in caught.value.message


# ---------------------------------------------------------------- guests move


@pytest.mark.parametrize("mode", ["hybrid", "precopy", "postcopy"])
async def test_a_guest_arrives_whole(here: Place, mode: str) -> None:
    guest = await here.guest()
    record = await here.over(await here.start(mode=mode, downtime_limit_ms=2000))
    assert record["state"] == "completed", record
    await guest.arrived()


class Relay:
    """A TCP relay to the target, whose connections can be cut."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = (host, int(port))
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._relay, LOOPBACK, 0)
        self.address = f"{LOOPBACK}:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        """Reset every connection."""
        while self._writers:
            self._writers.pop().transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            self._writers.append(far_writer)
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


async def postcopy(here: Place, **options: Any) -> str:
    """Start a migration of the idle guest that stays in post-copy for long; its id."""
    migration = await here.start("idle", mode="postcopy", drain_bandwidth=CRAWL, **options)
    await here.until(migration, lambda record: record["state"] == "postcopy")
    return migration


async def completes(here: Place, guest: Guest, migration: str) -> None:
    """Lift the limit; the guest is whole."""
    await here.cli("set", migration, "--drain-bandwidth", "0")
    for agent in ("source", "target"):
        record = await here.over(migration, agent)
        assert record["state"] == "completed", record
    await guest.arrived()


async def test_post_copy_goes_on_over_new_connections_with_new_certificates(here: Place, pki: Pki) -> None:
    """The first reconnect meets a certificate that the target does not accept; the guest waits until it is replaced."""
    guest = await here.guest("idle")
    relay = Relay(here.address)
    async with relay.listening():
        migration = await postcopy(here, to=relay.address)
        pki.write("source", valid=(-20, -10))
        pki.write("target")
        relay.cut()
        expired = "our certificate has expired"
        await here.until(migration, lambda record: expired in ((record["error"] or {}).get("message", "")))
        pki.write("source")
        await here.until(migration, lambda record: record["state"] in ("postcopy", "completed"))
        await completes(here, guest, migration)
    events = [json.loads(line)["event"] for line in here.target.log_path.read_text().splitlines()]
    assert "certificate read again" in events


@pytest.mark.parametrize("agent", ["source", "target"])
async def test_a_killed_agent_goes_on_over_tls(program: Path, pki: Pki, agent: str) -> None:
    async with place(program, tls=pki.tables()) as alone:
        guest = await alone.guest("idle")
        migration = await postcopy(alone)
        killed = getattr(alone, agent)
        await killed.kill()
        await killed.start()
        await completes(alone, guest, migration)


# ---------------------------------------------------------------- what operators see


async def test_when_the_certificate_expires_is_seen_everywhere(here: Place, pki: Pki) -> None:
    pki.write("target", valid=(-1, 10))
    expires = Credentials(TlsFiles.conventional("target", pki.directory / "target"), role="target").expires_at
    status = json.loads(await here.get("/status", "target"))
    assert status["certificate"]["expires_at"] == expires
    (problem,) = status["certificate"]["problems"]
    assert "server-cert.pem expires on" in problem
    shown = await here.cli("status", agent="target")
    assert "server-cert.pem expires on" in shown.out
    metric = "migrated_tls_certificate_expiry_timestamp_seconds"
    (line,) = re.findall(rf"^{metric} (.*)$", await here.get("/metrics", "target"), re.MULTILINE)
    assert float(line) == expires
    problems = [line["problem"] for line in here.logged("target", "warning") if line["event"] == "certificate"]
    assert problem in problems
    assert json.loads(await here.get("/status", "source"))["certificate"]["problems"] == []
