"""A co-operative guest is a process of its own, and moves between two real agents while it checks its memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from migrated.demo.console import GuestConsole
from migrated.demo.pair import AgentPair
from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests.driver import FaultSource, Outline
from migrated.guests.process.config import ProcessSourceConfig, ProcessTargetConfig
from migrated.guests.process.source import ProcessHub, ProcessSource
from migrated.guests.process.target import ProcessTarget
from migrated.memory import memfd
from migrated.memory.regions import Region, TargetMemory
from migrated.memory.tracker import Tracker
from migrated.settings import Timeouts, read

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SIZE = 16 * MIB
LIMIT = 30.0


class Pipe:
    """A state channel within the test."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(self) -> bytes:
        return await self.pieces.get()

    async def write(self, data: bytes) -> None:
        await self.pieces.put(data)

    async def close_write(self) -> None:
        await self.pieces.put(b"")


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="mg") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def c_example(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C example, compiled with every warning an error."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    out = tmp_path_factory.mktemp("example") / "process_guest"
    command = [
        "gcc",
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        "-I",
        str(ROOT / "native/include"),
    ]
    command += ["-I", str(ROOT / "migrated/demo/images"), "-o", str(out)]
    subprocess.run([*command, str(ROOT / "native/examples/process_guest.c")], check=True, timeout=60)
    return str(out)


@pytest.fixture(params=["python", "c"])
def program(request: pytest.FixtureRequest, python: str) -> list[str]:
    """The command line of a self-checking guest, up to its options."""
    if request.param == "c":
        return [request.getfixturevalue("c_example"), "--threads", "2", "--rate", "20000"]
    return [python, "-m", "migrated.demo.example", "--rate", "500"]


class Guest:
    """A guest process started by the test."""

    def __init__(self, command: list[str], socket: Path, console: Path, size: int = SIZE) -> None:
        self.process = subprocess.Popen(
            [*command, "--size", str(size // MIB), "--console", str(console)],
            env={**os.environ, "MIGRATED_SOCKET": str(socket)},
            cwd=ROOT,
        )
        self.console_path = console

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=LIMIT)


@contextlib.asynccontextmanager
async def hub_and_guest(
    short: Path, program: list[str], *, page_size: str = "4K"
) -> AsyncIterator[tuple[ProcessHub, Guest, GuestConsole]]:
    table: dict[str, Any] = {"driver": "process", "socket": str(short / "p.sock"), "page_size": page_size}
    guest = Guest(program, short / "p.sock", short / "con")
    console = GuestConsole()
    try:
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:
            await hub.wait_connected(LIMIT)
            await console.attach(short / "con")
            yield hub, guest, console
    finally:
        guest.end()
        await console.close()


def written(bitmaps: list[bytes]) -> int:
    return sum(int.from_bytes(bitmap, "little").bit_count() for bitmap in bitmaps)


async def test_the_source_driver_tracks_pauses_and_resumes_a_guest(short: Path, program: list[str]) -> None:
    async with hub_and_guest(short, program) as (hub, _, console):
        await console.stats(LIMIT)
        source = ProcessSource("p", hub)
        memory = await source.open()
        assert [region.size_bytes for region in memory.regions] == [SIZE]
        assert await source.outline() == Outline("running", SIZE)
        assert not source.needs_quiesced_scans
        tracker = Tracker(memory, await source.tracking_uffd())
        tracker.arm()
        await console.stats(LIMIT)
        assert written(tracker.scan()) > 0
        await source.pause(Pipe())
        assert await source.outline() == Outline("paused", SIZE)
        tracker.scan()
        assert written(tracker.scan()) == 0  # nothing is written between two looks at a paused guest
        pipe = Pipe()
        await source.send_state(pipe)
        assert await pipe.read()
        await source.resume()
        await console.stats(LIMIT)
        tracker.disarm()
        tracker.close()
        await source.release_tracking()
        assert await console.verified()
        await source.close()


async def test_a_guest_survives_its_agent_and_shows_its_memory_to_the_next(short: Path, program: list[str]) -> None:
    table: dict[str, Any] = {"driver": "process", "socket": str(short / "p.sock"), "page_size": "4K"}
    guest = Guest(program, short / "p.sock", short / "con")
    console = GuestConsole()
    try:
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:
            first = await hub.wait_connected(LIMIT)
            inode = os.fstat(first.memory_fds[0]).st_ino
            await console.attach(short / "con")
            await console.stats(LIMIT)
        await console.stats(LIMIT)  # runs on without an agent
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:
            again = await hub.wait_connected(LIMIT)
            assert os.fstat(again.memory_fds[0]).st_ino == inode
            assert await console.verified()
    finally:
        guest.end()
        await console.close()


async def test_a_guest_paused_when_its_agent_died_is_made_to_run_by_the_next(short: Path, program: list[str]) -> None:
    table: dict[str, Any] = {"driver": "process", "socket": str(short / "p.sock"), "page_size": "4K"}
    guest = Guest(program, short / "p.sock", short / "con")
    console = GuestConsole()
    try:
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:
            await hub.wait_connected(LIMIT)
            await console.attach(short / "con")
            await console.stats(LIMIT)
            source = ProcessSource("p", hub)
            tracker = Tracker(await source.open(), await source.tracking_uffd())
            tracker.arm()
            await source.pause(Pipe())
            memento = source.memento()
            tracker.close()  # as the end of the agent's process would do: nothing is disarmed
            await source.close()
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:
            source = ProcessSource("p", hub)
            await source.reclaim(memento)
            await console.stats(LIMIT)
            assert await console.verified()
            await source.close()
    finally:
        guest.end()
        await console.close()


async def test_an_incoming_guest_is_taken_back_by_a_restarted_agent(short: Path, python: str) -> None:
    command = [python, "-m", "migrated.demo.example", "--size", str(SIZE // MIB), "--console", str(short / "con")]
    config = ProcessTargetConfig(command=command)
    fd = memfd.allocate(SIZE, 4096, "ram")
    memory = (TargetMemory(Region("ram", SIZE, 4096), fd),)
    first = ProcessTarget("p", config, short, Timeouts())
    faults = await first.start(memory)
    uffd = os.dup(faults.uffd)  # what a descriptor store would hold
    memento = first.memento()
    await first.close()
    second = ProcessTarget("p", config, short, Timeouts())
    try:
        with pytest.raises(GuestError) as caught:
            await second.adopt(faults.pid, uffd, memory, {**memento, "started": 1})
        assert caught.value.code == "guest-gone"
        assert await second.adopt(faults.pid, uffd, memory, memento) == FaultSource(faults.pid, uffd, faults.mappings)
        pipe = Pipe()
        await pipe.write(bytes(32 + 4 * SIZE // 4096))
        await pipe.close_write()
        await asyncio.wait_for(second.load_state(pipe), LIMIT)
    finally:
        await second.kill()
        await second.close()
        os.close(fd)
    assert "killed" in await second.died() or "ended" in await second.died()


async def test_the_end_of_a_guest_is_told_and_its_absence_refused(short: Path, program: list[str]) -> None:
    async with hub_and_guest(short, program) as (hub, guest, _):
        source = ProcessSource("p", hub)
        await source.open()
        guest.process.send_signal(signal.SIGKILL)
        assert "ended" in await asyncio.wait_for(source.died(), LIMIT)
        await source.close()
        await asyncio.wait_for(connection_ended(hub), LIMIT)
        with pytest.raises(GuestError) as caught:
            await ProcessSource("p", hub).open()
        assert caught.value.code == "guest-not-connected"


async def connection_ended(hub: ProcessHub) -> None:
    if hub.guest is not None:
        await asyncio.shield(hub.guest.connection.closed)


async def test_a_released_guest_ends(short: Path, program: list[str]) -> None:
    async with hub_and_guest(short, program) as (hub, guest, console):
        await console.stats(LIMIT)
        source = ProcessSource("p", hub)
        await source.open()
        await source.pause(Pipe())
        await source.release()
        await source.close()
        assert guest.process.wait(timeout=LIMIT) == 0


@pytest.mark.parametrize(
    ("name", "size", "code"), [("other", SIZE, "regions-differ"), ("ram", SIZE * 2, "sizes-differ")]
)
async def test_regions_that_differ_are_refused_by_name(
    short: Path, program: list[str], name: str, size: int, code: str
) -> None:
    config = ProcessTargetConfig(command=[*program, "--size", str(SIZE // MIB), "--console", str(short / "con")])
    target = ProcessTarget("p", config, short, Timeouts())
    fd = memfd.allocate(size, 4096, "ram")
    try:
        region = Region(name, size, 4096)
        await target.check((region,), {})
        with pytest.raises(GuestRefusedError) as caught:
            await target.start((TargetMemory(region, fd),))
        assert caught.value.code == code
    finally:
        await target.kill()
        await target.close()
        os.close(fd)


async def test_a_program_that_ends_before_it_connects_is_told_with_its_words(short: Path) -> None:
    target = ProcessTarget("p", ProcessTargetConfig(command=["sh", "-c", "echo no luck; exit 3"]), short, Timeouts())
    with pytest.raises(GuestError, match=r"exited with status 3.*no luck"):
        await target.start(())
    await target.close()


async def test_a_program_that_never_connects_meets_a_limit(short: Path) -> None:
    config = ProcessTargetConfig(command=["sleep", "60"])
    target = ProcessTarget("p", config, short, Timeouts(guest_start=0.5))
    with pytest.raises(TimeoutExceededError, match="connect"):
        await target.start(())
    await target.kill()
    await target.close()


@pytest.mark.parametrize("mode", ["hybrid", "precopy", "postcopy"])
async def test_a_guest_moves_there_and_loses_nothing(short: Path, program: list[str], mode: str) -> None:
    await move(short, program, mode, "4K", "4K")


@pytest.mark.hugepages
@pytest.mark.parametrize(("source_pages", "target_pages"), [("4K", "2M"), ("2M", "2M"), ("2M", "4K")])
async def test_a_guest_moves_between_page_sizes(
    short: Path, program: list[str], huge_pages: Callable[[int], None], source_pages: str, target_pages: str
) -> None:
    huge_pages((source_pages + target_pages).count("2M") * SIZE // (2 * MIB))
    await move(short, program, "hybrid", source_pages, target_pages)


async def move(short: Path, program: list[str], mode: str, source_pages: str, target_pages: str) -> None:
    command = [*program, "--size", str(SIZE // MIB), "--console", str(short / "con2")]
    pair = AgentPair(
        short,
        source_guests={"p": {"driver": "process", "socket": str(short / "p.sock"), "page_size": source_pages}},
        target_guests={"p": {"driver": "process", "command": command, "page_size": target_pages}},
    )
    console = GuestConsole()
    guest = None
    try:
        async with pair:
            guest = Guest(program, short / "p.sock", short / "con")
            await console.attach(short / "con")
            before = await console.stats(LIMIT)
            started = await pair.source.request(
                "POST", "/v1/migrations", {"guest": "p", "to": pair.address, "mode": mode}
            )
            try:
                record = await pair.source.wait(started["id"], limit_seconds=40)
            except TimeoutExceededError:
                pytest.fail(f"{pair.source.log_tail()}\n{pair.target.log_tail()}")
            assert record["state"] == "completed", (record, pair.source.log_tail(), pair.target.log_tail())
            await console.attach(short / "con2", LIMIT)
            after = await console.stats(LIMIT)
            assert after.operations >= before.operations
            assert await console.verified()
            assert guest.process.wait(timeout=LIMIT) == 0  # what was left on the source has ended
            await console.command("quit")
    finally:
        if guest is not None:
            guest.end()
        await console.close()


async def test_a_guest_of_two_regions_moves_on_from_where_it_arrived(short: Path, program: list[str]) -> None:
    there, back = short / "1", short / "2"
    there.mkdir()
    back.mkdir()

    def target(console: str, next_socket: Path | None) -> dict[str, dict[str, Any]]:
        command = [*program, "--regions", "2", "--size", str(SIZE // MIB), "--console", str(short / console)]
        table: dict[str, Any] = {"driver": "process", "command": command, "page_size": "4K"}
        return {"p": table if next_socket is None else {**table, "next_socket": str(next_socket)}}

    def source(socket: Path) -> dict[str, dict[str, Any]]:
        return {"p": {"driver": "process", "socket": str(socket), "page_size": "4K"}}

    console = GuestConsole()
    guest = None
    try:
        async with (
            AgentPair(there, source_guests=source(short / "a"), target_guests=target("con2", short / "b")) as first,
            AgentPair(back, source_guests=source(short / "b"), target_guests=target("con3", None)) as second,
        ):
            guest = Guest([*program, "--regions", "2"], short / "a", short / "con")
            await console.attach(short / "con")
            await console.stats(LIMIT)
            assert (await first.migrate("p"))["state"] == "completed"
            await console.attach(short / "con2", LIMIT)
            await console.stats(LIMIT)
            async with asyncio.timeout(LIMIT):
                while True:  # it connects to the next agent by itself
                    try:
                        record = await second.migrate("p")
                    except MigratedError as error:
                        record = {"state": "failed", "error": {"code": error.code}}
                    if (record.get("error") or {}).get("code") != "guest-not-connected":
                        break
            assert record["state"] == "completed", record
            await console.attach(short / "con3", LIMIT)
            await console.stats(LIMIT)
            assert await console.verified()
            await console.command("quit")
    finally:
        if guest is not None:
            guest.end()
        await console.close()


async def test_a_guest_that_was_paused_and_not_resumed_is_not_moved_a_second_time(
    short: Path, program: list[str]
) -> None:
    """After COMMIT it may run elsewhere: to move what is left of it here would make it run twice."""
    table: dict[str, Any] = {"driver": "process", "socket": str(short / "p.sock"), "page_size": "4K"}
    guest = Guest(program, short / "p.sock", short / "con")
    console = GuestConsole()
    try:
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:
            await hub.wait_connected(LIMIT)
            await console.attach(short / "con")
            await console.stats(LIMIT)
            source = ProcessSource("p", hub)
            await source.open()
            await source.pause(Pipe())
            memento = source.memento()
            await source.close()
            await refused_as_paused(hub)
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), Timeouts()) as hub:  # the agent was restarted
            await hub.wait_connected(LIMIT)
            await refused_as_paused(hub)
            reclaimed = ProcessSource("p", hub)
            await reclaimed.reclaim(memento)
            await reclaimed.close()
            again = ProcessSource("p", hub)
            await again.open()
            await again.close()
    finally:
        guest.end()
        await console.close()


async def refused_as_paused(hub: ProcessHub) -> None:
    source = ProcessSource("p", hub)
    with pytest.raises(GuestRefusedError) as caught:
        await source.open()
    assert caught.value.code == "guest-not-movable"
    await source.close()


async def test_a_guest_left_by_an_agent_that_was_restarted_is_asked_to_end(short: Path, program: list[str]) -> None:
    """It connects some time after the restart; it ends by itself then, rather than by SIGKILL."""
    table: dict[str, Any] = {"driver": "process", "socket": str(short / "p.sock"), "page_size": "4K"}
    guest = Guest(program, short / "p.sock", short / "con")
    timeouts = Timeouts(release=LIMIT)
    try:
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), timeouts) as hub:
            await hub.wait_connected(LIMIT)
            source = ProcessSource("p", hub)
            pid = (await source.open()).pid
            memento = source.memento()
            await source.close()
        async with ProcessHub("p", read(ProcessSourceConfig, table, "p"), timeouts) as hub:
            source = ProcessSource("p", hub)
            await source.adopt(pid, memento)
            await source.release()
            await source.close()
        assert guest.process.wait(timeout=LIMIT) == 0
    finally:
        guest.end()


async def test_a_program_that_never_connects_is_told_with_its_words(short: Path, python: str) -> None:
    """On the source, where the operator is: the limit of the driver is met before any other."""
    words = "waiting for a licence server"
    pair = AgentPair(
        short,
        source_guests={"p": {"driver": "process", "socket": str(short / "p.sock"), "page_size": "4K"}},
        target_guests={"p": {"driver": "process", "command": ["sh", "-c", f"echo {words}; exec sleep 600"]}},
        extra={"timeouts": {"guest_start": 3.0}},
    )
    console = GuestConsole()
    guest = None
    try:
        async with pair:
            guest = Guest([python, "-m", "migrated.demo.example"], short / "p.sock", short / "con")
            await console.attach(short / "con")
            await console.stats(LIMIT)
            record = await pair.migrate("p")
            assert record["state"] == "failed"
            assert words in record["error"]["message"]
    finally:
        if guest is not None:
            guest.end()
        await console.close()


async def test_only_the_program_that_was_started_is_taken_for_the_guest(short: Path, python: str) -> None:
    """What an earlier agent left may still try to connect to the same socket."""
    example = f"{python} -m migrated.demo.example --size {SIZE // MIB} --console {short / 'con'}"
    wait = f"while [ ! -e {short / 'go'} ]; do sleep 0.01; done"
    target = ProcessTarget("p", ProcessTargetConfig(command=["sh", "-c", f"{wait}; exec {example}"]), short, Timeouts())
    stranger = Guest([python, "-m", "migrated.demo.example"], short / "guest.sock", short / "con2")
    fd = memfd.allocate(SIZE, 4096, "ram")
    try:
        with capture_logs() as logs:
            starting = asyncio.ensure_future(target.start((TargetMemory(Region("ram", SIZE, 4096), fd),)))
            async with asyncio.timeout(LIMIT):
                while not starting.done() and not any("stranger" in entry["event"] for entry in logs):  # noqa: ASYNC110 - a log line is no event
                    await asyncio.sleep(0.01)
        (short / "go").touch()
        faults = await asyncio.wait_for(starting, LIMIT)
        assert faults.pid != stranger.process.pid
    finally:
        stranger.end()
        await target.kill()
        await target.close()
        os.close(fd)


async def test_an_incoming_guest_is_found_again_after_its_connection_broke(
    short: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its first attempt meets: after COMMIT there is nobody else who could make it run."""
    command = [python, "-m", "migrated.demo.example", "--size", str(SIZE // MIB), "--console", str(short / "con")]
    config = ProcessTargetConfig(command=command)
    fd = memfd.allocate(SIZE, 4096, "ram")
    memory = (TargetMemory(Region("ram", SIZE, 4096), fd),)
    first = ProcessTarget("p", config, short, Timeouts())
    faults = await first.start(memory)
    uffd, memento = os.dup(faults.uffd), first.memento()
    await first.close()
    accept = socket.socket.accept
    failed: list[int] = []

    def scarce(sock: socket.socket) -> Any:
        if not failed:
            failed.append(errno.EMFILE)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    second = ProcessTarget("p", config, short, Timeouts())
    try:
        await second.adopt(faults.pid, uffd, memory, memento)
        pipe = Pipe()
        await pipe.write(bytes(32 + 4 * SIZE // 4096))
        await pipe.close_write()
        await asyncio.wait_for(second.load_state(pipe), LIMIT)
        assert failed
        assert second._connection is not None
        second._connection.close()
        await asyncio.wait_for(second.resume(), LIMIT)
    finally:
        await second.kill()
        await second.close()
        os.close(fd)
