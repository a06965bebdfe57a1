"""The agent as a process: start, service manager, signals, and what stands in the way of a start."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrated import config
from migrated import daemon as module
from migrated.client import Client
from migrated.daemon import blocking_calls
from migrated.errors import HostError
from migrated.recovery import systemd
from tests.unit.http_cli.served import serving

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

FAKE = Path(__file__).with_name("fake_agent.py")


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self.heard: list[str] = []

    async def hear(self, start: str) -> str:
        """Wait until it was told something that starts like this."""
        async with asyncio.timeout(30):
            while True:
                data = await asyncio.get_running_loop().sock_recv(self._socket, 65536)
                lines = data.decode().split("\n")
                self.heard += lines
                for line in lines:
                    if line.startswith(start):
                        return line

    def close(self) -> None:
        self._socket.close()


def write_config(directory: Path, status: str = "") -> Path:
    path = directory / "agent.toml"
    path.write_text(f"""
[agent]
state_dir = "{directory}/state"
[http]
status = "{status}"
[tls]
insecure = true
[timeouts]
shutdown = 5
""")
    return path


@contextlib.asynccontextmanager
async def daemon(path: Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(FAKE), str(path), "source"),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> list[dict[str, str]]:
    """Wait for its end; its log, which is JSON since stderr is no terminal."""
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    return [json.loads(line) for line in err.decode().splitlines()]


async def test_it_is_ready_feeds_the_watchdog_and_stops_in_order(short_dir: Path) -> None:
    manager = Manager(short_dir / "notify")
    async with daemon(write_config(short_dir), NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="300000") as process:
        await manager.hear("READY=1")
        assert (short_dir / "state" / "control.sock").exists()
        assert await manager.hear("STATUS=") == "STATUS=ready"
        for _ in range(3):
            await manager.hear("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        await manager.hear("STOPPING=1")
        log = await ended(process)
    manager.close()
    assert process.returncode == 0
    assert [line["event"] for line in log] == ["agent up", "stopping", "agent down"]
    assert not (short_dir / "state" / "control.sock").exists()


async def test_an_unhealthy_agent_does_not_feed_the_watchdog(
    short_dir: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(short_dir / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    async with serving(short_dir, "source", unused_port) as served:
        await manager.hear("WATCHDOG=1")
        served.agent.sick = ["fault thread of vm1 is silent"]
        await manager.hear("STATUS=unhealthy: fault thread of vm1 is silent")
        manager.heard.clear()
        for _ in range(3):
            await manager.hear("STATUS=unhealthy")
        assert "WATCHDOG=1" not in manager.heard
        served.agent.sick = []
        await manager.hear("WATCHDOG=1")
    manager.close()


async def test_a_second_agent_on_the_same_directory_is_refused_by_name(short_dir: Path) -> None:
    path = write_config(short_dir)
    manager = Manager(short_dir / "notify")
    async with daemon(path, NOTIFY_SOCKET=str(manager.path)) as first:
        await manager.hear("READY=1")
        async with daemon(path) as second:
            log = await ended(second)
        assert second.returncode == 1
        assert log[-1]["code"] == "already-running"
        assert f"process {first.pid}" in log[-1]["message"]
        async with Client(str(short_dir / "state")) as client:
            assert await client.migrations() == []  # the first one has not noticed
    manager.close()


async def test_the_socket_of_a_killed_agent_is_replaced(short_dir: Path) -> None:
    path = write_config(short_dir)
    manager = Manager(short_dir / "notify")
    async with daemon(path, NOTIFY_SOCKET=str(manager.path)) as first:
        await manager.hear("READY=1")
        first.kill()
        await first.wait()
    assert (short_dir / "state" / "control.sock").exists()
    async with daemon(path, NOTIFY_SOCKET=str(manager.path)):
        await manager.hear("READY=1")
        async with Client(str(short_dir / "state")) as client:
            assert await client.migrations() == []
    manager.close()


async def test_somebodys_file_in_the_sockets_place_is_left_alone(short_dir: Path) -> None:
    (short_dir / "state").mkdir()
    (short_dir / "state" / "control.sock").write_text("mine")
    async with daemon(write_config(short_dir)) as process:
        log = await ended(process)
    assert process.returncode == 1
    assert "a file of another kind" in log[-1]["message"]
    assert (short_dir / "state" / "control.sock").read_text() == "mine"


async def test_no_blocking_call_waits_for_another_one() -> None:
    """However many hang on a disk or reserve memory: the journal is written before COMMIT while a guest is paused."""
    go_on, loop = threading.Event(), asyncio.get_running_loop()
    with blocking_calls() as threads:
        loop.set_default_executor(threads)
        others = [loop.run_in_executor(None, go_on.wait) for _ in range(300)]
        try:
            async with asyncio.timeout(20):
                assert await asyncio.to_thread(lambda: "done") == "done"  # what `in_thread` uses
            assert not any(other.done() for other in others)
        finally:
            go_on.set()
            await asyncio.gather(*others)


async def test_a_status_port_in_use_is_named(short_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        async with daemon(write_config(short_dir, address)) as process:
            log = await ended(process)
    assert process.returncode == 1
    assert log[-1]["message"] == f"status site: {address} is in use by another program"
    assert "http.status" in log[-1]["hint"]


async def test_a_state_directory_that_cannot_be_is_named(short_dir: Path) -> None:
    (short_dir / "state").write_text("")  # a file in its place: nobody, root neither, can make it
    async with daemon(write_config(short_dir)) as process:
        log = await ended(process)
    assert process.returncode == 1
    assert f"state directory {short_dir}/state" in log[-1]["message"]


async def test_an_agent_that_fails_ends_the_daemon_with_its_error(short_dir: Path, unused_port: int) -> None:
    with pytest.raises(HostError, match="no more"):
        async with serving(short_dir, "source", unused_port) as served:
            served.agent.failure = HostError("no more")
    assert not served.settings.control_socket.exists()


async def test_no_collection_looks_at_what_was_there_at_the_start(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take tens of milliseconds, perhaps while a guest is paused."""
    frozen: list[int] = []

    async def serve(*_: object) -> None:
        frozen.append(gc.get_freeze_count())

    monkeypatch.setattr(module, "serve", serve)
    loop = asyncio.get_running_loop()
    try:
        await module._main(config.load(str(write_config(short_dir)), "source"))
    finally:
        gc.unfreeze()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    assert frozen[0] > 10_000


