"""What cannot be moved is refused: by a code, in words that name what is wrong, and the guest runs on as if nothing had been.

One self-checking guest is shared by all tests; each tries to move it to a target of its own.  What is wrong with the guest
itself is shown with a QEMU that runs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migrated.demo.pair import free_port
from migrated.demo.qemu_guest import QEMU
from migrated.errors import GuestError, MigratedError
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.qemu.qmp import Monitor
from migrated.protocol.messages import PROTOCOL_VERSION
from migrated.protocol.preamble import PREAMBLE_BYTES, Preamble, Purpose, VersionMismatchError, encode, refusal
from tests.rig import traces
from tests.rig.guest import MIB, NAME, MovingGuest, moving_guest
from tests.rig.host import Host

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("page_pool"),
]

LOAD: dict[str, str | int] = {"rate": 1000, "pattern": "hot", "sweep_seconds": 0}
#: Guests of the source's configuration beside the running one, by what is the matter with them.
IDLE, VAST, DEAD, BUSY = "idle", "vast", "dead", "busy"
QUICK = {"timeouts": {"handshake": 1.0, "connect": 2.0}}

Edit = Callable[[dict[str, Any]], None]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(page_pool: None) -> AsyncIterator[MovingGuest]:
    async with moving_guest(kind="boot", load=LOAD, config=QUICK) as moving:
        for name in (IDLE, VAST, DEAD, BUSY):
            moving.here.source_guests[name] = {"driver": "qemu", "qmp": str(_qmp(moving, name))}
        yield moving


def _qmp(guest: MovingGuest, name: str) -> Path:
    return guest.guest.directory / f"{name}.qmp"


@pytest.fixture
def target(guest: MovingGuest) -> Iterator[Callable[..., Host]]:
    """A host to move to, whose configuration a test has bent; fresh each time."""
    usual = guest.hosts
    made: list[Host] = []

    def make(edit: Edit | None = None, *, name: str = NAME, **arguments: Any) -> Host:
        host = Host(guest.guest.directory, f"t{len(os.listdir(guest.guest.directory))}", config=QUICK, **arguments)
        table = guest.guest.target_table(9)
        host.target_guests[name] = table
        if edit is not None:
            edit(host.target_guests)
        guest.hosts = (usual[0], host)
        made.append(host)
        return host

    yield make
    guest.hosts = usual


@contextlib.asynccontextmanager
async def attempt(guest: MovingGuest, host: Host) -> AsyncIterator[None]:
    """Afterwards neither a process nor an error in the log is left of the attempt."""
    try:
        yield
        left = {pid: line for pid, line in traces.processes(host.directory).items() if traces.QEMU in line}
        assert not left
    finally:
        await host.stop()
    assert host.complaints() == []


async def _refused(guest: MovingGuest, host: Host, code: str, *words: str) -> dict[str, Any]:
    """The move fails so; the guest has not lost anything by it."""
    async with attempt(guest, host):
        record = await guest.fail()
    _says(record["error"], code, *words)
    return record


def _says(error: dict[str, str], code: str, *words: str) -> None:
    assert error["code"] == code, error
    for word in words:
        assert word in error["message"] + " " + error["hint"], error


def _replace(old: str, new: str) -> Edit:
    """Change the incoming command."""

    def edit(guests: dict[str, Any]) -> None:
        for table in guests.values():
            assert any(old in argument for argument in table["command"])
            table["command"] = [argument.replace(old, new) for argument in table["command"]]

    return edit


# ---------------------------------------------------------------- the target's configuration


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("share=on", "share=off", "memory-not-shared", ("ram", "share=on")),
        (f"size={128 * MIB}", f"size={64 * MIB}", "regions-differ", ("ram", str(128 * MIB), str(64 * MIB))),
        ("{memory:ram}", "{memory:other}", "regions-differ", ("ram", "other")),
        (QEMU, "qemu-that-is-not-there", "guest-command-missing", ("qemu-that-is-not-there",)),
        ("unix:{qmp}", "nonsense:{qmp}", "guest-start", ("nonsense",)),
    ],
    ids=["private", "sizes", "names", "program", "option"],
)
async def test_an_unfit_target_configuration_is_refused(
    guest: MovingGuest, target: Callable[..., Host], old: str, new: str, code: str, words: tuple[str, ...]
) -> None:
    await _refused(guest, target(_replace(old, new)), code, NAME, *words)


async def test_a_guest_the_target_does_not_know_is_refused(guest: MovingGuest, target: Callable[..., Host]) -> None:
    await _refused(guest, target(name="stranger"), "unknown-guest", NAME, "stranger", "target")


async def test_a_target_with_another_driver_is_refused(guest: MovingGuest, target: Callable[..., Host]) -> None:
    def edit(guests: dict[str, Any]) -> None:
        guests[NAME] = {"driver": "process", "command": ["/bin/true"]}

    await _refused(guest, target(edit), "drivers-differ", "qemu", "process")


async def test_a_page_size_the_target_does_not_have_is_refused(guest: MovingGuest, target: Callable[..., Host]) -> None:
    def edit(guests: dict[str, Any]) -> None:
        guests[NAME]["page_size"] = "1G"  # the guest has 128 MiB

    await _refused(guest, target(edit), "page-size-unsupported", "ram", "pages")


# ---------------------------------------------------------------- rights


@pytest.mark.skipif(
    Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0",
    reason="vm.unprivileged_userfaultfd is on: everybody has the right here",
)
async def test_a_target_without_the_right_to_userfaultfd_says_so(
    guest: MovingGuest, target: Callable[..., Host]
) -> None:
    """Another user: the incoming QEMU is the agent's own child, so all else can be done.

    The one capability is to read this checkout, which may lie in root's home.
    """
    read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    host = target(name=IDLE, prefix=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *read))

    host.target_guests[IDLE]["command"] = _idle("ram", 64 * MIB, "memory-backend-file", ",mem-path={memory:ram}")
    guest.guest.directory.chmod(0o755)
    state = host.directory / "target"
    state.mkdir()
    os.chown(state, 65534, 65534)
    async with attempt(guest, host), _idle_qemu(guest, IDLE, "share=on"):
        record = await _try(guest, IDLE)
    _says(record["error"], "no-userfaultfd", "userfaultfd", "vm.unprivileged_userfaultfd")


async def test_a_source_that_may_not_reach_into_qemu_says_so(guest: MovingGuest, target: Callable[..., Host]) -> None:
    """Root, but without CAP_SYS_PTRACE, which the guest's process has."""
    without = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
    away = Host(guest.guest.directory, "weak", prefix=without, config=QUICK)
    away.source_guests[NAME] = guest.here.source_guests[NAME]
    host = target()
    before = await guest.console.stats()
    async with attempt(guest, host), attempt(guest, away):
        await host.target()
        source = await away.source()
        body = {"guest": NAME, "to": host.address}
        migration = str((await source.request("POST", "/v1/migrations", body))["id"])
        record = await source.wait(migration, limit_seconds=30)
        _says(record["error"], "no-rights", "the agent needs CAP_")
    await guest.alone()
    await guest.assert_sound(before)


