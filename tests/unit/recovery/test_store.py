"""Descriptors outlive the agent: in a holder of ours, or with the service manager."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from structlog.testing import capture_logs

from migrated.errors import ConfigError, HostError
from migrated.recovery import systemd
from migrated.recovery.journal import Journal, TargetEntry
from migrated.recovery.state import PREFIX, LeftoverMigrations, RecoveryState
from migrated.recovery.store import CombinedStore, DescriptorStore, HolderStore, SystemdStore, store_for
from tests.unit.recovery.entries import TARGET

PATIENCE_SECONDS = 30

#: An agent that has these kept and then lives on until it is killed.
AGENT = """
import asyncio, os, sys
from pathlib import Path
from migrated.recovery.store import HolderStore

async def main():
    store = HolderStore(Path(sys.argv[1]))
    fds = []
    for text in sys.argv[3:]:
        fds.append(os.memfd_create("kept"))
        os.write(fds[-1], text.encode())
    await store.keep(sys.argv[2], fds)
    print("kept", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class OurStore(HolderStore):
    """An agent's, in this process: the connection ends with the test, as it does with an agent."""

    made: ClassVar[list[OurStore]] = []

    def __init__(self, state_dir: Path) -> None:
        super().__init__(state_dir)
        self.made.append(self)

    def die(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@pytest.fixture(autouse=True)
def keepers_die() -> Iterator[None]:
    yield
    while OurStore.made:
        OurStore.made.pop().die()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short one: sockets live in it."""
    path = Path(tempfile.mkdtemp(prefix="mgk-", dir="/tmp"))
    yield path
    for pid in holders(path):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path)


def holders(directory: Path) -> list[int]:
    """Processes that hold descriptors for this directory."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                if b"migrated.recovery.holder" in words and os.fsencode(directory / "holder.sock") in words:
                    found.append(int(entry))
    return found


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def gone(pid: int) -> None:
    """Wait for the end of a process that is nobody's child of ours."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def memfd(text: str) -> int:
    fd = os.memfd_create("kept")
    os.write(fd, text.encode())
    return fd


def texts(fds: list[int]) -> list[str]:
    """What these memfds hold; closes them."""
    said = [os.pread(fd, 100, 0).decode() for fd in fds]
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)
    return said


async def kept(store: DescriptorStore, name: str, *contents: str) -> None:
    fds = [memfd(text) for text in contents]
    try:
        await store.keep(name, fds)
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.asynccontextmanager
async def agent(python: str, directory: Path, name: str, *contents: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(python, "-c", AGENT, str(directory), name, *contents), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await process.stdout.readline() == b"kept\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


# ---------------------------------------------------------------- the holder


async def test_descriptors_survive_the_death_of_the_agent(python: str, directory: Path) -> None:
    async with agent(python, directory, "m1", "uffd", "ledger", "memory"):
        pass
    after = OurStore(directory)
    taken = await after.taken()
    assert list(taken) == ["m1"]
    assert texts(taken["m1"]) == ["uffd", "ledger", "memory"]
    assert texts((await after.taken())["m1"]) == ["uffd", "ledger", "memory"]  # it goes on holding them
    await after.forget("m1")


async def test_the_holder_ends_when_it_holds_nothing(directory: Path) -> None:
    store = OurStore(directory)
    await kept(store, "m1", "a")
    await kept(store, "m2", "b")
    (pid,) = holders(directory)
    await store.forget("m1")
    assert holders(directory) == [pid]
    await store.forget("m2")
    await gone(pid)
    assert not (directory / "holder.sock").exists()
    await kept(store, "m3", "c")  # and another one comes when it is needed
    (pid,) = holders(directory)
    other = OurStore(directory)
    assert texts((await other.taken())["m3"]) == ["c"]
    await store.forget("m3")
    assert holders(directory) == [pid]  # somebody is there
    other.die()
    await gone(pid)


async def test_the_holder_is_no_child_of_the_agent(python: str, directory: Path) -> None:
    async with agent(python, directory, "m1", "a") as process:
        (pid,) = holders(directory)
        assert pid not in children(process.pid)
        assert os.getsid(pid) != os.getsid(process.pid)
        assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null"


async def test_the_holder_runs_nothing_from_the_directory_it_was_started_in(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "selectors.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    store = OurStore(directory)
    await kept(store, "m1", "a")
    assert not (tmp_path / "was-here").exists()
    (pid,) = holders(directory)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    await store.forget("m1")


async def test_keeping_again_replaces(directory: Path) -> None:
    store = OurStore(directory)
    await kept(store, "m1", "old", "older")
    await kept(store, "m1", "new")
    assert texts((await store.taken())["m1"]) == ["new"]
    await store.forget("m1")


async def test_two_agents_share_a_holder_and_not_their_fate(python: str, directory: Path) -> None:
    async with agent(python, directory, "m1", "first"):
        second = OurStore(directory)
        await kept(second, "m2", "second")
        assert len(holders(directory)) == 1
    taken = await second.taken()
    assert {name: texts(fds) for name, fds in taken.items()} == {"m1": ["first"], "m2": ["second"]}
    await second.forget("m1")
    assert texts((await second.taken())["m2"]) == ["second"]
    await second.forget("m2")


async def test_as_many_descriptors_as_a_migration_can_have(directory: Path) -> None:
    store = OurStore(directory)
    contents = [str(number) for number in range(130)]  # userfaultfd, ledger, 128 regions
    await kept(store, "m1", *contents)
    assert texts((await store.taken())["m1"]) == contents
    await store.forget("m1")


async def test_a_killed_holder_is_a_clear_error_and_then_replaced(directory: Path) -> None:
    store = OurStore(directory)
    await kept(store, "m1", "a")
    (pid,) = holders(directory)
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    with pytest.raises(HostError, match="holder of descriptors") as caught:
        await kept(store, "m2", "b")
    assert caught.value.code == "holder"
    assert "killed" in caught.value.hint
    await kept(store, "m2", "b")
    assert list(await OurStore(directory).taken()) == ["m2"]
    await store.forget("m2")


async def test_forgetting_never_raises(directory: Path) -> None:
    store = OurStore(directory)
    await store.forget("m1")
    assert holders(directory) == []
    await kept(store, "m1", "a")
    (pid,) = holders(directory)
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    await store.forget("m1")


def no_descriptor(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def test_an_agent_out_of_descriptors_forgets_without_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kept(OurStore(directory), "m1", "a")
    store = OurStore(directory)
    monkeypatch.setattr(socket, "socket", no_descriptor)
    with capture_logs() as logs:
        await store.forget("m1")
    assert [line["event"] for line in logs] == ["cannot reach the holder of descriptors"]


async def test_an_agent_out_of_descriptors_does_not_believe_that_nothing_was_left(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OurStore(directory)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", no_descriptor)
        with pytest.raises(HostError, match="Too many open files") as caught:
            await store.taken()
    assert caught.value.code == "holder"
    await kept(OurStore(directory), "m1", "a")
    assert list(await store.taken()) == ["m1"]


async def test_nothing_is_taken_where_nothing_was_left(directory: Path) -> None:
    assert await OurStore(directory).taken() == {}
    (directory / "holder.sock").write_bytes(b"")  # nor from something that is no socket
    assert await OurStore(directory).taken() == {}


async def test_no_holder_can_be_started_says_why(directory: Path) -> None:
    store = OurStore(directory / "nowhere")
    with pytest.raises(HostError, match="No such file") as caught:
        await kept(store, "m1", "a")
    assert caught.value.code == "holder"


def test_a_stranger_is_answered_and_does_no_harm(python: str, directory: Path) -> None:
    path = str(directory / "holder.sock")
    subprocess.run([python, "-m", "migrated.recovery.holder", path], check=True, timeout=PATIENCE_SECONDS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(PATIENCE_SECONDS)
        stranger.connect(path)
        for request in (b"\xff", b"[]", b"{}", b'{"op": 5}', b'{"op": "list", "name": {}}', b"null"):
            fd = memfd("x")
            socket.send_fds(stranger, [request], [fd])
            os.close(fd)
            assert b'"ok"' in stranger.recv(1 << 16)
        (pid,) = holders(directory)
        assert not [fd for fd in os.listdir(f"/proc/{pid}/fd") if "memfd" in os.readlink(f"/proc/{pid}/fd/{fd}")]


# ---------------------------------------------------------------- the service manager


class Manager:
    """A service manager: keeps up to ``room`` descriptors under their names, as systemd does, or only reads readiness."""

    def __init__(self, path: Path, room: int) -> None:
        self.room = room
        self.stored: list[tuple[str, int]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 300)
            if data == b"the end":
                return
            told = dict(line.split("=", 1) for line in data.decode().split("\n"))
            if told.get("FDSTOREREMOVE"):
                for name, fd in [entry for entry in self.stored if entry[0] == told["FDNAME"]]:
                    self.stored.remove((name, fd))
                    os.close(fd)
            for fd in fds:
                known = any(self._same(fd, other) for _, other in self.stored)
                if told.get("FDSTORE") and told["FDPOLL"] == "0" and len(self.stored) < self.room and not known:
                    self.stored.append((told["FDNAME"], fd))
                else:
                    os.close(fd)

    def _same(self, fd: int, other: int) -> bool:
        """kcmp(2): whether these are one open file.  They share its position then."""
        with contextlib.suppress(OSError):
            before = os.lseek(other, 0, os.SEEK_CUR)
            try:
                return os.lseek(fd, before + 1, os.SEEK_SET) == os.lseek(other, 0, os.SEEK_CUR)
            finally:
                os.lseek(fd, before, os.SEEK_SET)
        return False

    def restart(self, code: str) -> str:
        """Run a Python program with all that is stored, in another order than it came; its output."""
        shuffled = self.stored[::-1]

        def give() -> None:
            for index, (_, fd) in enumerate(shuffled):
                os.dup2(fd, 600 + index)
            for index in range(len(shuffled)):
                os.dup2(600 + index, 3 + index)

        done = subprocess.run(
            [sys.executable, "-c", f"import os; os.environ['LISTEN_PID'] = str(os.getpid())\n{code}"],
            env={**os.environ, "LISTEN_FDS": str(len(shuffled)), "LISTEN_FDNAMES": ":".join(n for n, _ in shuffled)},
            close_fds=False,
            preexec_fn=give,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert not done.stderr
        return done.stdout

    def end(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"the end", self._socket.getsockname())
        self._thread.join()
        self._socket.close()
        for _, fd in self.stored:
            os.close(fd)


@pytest.fixture
def manager(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(directory / "notify", room=80)
    monkeypatch.setenv("NOTIFY_SOCKET", str(directory / "notify"))
    yield made
    made.end()


#: An agent that takes back what the one before it left.
NEXT_AGENT = """
import asyncio, os
from pathlib import Path
from migrated.recovery.store import store_for
async def main():
    taken = await store_for(Path("{directory}")).taken()
    for name, fds in sorted(taken.items()):
        print(name, *(os.pread(fd, 9, 0).decode() for fd in fds), any(map(os.get_inheritable, fds)))
asyncio.run(main())
"""


def chosen(store: DescriptorStore) -> type[object]:
    return type(store.chosen if isinstance(store, CombinedStore) else store)


async def test_descriptors_come_back_from_the_service_manager_in_their_order(manager: Manager, directory: Path) -> None:
    store = store_for(directory)
    contents = [str(number) for number in range(66)]
    await kept(store, "migrated-1", *contents)
    await kept(store, "migrated-2", "uffd", "ledger", "memory")
    told = manager.restart(NEXT_AGENT.format(directory=directory))
    assert told == f"migrated-1 {' '.join(contents)} False\nmigrated-2 uffd ledger memory False\n"
    await store.forget("migrated-1")
    told = manager.restart(NEXT_AGENT.format(directory=directory))
    assert told == "migrated-2 uffd ledger memory False\n"
    await store.forget("migrated-2")
    assert await asyncio.to_thread(systemd._barrier)  # all of it was read
    assert manager.stored == []
    assert holders(directory) == []


async def test_the_next_agent_can_forget_what_it_took(manager: Manager, directory: Path) -> None:
    await kept(store_for(directory), "migrated-1", "a", "b")
    code = (
        NEXT_AGENT.format(directory=directory)
        .replace("    taken = await store_for", "    store = store_for")
        .replace(".taken()\n", "\n    taken = await store.taken()\n    await store.forget('migrated-1')\n")
    )
    assert manager.restart(code) == "migrated-1 a b False\n"
    assert systemd._barrier()  # it has read all that was sent
    assert manager.stored == []


async def test_one_file_given_twice_is_kept_twice(manager: Manager, directory: Path) -> None:
    store = store_for(directory)
    fd = memfd("a")
    other = os.dup(fd)
    await store.keep("migrated-1", [fd, other, fd])
    os.close(fd)
    os.close(other)
    assert manager.restart(NEXT_AGENT.format(directory=directory)) == "migrated-1 a a a False\n"


async def test_a_store_that_is_full_is_an_error_before_anything_depends_on_it(
    manager: Manager, directory: Path
) -> None:
    store = store_for(directory)
    manager.room = 2
    with pytest.raises(HostError, match="does not keep") as caught:
        await kept(store, "migrated-1", "a", "b", "c")
    assert caught.value.code == "descriptor-store"
    await store.forget("migrated-1")
    assert systemd._barrier()  # it has read all that was sent
    assert manager.stored == []


async def test_a_service_manager_without_a_store_means_a_holder(manager: Manager, directory: Path) -> None:
    manager.room = 0
    with capture_logs() as logs:
        store = store_for(directory)
    assert chosen(store) is HolderStore
    assert [log["problem"] for log in logs] == ["it has no descriptor store"]
    await kept(store, "migrated-1", "a")
    (pid,) = holders(directory)
    # The next agent is told of a store, and still finds what the one before it had held.
    manager.room = 80
    assert manager.restart(NEXT_AGENT.format(directory=directory)) == "migrated-1 a False\n"
    await store.forget("migrated-1")
    await gone(pid)


async def test_what_is_kept_outlives_a_stop_that_empties_the_store(manager: Manager, directory: Path) -> None:
    store = store_for(directory)
    await kept(store, "migrated-1", "uffd", "ledger", "memory")
    assert isinstance(store, CombinedStore)
    await store.copy_to_holder()
    while manager.stored:
        os.close(manager.stored.pop()[1])
    assert manager.restart(NEXT_AGENT.format(directory=directory)) == "migrated-1 uffd ledger memory False\n"
    (pid,) = holders(directory)
    await store.forget("migrated-1")
    await gone(pid)


def test_a_service_manager_that_does_not_answer_means_a_holder(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "BARRIER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as silent:
        silent.bind(str(directory / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(directory / "notify"))
        assert chosen(store_for(directory)) is HolderStore
    assert chosen(store_for(directory)) is HolderStore  # it has gone, too


def test_the_service_manager_is_preferred(manager: Manager, directory: Path) -> None:
    assert chosen(store_for(directory)) is SystemdStore


def test_without_one_there_is_a_holder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert chosen(store_for(directory)) is HolderStore


async def test_a_service_manager_that_is_gone_is_an_error_to_keep_and_none_to_forget(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(directory / "nobody"))
    fd = memfd("x")
    with pytest.raises(HostError, match="service manager"):
        await SystemdStore().keep("migrated-1", [fd])
    await SystemdStore().forget("migrated-1")
    os.close(fd)


def test_what_the_service_manager_hands_back_is_taken_once(python: str) -> None:
    code = """
import asyncio, os
from migrated.recovery.store import SystemdStore
os.environ["LISTEN_PID"] = str(os.getpid())
async def main():
    taken = await SystemdStore().taken()
    print({name: [os.pread(fd, 9, 0).decode() for fd in fds] for name, fds in taken.items()})
    print([os.get_inheritable(fd) for fds in taken.values() for fd in fds], await SystemdStore().taken())
asyncio.run(main())
"""
    fds = [memfd("a"), memfd("b"), memfd("c")]

    def as_the_service_manager() -> None:
        for index, fd in enumerate(fds):
            os.dup2(fd, 600 + index)
        for index in range(3):
            os.dup2(600 + index, 3 + index)

    done = subprocess.run(
        [python, "-c", code],
        env={**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "m1:m2:m1"},
        close_fds=False,
        preexec_fn=as_the_service_manager,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    for fd in fds:
        os.close(fd)
    assert done.stdout.splitlines() == ["{'m1': ['a', 'c'], 'm2': ['b']}", "[False, False, False] {}"], done.stderr


# ---------------------------------------------------------------- both together


@pytest.fixture
def journal(directory: Path) -> Journal[TargetEntry]:
    return Journal(directory / "journal", TargetEntry)


async def test_the_next_agent_finds_entries_with_their_descriptors(
    directory: Path, journal: Journal[TargetEntry]
) -> None:
    store = OurStore(directory)
    states = {name: RecoveryState(journal, store, name) for name in ("aa", "bb", "cc")}
    fds = [memfd("1"), memfd("2")]
    await states["aa"].keep_descriptors(fds)
    await states["aa"].write(TARGET)
    await states["bb"].write(TARGET)  # died before it had anything kept
    await states["cc"].keep_descriptors(fds)  # died before it could write
    for fd in fds:
        os.close(fd)
    after = OurStore(directory)
    with capture_logs() as logs:
        found = await LeftoverMigrations(journal, after).take()
    assert [(name, entry) for name, entry, _ in found] == [("aa", TARGET), ("bb", TARGET)]
    assert [texts(kept_fds) for _, _, kept_fds in found] == [["1", "2"], []]
    assert [log["name"] for log in logs] == [PREFIX + "cc"]
    taken = await after.taken()
    assert {name: texts(left) for name, left in taken.items()} == {PREFIX + "aa": ["1", "2"]}
    (pid,) = holders(directory)
    await RecoveryState(journal, after, "aa").clear()
    await RecoveryState(journal, after, "bb").clear()
    store.die()
    await gone(pid)
    assert await LeftoverMigrations(journal, OurStore(directory)).take() == []


class Ending:
    """A holder that takes the first connection and ends: before it reads the request, or without a look at it."""

    def __init__(self, directory: Path, *, accepts: bool) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._path = directory / "holder.sock"
        self._listener.bind(str(self._path))
        self._listener.listen(8)
        self._accepts = accepts
        self.thread = threading.Thread(target=self._end)
        self.thread.start()

    def _end(self) -> None:
        with self._listener:
            if self._accepts:
                connection, _ = self._listener.accept()
                with connection:
                    select.select([connection], [], [], PATIENCE_SECONDS)
            else:
                select.select([self._listener], [], [], PATIENCE_SECONDS)
                time.sleep(0.05)  # the request lies there unread
            self._path.unlink()


@pytest.mark.parametrize("accepts", [True, False])
async def test_a_holder_that_is_just_ending_holds_nothing(directory: Path, accepts: bool) -> None:
    ending = Ending(directory, accepts=accepts)
    assert await OurStore(directory).taken() == {}
    ending.thread.join()


@pytest.mark.parametrize("accepts", [True, False])
async def test_another_holder_is_started_where_one_is_just_ending(directory: Path, accepts: bool) -> None:
    ending = Ending(directory, accepts=accepts)
    store = OurStore(directory)
    await kept(store, "m1", "a")
    ending.thread.join()
    assert texts((await OurStore(directory).taken())["m1"]) == ["a"]


async def test_descriptors_of_an_entry_that_is_not_believed_stay_kept(
    directory: Path, journal: Journal[TargetEntry]
) -> None:
    store = OurStore(directory)
    recovery_state = RecoveryState(journal, store, "aa")
    fd = memfd("x")
    await recovery_state.keep_descriptors([fd])
    os.close(fd)
    await recovery_state.write(TARGET)
    (journal.directory / "aa.journal").write_bytes(b"rubbish")
    with capture_logs() as logs:
        assert await LeftoverMigrations(journal, store).take() == []
    assert {log["log_level"] for log in logs} == {"error"}
    for _ in range(2):  # an agent that is started once more does not let go of them either
        again = OurStore(directory)
        assert await LeftoverMigrations(journal, again).take() == []
        assert texts((await OurStore(directory).taken())["migrated-aa"]) == ["x"]
    await store.forget("migrated-aa")


async def test_no_agent_starts_on_a_journal_that_it_cannot_read(
    directory: Path, journal: Journal[TargetEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OurStore(directory)
    recovery_state = RecoveryState(journal, store, "aa")
    fd = memfd("x")
    await recovery_state.keep_descriptors([fd])
    os.close(fd)
    await recovery_state.write(TARGET)
    with monkeypatch.context() as patch:
        patch.setattr("migrated.recovery.journal.VERSION", 99)
        with pytest.raises(ConfigError, match="another version"):
            await LeftoverMigrations(journal, store).take()
    ((name, entry, fds),) = await LeftoverMigrations(journal, store).take()
    assert (name, entry) == ("aa", TARGET)
    assert texts(fds) == ["x"]
    await recovery_state.clear()


async def test_an_entry_that_cannot_be_removed_keeps_its_descriptors(
    directory: Path, journal: Journal[TargetEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OurStore(directory)
    recovery_state = RecoveryState(journal, store, "aa")
    fd = memfd("x")
    await recovery_state.keep_descriptors([fd])
    os.close(fd)
    monkeypatch.setattr("migrated.recovery.state.REMOVE_PAUSES", (0.0,))
    (journal.directory / "aa.journal").mkdir(parents=True)
    with capture_logs() as logs:
        await recovery_state.clear()
    assert [log["migration"] for log in logs] == ["aa", "aa"]
    assert texts((await OurStore(directory).taken())["migrated-aa"]) == ["x"]
    await store.forget("migrated-aa")