def test_without_a_service_manager_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert systemd.notify("READY=1") is False
    assert systemd.take_stored_fds() == {}


def test_stored_descriptors_reach_the_manager_and_are_not_dropped_for_polling_an_error(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_dir / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_dir / "notify"))
        fd = os.memfd_create("ledger")
        os.write(fd, b"what must not be lost")
        assert systemd.store_fd("vm1-ledger", fd) is True
        data, fds, _, _ = socket.recv_fds(manager, 4096, 8)
        assert data.decode().split("\n") == ["FDSTORE=1", "FDNAME=vm1-ledger", "FDPOLL=0"]
        assert os.pread(fds[0], 100, 0) == b"what must not be lost"
        assert systemd.forget_fds("vm1-ledger") is True
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=vm1-ledger"
        for one in (fd, *fds):
            os.close(one)
    with pytest.raises(ValueError, match="cannot name"):
        systemd.store_fd("a:b", 0)


RETURN = """
import json, os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from migrated.recovery import systemd
fds = systemd.take_stored_fds()
print(json.dumps([fds, [os.get_inheritable(fd) for group in fds.values() for fd in group], systemd.take_stored_fds()]))
"""


async def test_stored_descriptors_come_back_by_name() -> None:
    low = os.pipe()
    read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in low)  # above 3, 4, 5
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f'exec 3<&{read} 4>&{write} 5<&{read}; exec "$0" -c "$1"', sys.executable, RETURN),
        stdout=asyncio.subprocess.PIPE,
        pass_fds=(read, write),
        env={**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "vm1:vm2:vm1"},
    )
    out, _ = await process.communicate()
    for fd in (read, write, *low):
        os.close(fd)
    assert json.loads(out) == [{"vm1": [3, 5], "vm2": [4]}, [False, False, False], {}]


async def test_a_wrong_guest_table_is_status_2_and_names_file_table_and_key(short_dir: Path) -> None:
    path = write_config(short_dir)
    path.write_text(path.read_text() + '[guests.vm1]\ndriver = "qemu"\nqpm = "/x"\n')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migrated", "source", "--config", str(path)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    assert err.decode().splitlines() == [
        f"error: {path}: guests.vm1.qpm: no such key",
        "  hint: did you mean 'qmp'? allowed here: driver, qmp, on_release",
    ]