# ---------------------------------------------------------------- the guest itself


def _idle(backend: str, size: int, kind: str, options: str) -> list[str]:
    return [
        *(QEMU, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", f"{size // MIB}M"),
        *("-object", f"{kind},id={backend},size={size},share=on{options}", "-machine", f"q35,memory-backend={backend}"),
        *("-qmp", "unix:{qmp},server=on,wait=off"),
    ]


@contextlib.asynccontextmanager
async def _idle_qemu(guest: MovingGuest, name: str, share: str, size: int = 64 * MIB) -> AsyncIterator[PidHandle]:
    """A QEMU without a program to run, under a name that the source knows; it has to be as it was afterwards."""
    qmp = _qmp(guest, name)
    command = [
        argument.replace("share=on", share).replace("{qmp}", str(qmp))
        for argument in _idle("ram", size, "memory-backend-memfd", "")
    ]
    process = PidHandle.spawn(command, pass_fds=[], log=guest.guest.directory / f"{name}.log")
    try:
        before = await _status(qmp)
        yield process
        assert await _status(qmp) == before == "running"
        assert traces.userfaultfds(process.pid) == []
    finally:
        await process.kill(10)
        process.close()
        qmp.unlink(missing_ok=True)


async def _status(qmp: Path) -> str:
    async with asyncio.timeout(20):
        while True:
            try:
                monitor = await Monitor.connect("probe", qmp, greeting_seconds=10)
                break
            except GuestError as error:
                if error.code != "qmp-unreachable":
                    raise
                await asyncio.sleep(0.02)
    try:
        return await monitor.status()
    finally:
        await monitor.close()


async def _try(guest: MovingGuest, name: str) -> dict[str, Any]:
    """The end of a migration of one of the other guests."""
    await guest.there.target()
    source = await guest.here.source()
    answer = await source.request("POST", "/v1/migrations", {"guest": name, "to": guest.there.address})
    record = await source.wait(str(answer["id"]), limit_seconds=60)
    assert record["state"] == "failed", record
    return record


async def test_a_target_without_huge_pages_enough_says_how_many_it_lacks(
    guest: MovingGuest, target: Callable[..., Host]
) -> None:
    """The guest has 512 GiB, none of them touched; no pool here has as many."""
    size = 512 * 1024 * MIB
    host = target(name=VAST)
    host.target_guests[VAST]["command"] = _idle("ram", size, "memory-backend-file", ",mem-path={memory:ram}")
    async with attempt(guest, host), _idle_qemu(guest, VAST, "share=on", size):
        record = await _try(guest, VAST)
    _says(record["error"], "no-huge-pages", str(size // (2 * MIB)), "2 MiB", "nr_hugepages=")


async def test_a_qmp_socket_nobody_answers_is_named(guest: MovingGuest, target: Callable[..., Host]) -> None:
    host = target(name=DEAD)
    async with attempt(guest, host):
        record = await _try(guest, DEAD)
    _says(record["error"], "qmp-unreachable", DEAD, str(_qmp(guest, DEAD)))


async def test_a_qmp_socket_somebody_else_holds_is_named(guest: MovingGuest, target: Callable[..., Host]) -> None:
    host = target(name=BUSY)
    async with attempt(guest, host), _idle_qemu(guest, BUSY, "share=on"):
        other = await Monitor.connect("other", _qmp(guest, BUSY))
        try:
            record = await _try(guest, BUSY)
        finally:
            await other.close()
    _says(record["error"], "qmp-busy", BUSY, str(_qmp(guest, BUSY)), "second QMP socket")


async def test_a_guest_that_is_being_migrated_is_not_migrated_twice(
    guest: MovingGuest, target: Callable[..., Host]
) -> None:
    host = target()
    before = await guest.console.stats()
    async with attempt(guest, host):
        source = await guest.here.source()
        # Slowly, so that it is still under way.
        migration = await guest.begin(max_bandwidth="1MB")
        with pytest.raises(MigratedError) as caught:
            await guest.begin()
        _says(caught.value.as_dict(), "guest-migrating", NAME, migration)
        await source.request("POST", f"/v1/migrations/{migration}/abort")
        assert (await source.wait(migration))["state"] == "aborted"
        await guest.alone()
    await guest.assert_sound(before)


async def test_a_guest_the_source_does_not_know_is_refused_at_once(guest: MovingGuest) -> None:
    source = await guest.here.source()
    with pytest.raises(MigratedError) as caught:
        await source.request("POST", "/v1/migrations", {"guest": "nobody", "to": "127.0.0.1:1"})
    _says(caught.value.as_dict(), "unknown-guest", "nobody", NAME)


# ---------------------------------------------------------------- the network


async def _moved_to(guest: MovingGuest, address: str) -> dict[str, Any]:
    source = await guest.here.source()
    before = await guest.console.stats()
    answer = await source.request("POST", "/v1/migrations", {"guest": NAME, "to": address})
    record = await source.wait(str(answer["id"]), limit_seconds=30)
    await guest.alone()
    await guest.assert_sound(before)
    assert record["state"] == "failed"
    return dict(record["error"])


async def test_a_target_that_cannot_be_reached_is_named(guest: MovingGuest) -> None:
    address = f"127.0.0.1:{free_port()}"
    _says(await _moved_to(guest, address), "target-unreachable", address)


async def test_a_target_of_another_version_is_named(guest: MovingGuest) -> None:
    """What a later version answers to our preamble."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(PREAMBLE_BYTES)
        writer.write(refusal(VersionMismatchError("the peer speaks protocol version 1, we speak 2")))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        _says(await _moved_to(guest, f"127.0.0.1:{port}"), "version-mismatch", "version 1", f"127.0.0.1:{port}")


async def test_a_target_that_is_something_else_is_named(guest: MovingGuest) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" * 4)
        await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await _moved_to(guest, f"127.0.0.1:{port}")
    assert error["code"] not in {"internal", ""}
    assert f"127.0.0.1:{port}" in error["message"]


async def _answer_to(host: Host, data: bytes) -> bytes:
    """What the target says to this before it hangs up; we only listen after having spoken."""
    name, _, port = host.address.rpartition(":")
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(name, int(port))
        try:
            writer.write(data)
            await writer.drain()
            return await reader.read()
        except ConnectionError:
            return b""  # hung up with some of it unread
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def test_garbage_on_the_port_ends_only_itself() -> None:
    async with moving_guest(kind="boot", load=LOAD, config=QUICK) as guest:
        host = guest.there
        await host.target()
        hello = encode(Preamble(Purpose.CONTROL, bytes(16), bytes(32)))
        later = encode(Preamble(Purpose.CONTROL, bytes(16), bytes(32), version=PROTOCOL_VERSION + 1))
        bulk = encode(Preamble(Purpose.BULK, os.urandom(16), os.urandom(32), 0))
        assert await _answer_to(host, os.urandom(4096)) == b""
        assert await _answer_to(host, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + bytes(64)) == b""
        assert b"version-mismatch" in await _answer_to(host, later)
        assert await _answer_to(host, bulk) == b""  # of no session
        # The rest ends by the handshake's limit: half a preamble and silence, a whole one and silence, …
        answers = await asyncio.gather(
            _answer_to(host, hello[:30]),
            _answer_to(host, hello),
            _answer_to(host, hello + (1 << 31).to_bytes(4, "big")),
            _answer_to(host, hello + os.urandom(512)),
        )
        assert answers[0] == b""
        told = [event["error"] for event in host.events("target") if event["event"] == "connection refused"]
        assert any("not a migrated connection" in text for text in told), told
        assert any(f"version {PROTOCOL_VERSION + 1}" in text for text in told), told
        assert any("a connection to say what it is" in text for text in told), told
        assert (await (await host.target()).request("GET", "/v1/migrations"))["migrations"] == []
        # And then a guest moves as ever, with half a stranger on the line.
        name, _, port = host.address.rpartition(":")
        _, writer = await asyncio.open_connection(name, int(port))
        writer.write(hello[:30])
        await guest.move()
        writer.close()
