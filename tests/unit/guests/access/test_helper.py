"""The privileged helper: it does what the agent would do, for root alone, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated import privileged
from migrated.errors import GuestError, GuestRefusedError, HostError
from migrated.guests.access import injection
from migrated.guests.access.pidfd import PidHandle
from migrated.memory import probe
from migrated.privileged import Fd, open_files, read_file

pytestmark = pytest.mark.root

NOBODY = 65534
SERVE = (
    "import socket, sys; from migrated.guests.access.helper import serve; serve(socket.socket(fileno=int(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a helper."""
    path = tmp_path_factory.mktemp("helper") / "helper.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(64)
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(listener.fileno())], pass_fds=[listener.fileno()])
    try:
        yield path
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def by_helper(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(privileged.SOCKET, str(path))


@pytest.fixture
def stranger() -> Iterator[PidHandle]:
    """A process that waits for the end of its input."""
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        handle = PidHandle.attach(process.pid)
        try:
            yield handle
        finally:
            handle.close()
            process.kill()


def test_files_are_those_that_are_seen_without_a_helper(
    path: Path, stranger: PidHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = (open_files(stranger.pid), read_file(stranger.pid, "maps"))
    monkeypatch.setenv(privileged.SOCKET, str(path))
    assert (open_files(stranger.pid), read_file(stranger.pid, "maps")) == here


@pytest.mark.usefixtures("by_helper")
async def test_a_userfaultfd_is_made_in_a_process_and_closed_again(stranger: PidHandle) -> None:
    before = open_files(stranger.pid)
    uffd = await injection.open_uffd(
        stranger, faults=True, tracking=False, send_descriptor=injection.by_injection(stranger)
    )
    assert injection.userfaultfds(stranger.pid) == [uffd.remote_fd]
    assert injection.find_remote(stranger.pid, uffd.fd) == uffd.remote_fd
    await injection.close_uffd(uffd)
    assert open_files(stranger.pid) == before
    assert stranger.poll() is None


@pytest.mark.usefixtures("by_helper")
def test_memory_is_given_and_mapped(stranger: PidHandle) -> None:
    fds = [os.memfd_create(f"migrated-given-{number}") for number in range(3)]
    try:
        for fd in fds:
            os.ftruncate(fd, 4096)
        numbers = injection.give_fds(stranger, fds)
        for fd, number in zip(fds, numbers, strict=True):
            assert os.path.samestat(os.fstat(fd), os.stat(f"/proc/{stranger.pid}/fd/{number}"))
        address = 0x10000000
        injection.map_over(stranger, address, 4096, numbers[0])
        assert f"{address:08x}-" in read_file(stranger.pid, "maps")
        injection.empty_page_tables(stranger, address, 4096)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.usefixtures("by_helper")
def test_a_long_list_of_descriptors_arrives(stranger: PidHandle) -> None:
    del stranger
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(3000, soft - 200)
    with contextlib.ExitStack() as opened:
        for number in range(count):
            opened.callback(os.close, os.memfd_create(f"a-name-of-some-length-{number:040}"))
        assert hard >= soft
        assert len(open_files(os.getpid())) >= count


@pytest.mark.usefixtures("by_helper")
def test_errors_arrive_as_what_they_are(stranger: PidHandle) -> None:
    with pytest.raises(GuestError, match="descriptor 0 is no memory of ours"):
        injection.map_over(stranger, 0x10000000, 4096, 0)
    with pytest.raises(GuestRefusedError, match="madvise of 4096 bytes at 0x1000") as refused:
        injection.empty_page_tables(stranger, 0x1000, 4096)
    assert refused.value.code == "cannot-inject"
    with pytest.raises(OSError, match="Bad file descriptor"):
        injection.take_uffd(stranger.pidfd, 0)


@pytest.mark.usefixtures("by_helper")
@pytest.mark.parametrize(
    ("name", "writable"), [("environ", False), ("mem", True), ("../1/maps", False), ("fd/0", False)]
)
def test_only_files_that_a_migration_needs_are_opened(stranger: PidHandle, name: str, *, writable: bool) -> None:
    with pytest.raises(HostError, match="open_proc"):
        privileged.open_proc(stranger.pidfd, name, writable)


def ask(path: Path, packet: bytes, fds: tuple[int, ...] = ()) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            socket.send_fds(connection, [packet], fds)
            return connection.recv(privileged.MAX_REQUEST_BYTES)
    return b""


def hostile_packets() -> list[bytes]:
    rng = random.Random(12)
    valid = json.dumps({"operation": "open_proc", "arguments": [{"fd": 0}, "maps", False]}).encode()
    numbers: list[object] = [-1, 1, 2**70, "0", None, []]
    requests: list[object] = [
        *({}, [], 1, None, "x", {"operation": "open_proc"}, {"operation": "os.system", "arguments": ["id"]}),
        *(
            {"operation": name, "arguments": arguments}
            for name in privileged.OPERATIONS
            for arguments in ([], [1], ["x"])
        ),
        *({"operation": name, "arguments": [{"fd": 9}, "maps", False]} for name in privileged.OPERATIONS),
        *({"operation": "take_uffd", "arguments": [{"fd": number}, 0]} for number in numbers),
        *({"operation": "take_uffd", "arguments": [{"fd": 0}, number]} for number in numbers),
    ]
    packets = [json.dumps(request).encode() for request in requests]
    packets += [
        b"",
        b"\0",
        b"[" * 60000,
        b"x" * privileged.MAX_REQUEST_BYTES,
        b"x" * (privileged.MAX_REQUEST_BYTES + 1),
    ]
    for _ in range(100):
        changed = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        packets.append(bytes(changed))
    return packets


def test_what_is_no_request_ends_its_connection_and_nothing_else(path: Path, stranger: PidHandle) -> None:
    before = open_files(stranger.pid)
    with open(os.devnull) as null:
        for packet in hostile_packets():
            for fds in ((), (null.fileno(),), (stranger.pidfd, null.fileno())):
                answer = ask(path, packet, fds)
                assert not answer or {"result", "error"} & json.loads(answer).keys(), packet
    listing = json.dumps({"operation": "list_descriptors", "arguments": [{"fd": 0}, ""]}).encode()
    listed = {number: link for number, link, *_ in json.loads(ask(path, listing, (stranger.pidfd,)))["result"]}
    assert listed == before
    assert stranger.poll() is None


def test_only_root_is_answered(path: Path) -> None:
    path.chmod(0o666)
    for parent in (path.parent, *list(path.parents)[1:-2]):
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode & 0o7777 | 0o011)
    program = f"""if 1:
        import socket
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect({str(path)!r})
            try:
                print(connection.recv(100))
            except ConnectionResetError:
                print(b"")
    """
    python = os.path.realpath(sys.executable)
    done = subprocess.run(
        [python, "-I", "-S", "-c", program], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, timeout=60
    )
    assert done.stdout == b"b''\n", done.stderr


def test_a_helper_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(privileged.SOCKET, str(tmp_path / "none"))
    with pytest.raises(HostError, match="No such file or directory") as raised:
        read_file(os.getpid(), "maps")
    assert raised.value.code == "privileged-helper"


def test_an_operation_is_asked_for_again_unless_it_must_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(privileged.SOCKET, str(tmp_path / "dies"))
    asked: list[str] = []

    def ended(path: str, name: str, arguments: object) -> None:
        del path, arguments
        asked.append(name)
        raise privileged._HelperEndedError("it ended")

    monkeypatch.setattr(privileged, "_ask", ended)
    pidfd = Fd(os.pidfd_open(os.getpid()))
    try:
        with pytest.raises(HostError):
            injection.take_uffd(pidfd, 0)
        with pytest.raises(HostError):
            injection.make_uffd(pidfd)
    finally:
        os.close(pidfd)
    assert asked == ["take_uffd"] * 3 + ["make_uffd"]


def test_the_check_says_whether_the_helper_answers(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> dict[str, bool]:
        return {one.name: one.ok for one in probe.requirements() if "helper" in one.name}

    assert shown() == {}
    monkeypatch.setenv(privileged.SOCKET, str(path))
    assert shown() == {"the privileged helper": True}
    monkeypatch.setenv(privileged.SOCKET, str(tmp_path / "none"))
    assert shown() == {"the privileged helper": False}
