"""What may block runs beside the event loop: one migration's slow disk or holder must not stop another's heartbeats."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import msgspec
import pytest

from migrated import config, daemon
from migrated.agent.archive import Archive
from migrated.agent.migration import Migration
from migrated.agent.record import Record, State
from migrated.config import HooksSection
from migrated.guests.qemu.process import QemuProcess
from migrated.guests.qemu.qmp import Monitor
from migrated.recovery import systemd
from migrated.recovery.journal import Journal, JournalError, SourceEntry
from migrated.recovery.state import LeftoverMigrations, RecoveryState
from migrated.recovery.store import HolderStore, SystemdStore
from migrated.source.agent import SourceAgent
from migrated.source.stage import RestartStage
from tests.unit.recovery.entries import SOURCE

T = TypeVar("T")
PATIENCE_SECONDS = 8.0  # less than the holder's own limit


class Blocked:
    """Stands in for a call: it returns when another coroutine has seen that it was made."""

    def __init__(self, result: Any = None) -> None:
        self.made = threading.Event()
        self.let_go = threading.Event()
        self.result = result

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.made.set()
        assert self.let_go.wait(PATIENCE_SECONDS), "the event loop stands still"
        return self.result

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work, which makes the call; this coroutine lets it return."""
        task = asyncio.ensure_future(work)
        while not self.made.is_set() and not task.done():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.001)
        assert self.made.is_set(), "the call was not made"
        self.let_go.set()
        return await task


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short one: sockets live in it."""
    with tempfile.TemporaryDirectory(prefix="mgb-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def journal(tmp_path: Path) -> Journal[SourceEntry]:
    return Journal(tmp_path / "journal", SourceEntry)


@pytest.mark.parametrize("what", ["taken", "keep", "forget"])
async def test_a_holder_that_is_slow_to_answer(directory: Path, what: str) -> None:
    answering = Blocked()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "holder.sock"))
        listener.listen()

        def hold() -> None:
            connection, _ = listener.accept()
            with connection:
                while connection.recv(1 << 16):
                    if not answering.made.is_set():
                        answering()
                    connection.send(json.dumps({"ok": True, "names": []}).encode())

        thread = threading.Thread(target=hold)
        thread.start()
        store = HolderStore(directory)
        with open("/dev/null") as file:  # noqa: ASYNC230 - a device
            works = {"keep": lambda: store.keep("m", [file.fileno()]), "forget": lambda: store.forget("m")}
            await answering.during(works.get(what, store.taken)())
        if store._socket is not None:
            store._socket.close()
        thread.join()


@pytest.mark.parametrize("what", ["keep", "forget"])
async def test_a_service_manager_that_is_slow_to_read(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    sending = Blocked(result=True)
    store = SystemdStore()
    store._stored["m"] = ["m.0"]
    monkeypatch.setattr(systemd, "forget_fds", sending)
    monkeypatch.setattr(systemd, "store_fd", lambda *_: True)
    monkeypatch.setattr(systemd, "keeps_fds", lambda: True)
    with open("/dev/null") as file:  # noqa: ASYNC230 - a device
        await sending.during(store.keep("m", [file.fileno()]) if what == "keep" else store.forget("m"))
    for fds in store.held.values():
        os.close(fds[0])


async def test_a_service_manager_that_is_slow_to_take_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    sending = Blocked(result=True)
    store = SystemdStore()
    monkeypatch.setattr(systemd, "store_fd", sending)
    monkeypatch.setattr(systemd, "keeps_fds", lambda: True)
    with open("/dev/null") as file:  # noqa: ASYNC230 - a device
        await sending.during(store.keep("m", [file.fileno()]))
    os.close(store.held["m"][0])


async def test_a_service_manager_that_is_slow_to_hear_of_us(monkeypatch: pytest.MonkeyPatch) -> None:
    sending = Blocked(result=True)
    monkeypatch.setattr(systemd, "notify", sending)
    await sending.during(daemon._notify("READY=1"))


@pytest.mark.parametrize("what", ["supersede_others", "write", "clear", "close_entry"])
async def test_a_disk_that_is_slow(journal: Journal[SourceEntry], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    call = {"supersede_others": "load", "write": "write", "clear": "remove", "close_entry": "close"}[what]
    disk = Blocked(result={})
    monkeypatch.setattr(journal, call, disk)
    monkeypatch.setattr(journal, "in_memory", False)  # wherever the tests' files are
    store = cast("Any", SimpleNamespace(forget=_nothing))
    recovery_state = RecoveryState(journal, store, "m")
    arguments: tuple[Any, ...] = {"supersede_others": ("vm1",), "write": (SOURCE,)}.get(what, ())
    await disk.during(getattr(recovery_state, what)(*arguments))


async def _nothing(*_: Any) -> dict[str, list[int]]:
    return {}


async def test_a_disk_that_is_slow_when_an_agent_starts(
    journal: Journal[SourceEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Blocked(result={})
    monkeypatch.setattr(journal, "load", disk)
    assert await disk.during(LeftoverMigrations(journal, cast("Any", SimpleNamespace(taken=_nothing))).take()) == []


async def test_a_journal_that_is_slow_to_take_commit_back(
    journal: Journal[SourceEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest stands still meanwhile; others must not."""
    disk = Blocked()
    monkeypatch.setattr(journal, "remove", disk)
    recovery_state = RecoveryState(journal, cast("Any", None), "m")
    guest = cast("Any", SimpleNamespace(memento=dict))
    entry = msgspec.structs.replace(SOURCE, stage="committed")
    dialer, options = SimpleNamespace(address="b:1"), SimpleNamespace(max_bandwidth=0, drain_bandwidth=0)
    stage = RestartStage(recovery_state, guest, cast("Any", dialer), cast("Any", options), log=None, entry=entry)

    def full(*_: Any) -> None:
        raise JournalError("no room", replaced=False, hint="")

    monkeypatch.setattr(journal, "write", full)
    assert await disk.during(stage.withdraw_commit())
    assert not stage.written


async def test_who_has_the_monitors_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Blocked(result=os.getpid())
    monitor = SimpleNamespace(peer_pid=looking)

    async def connect(*_: Any, **__: Any) -> Any:
        return monitor

    monkeypatch.setattr(Monitor, "connect", connect)
    qemu = QemuProcess("vm1", Path("/nowhere"), command_seconds=1)
    await looking.during(qemu.connect())
    qemu.handle.close()


class OneMigration(Migration):
    """Ends as soon as it begins."""

    role = "source"

    async def _migrate(self) -> None:
        self.set_state(State.ABORTED)


async def test_a_record_that_is_slow_to_be_archived_and_yet_is_there_when_the_agent_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopping agent waits for it."""
    written: list[str] = []
    disk = Blocked()

    def add(_: Archive, record: Record) -> None:
        disk()
        written.append(record.id)

    monkeypatch.setattr(Archive, "add", add)
    table = {"agent": {"state_dir": str(tmp_path)}, "tls": {"insecure": True}}
    agent: Any = SourceAgent(config.decode(table, "source"))
    stop = asyncio.Event()

    async def life() -> None:
        running = asyncio.ensure_future(agent.run(stop))
        agent._launch(OneMigration(Record(id="m", guest="vm1", role="source", mode="hybrid"), HooksSection()))
        stop.set()
        await running

    await disk.during(life())
    assert written == ["m"]
