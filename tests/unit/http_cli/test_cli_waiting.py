"""Waiting for a migration: time limits, ^C on a terminal and elsewhere, and what is shown meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from migrated.agent.record import Faults, FaultSeconds, Record, State, StateChange
from migrated.cli import progress
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

PATIENCE_SECONDS = 60.0
START = ("start", "vm1", "--to", "b:7440")


class Terminal:
    """A command with a terminal for its input and messages; its standard output is a pipe."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process = process
        self._fd = fd
        self.screen = ""

    async def says(self, wanted: str) -> None:
        """Wait until it has written this, since the last time."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while wanted not in self.screen:
                try:
                    piece = await asyncio.to_thread(os.read, self._fd, 4096)
                except OSError:  # EIO: it has ended
                    piece = b""
                assert piece, f"it has ended: {self.screen}"
                self.screen += piece.decode(errors="replace")
        self.screen = self.screen.partition(wanted)[2]

    def types(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def ends(self) -> int:
        async def drain() -> None:
            with contextlib.suppress(OSError):
                while piece := await asyncio.to_thread(os.read, self._fd, 4096):
                    self.screen += piece.decode(errors="replace")

        async with asyncio.timeout(PATIENCE_SECONDS):
            await drain()
            return await self.process.wait()


@contextlib.asynccontextmanager
async def terminal(served: Served, *arguments: str) -> AsyncIterator[Terminal]:
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migrated", *arguments, "--agent", str(served.settings.state_dir)),
        stdin=theirs,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "110"},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


@contextlib.asynccontextmanager
async def interrupted(source: Served) -> AsyncIterator[Terminal]:
    """``start --wait`` after ^C."""
    async with terminal(source, *START, "--wait") as tty:
        await tty.says("precopy")
        tty.process.send_signal(signal.SIGINT)
        await tty.says("vm1 is precopy.")
        await tty.says("Abort it (a), leave it running (l), or continue waiting (c)?")
        yield tty


async def test_an_interrupted_wait_can_abort(source: Served) -> None:
    async with interrupted(source) as tty:
        tty.types("a\n")
        assert await tty.ends() == 3
    assert source.agent.record("vm1").state is State.ABORTED


async def test_an_interrupted_wait_can_leave_the_migration_running(source: Served) -> None:
    async with interrupted(source) as tty:
        tty.types("l\n")
        assert await tty.ends() == 130
        assert f"migrated wait {source.agent.record('vm1').id}" in tty.screen
    assert source.agent.record("vm1").state is State.PRECOPY


async def test_an_interrupted_wait_can_continue_and_be_interrupted_again(source: Served) -> None:
    async with interrupted(source) as tty:
        tty.types("c\n")
        await tty.says("vm1")  # the display is back
        tty.process.send_signal(signal.SIGINT)
        await tty.says("continue waiting (c)?")
        tty.types("\n")  # which is what happens if nothing is chosen
        await tty.says("vm1")
        await source.agent.move(source.agent.record("vm1"), State.COMPLETED)
        assert await tty.ends() == 0


async def test_a_second_interrupt_leaves_the_migration_running(source: Served) -> None:
    async with interrupted(source) as tty:
        tty.process.send_signal(signal.SIGINT)
        assert await tty.ends() == 130
        assert "the migration continues" in tty.screen
    assert source.agent.record("vm1").state is State.PRECOPY


async def test_what_can_no_longer_be_aborted_is_waited_for(source: Served) -> None:
    async with interrupted(source) as tty:
        await source.agent.switchover("vm1")
        tty.types("a\n")
        await tty.says("the guest has moved: waiting for its end")
        await source.agent.resume("vm1")
        assert await tty.ends() == 0


async def test_without_a_terminal_an_interrupt_leaves_the_migration_running(source: Served) -> None:
    process = await source.cli_process(*START, "--wait")
    assert process.stderr is not None
    await process.stderr.readline()  # it watches
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(PATIENCE_SECONDS):
        _, err = await process.communicate()
    assert process.returncode == 130
    assert "no longer watching; the migration continues: migrated wait" in err.decode()
    assert source.agent.record("vm1").state is State.PRECOPY


# ---------------------------------------------------------------- time limits


async def test_a_start_that_takes_too_long_is_left_running(source: Served) -> None:
    code, out, err = await source.cli(*START, "--timeout", "0.1")
    assert code == 124
    assert out.strip() == source.agent.record("vm1").id
    assert "has not ended after 0.1 s" in err
    assert source.agent.record("vm1").state is State.PRECOPY


async def test_a_start_that_takes_too_long_is_aborted_on_request(source: Served) -> None:
    code, _, err = await source.cli(*START, "--timeout", "0.1", "--on-timeout", "abort")
    assert (code, source.agent.record("vm1").state) == (3, State.ABORTED)
    assert "not ended after 0.1 s: aborting" in err


@pytest.mark.parametrize("action", ["postcopy", "pause"])
async def test_a_start_that_takes_too_long_is_switched_over_on_request(source: Served, action: str) -> None:
    process = await source.cli_process(*START, "--timeout", "0.1", "--on-timeout", action)
    assert process.stdout is not None
    await process.stdout.readline()
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(source.agent.events("vm1")) as events:  # type: ignore[type-var]  # a generator
        async for seen in events:
            if seen.state is State.POSTCOPY:  # the order has been carried out
                break
    record = source.agent.record("vm1")
    assert record.mode == "hybrid"
    assert [request.downtime_limit_ms for request in source.agent.sets] == ([60_000] if action == "pause" else [])
    await source.agent.resume("vm1")
    async with asyncio.timeout(PATIENCE_SECONDS):
        await process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--on-timeout", "abort"), "--on-timeout needs --timeout"),
        (("--timeout", "9", "--on-timeout", "postcopy", "--mode", "precopy"), "there is no post-copy"),
        (("--timeout", "0"), "--timeout"),
    ],
)
async def test_what_does_not_fit_together_starts_nothing(
    source: Served, arguments: tuple[str, ...], problem: str
) -> None:
    code, _, err = await source.cli(*START, *arguments)
    assert code == 2
    assert problem in err
    assert source.agent.all == []


# ---------------------------------------------------------------- what is shown


def a_record(**fields: object) -> Record:
    given: dict[str, object] = {
        "id": "0123456789abcdef" * 2,
        "guest": "vm1",
        "role": "source",
        "mode": "hybrid",
        "total_bytes": 1 << 30,
        "started_at": time.time() - 30,
        **fields,
    }
    return Record(**given)  # type: ignore[arg-type] # as named in `given`


def shown(record: Record) -> str:
    out = Console(width=110, record=True, file=io.StringIO())
    out.print(progress.display(record))
    return re.sub(r" +", " ", out.export_text())


def test_precopy_shows_the_dirty_rate_against_the_transfer_rate() -> None:
    now = time.time()
    record = a_record(
        state=State.PRECOPY,
        remaining_bytes=1 << 29,
        round=3,
        throughput_bytes_per_second=2e9,
        dirty_bytes_per_second=1e9,
        timeline=[StateChange(State.SETUP, now - 30), StateChange(State.PRECOPY, now - 29)],
    )
    for text in (shown(record), progress.line(record)):
        for part in ("vm1", "50.0 %", "2 GB/s", "dirty rate 1 GB/s", "about 537 ms left", "round 3"):
            assert part in text
    assert "setup 1 s → precopy 29 s" in shown(record)
    record.dirty_bytes_per_second = 3e9
    assert "no end in sight at this pace" in progress.line(record)


def test_postcopy_shows_stale_pages_and_fault_latency() -> None:
    record = a_record(
        state=State.POSTCOPY,
        remaining_bytes=1 << 28,
        stale_pages=700,
        throughput_bytes_per_second=1e9,
        faults=Faults(stale=3),
        fault_seconds=FaultSeconds(p50=1e-4, p99=2e-3, max=3e-3),
        timeline=[StateChange(State.POSTCOPY, time.time() - 1)],
    )
    for text in (shown(record), progress.line(record)):
        for part in ("256 MiB left of 700 stale pages", "faults p99 2 ms, max 3 ms", "about 268 ms left"):
            assert part in text
    record.state = State.POSTCOPY_PAUSED
    assert "waiting for the other agent" in progress.line(record)


def test_many_steps_are_shortened() -> None:
    steps = [StateChange(state, 1.0) for state in (State.POSTCOPY, State.POSTCOPY_PAUSED, State.RECOVERING) * 4]
    assert str(progress.phases(a_record(timeline=steps), 2.0)).startswith("… → ")


def test_the_table_of_active_migrations_fits_a_small_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = a_record(state=State.PRECOPY, remaining_bytes=1 << 29, throughput_bytes_per_second=2e9)
    Console(width=80).print(progress.table([record]))
    head, line = capsys.readouterr().out.splitlines()
    assert "FAULT P99" in head
    assert line.split()[:4] == ["vm1", "precopy", "50", "%"]
