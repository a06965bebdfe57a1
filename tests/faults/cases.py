"""Failures, stages and modes: what can go wrong, when, and what must come of it.

A stage is a control message (or an amount of pages) that waits in the proxy; a failure is done to the rig while it waits.
What must come of it depends on one thing only: whether the source has sent COMMIT (design, invariants 3 and 4).
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from migrated.demo.pair import AgentProcess
from migrated.errors import MigratedError
from migrated.protocol.framing import LENGTH_BYTES
from migrated.protocol.preamble import Purpose
from migrated.waiting import within
from tests.faults.proxy import DOWN, UP, Gate
from tests.faults.rig import LIMIT_SECONDS, TIMEOUTS, Rig, is_alive

MODES = ("hybrid", "precopy", "postcopy")
PAGES = (Purpose.BULK, Purpose.URGENT)
#: Three heartbeats; the rigs that it is done to have a limit that leaves a busy machine some seconds.
STALL_SECONDS = 3 * TIMEOUTS["heartbeat_interval"]


class Where(enum.Enum):
    """Where the guest runs in the end."""

    STAYS = "stays"  # at the source
    MOVES = "moves"  # to the target
    EITHER = "either"  # both are right, in one place it is
    LOST = "lost"  # its own process was killed: it runs nowhere, and both agents say so


@dataclasses.dataclass(frozen=True)
class Stage:
    """A moment of a migration.

    ``committed``: the source has sent COMMIT by then.  ``bound``: the target has said Loaded by then.
    """

    name: str
    way: str = UP
    tag: str = ""
    nth: int = 1
    page_bytes: int | None = None
    after: str = ""
    modes: tuple[str, ...] = MODES
    options: tuple[tuple[str, Any], ...] = ()
    committed: bool = False
    bound: bool = False
    streams: bool = True  # the page connections are up
    started: bool = True  # the target's guest process is up

    def gate(self) -> Gate:
        """A fresh one."""
        return Gate(self.way, self.tag, self.nth, self.page_bytes, self.after)

    def settings(self, mode: str) -> dict[str, Any]:
        """Of the migration, so that the stage is met."""
        return {"mode": mode, "downtime_limit_ms": 300.0, **dict(self.options)}


_ROUNDS = (("downtime_limit_ms", 0.01), ("max_rounds", 4))  # more rounds than one
_LEAVES = (("downtime_limit_ms", 0.01), ("max_rounds", 1))  # hybrid: something is left for post-copy
_COPIES = ("hybrid", "precopy")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("hello", UP, "hello", streams=False, started=False),
        Stage("ready", DOWN, "ready", streams=False),
        Stage("round-1", UP, "round", modes=_COPIES),
        Stage("round-1-pages", page_bytes=1 << 20, modes=_COPIES),
        Stage("round-2", UP, "round", 2, modes=_COPIES, options=_ROUNDS),
        Stage("barrier", DOWN, "barrier-ack", modes=_COPIES),
        Stage("switchover", UP, "switchover"),
        Stage("stale-map", UP, "stale-map", modes=("postcopy",)),
        Stage("stale-map-end", UP, "stale-map-end"),
        Stage("state", UP, "state"),
        Stage("state-end", UP, "state-end"),
        Stage("loaded", DOWN, "loaded", bound=True),
        Stage("commit", UP, "commit", committed=True, bound=True),
        Stage("running", DOWN, "running", committed=True, bound=True),
        Stage(
            "postcopy-early",
            page_bytes=0,
            after="commit",
            modes=("hybrid",),
            options=_LEAVES,
            committed=True,
            bound=True,
        ),
        Stage("drain-early", page_bytes=0, after="commit", modes=("postcopy",), committed=True, bound=True),
        Stage("drain-late", page_bytes=12 << 20, after="commit", modes=("postcopy",), committed=True, bound=True),
        Stage("done", DOWN, "done", committed=True, bound=True),
        Stage("released", UP, "released", committed=True, bound=True),
    )
}

#: Failures that end the control connection, and what waits on it is lost.
LOSES_CONTROL = ("cut", "reset", "silence")

Failure = Callable[[Rig, Gate, Stage], Awaitable[Where]]
FAILURES: dict[str, Failure] = {}
#: For which stages a failure makes sense.
FITS: dict[str, Callable[[Stage], bool]] = {}


def failure(name: str, fits: Callable[[Stage], bool] = lambda _: True) -> Callable[[Failure], Failure]:
    """Register one.  It is called while the stage's message waits, and must let it go; returns where the guest must end."""

    def register(function: Failure) -> Failure:
        FAILURES[name], FITS[name] = function, fits
        return function

    return register


def _where(stage: Stage) -> Where:
    return Where.MOVES if stage.committed else Where.STAYS


def _message(stage: Stage) -> bool:
    return bool(stage.tag)


# ---------------------------------------------------------------- the network


@failure("cut")
async def cut(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Every connection ends; what waited is lost."""
    rig.proxy.cut()
    gate.release(drop=True)
    return _where(stage)


@failure("reset")
async def reset(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Every connection is reset; what waited is lost."""
    rig.proxy.cut(reset=True)
    gate.release(drop=True)
    return _where(stage)


@failure("cut-behind", _message)
async def cut_behind(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """The message arrives, then every connection ends: its answer is lost."""
    arrived = asyncio.Event()
    rig.proxy.after_release = arrived
    gate.release()
    await asyncio.wait_for(arrived.wait(), LIMIT_SECONDS)
    rig.proxy.cut()
    # Loaded has arrived: the source may have sent COMMIT before it noticed.  The guest may run there already.
    return Where.EITHER if stage.tag in ("loaded", "state-end") else _where(stage)


@failure("silence")
async def silence(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Half-open: connections stay, and nothing passes them any more."""
    rig.proxy.silence()
    gate.release(drop=True)
    return _where(stage)


@failure("page-silence", lambda stage: stage.name in ("round-1", "switchover", "drain-early"))
async def page_silence(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Half-open page connections beside a control connection that is well."""
    rig.proxy.silence(PAGES)
    gate.release()
    return Where.EITHER if stage.name == "switchover" else _where(stage)


@failure("bulk-cut", lambda stage: stage.streams)
async def bulk_cut(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Only the bulk connections end."""
    rig.proxy.cut(purposes=(Purpose.BULK,))
    gate.release()
    return Where.MOVES if stage.committed else Where.EITHER


@failure("urgent-cut", lambda stage: stage.streams)
async def urgent_cut(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Only the urgent connection is reset."""
    rig.proxy.cut(purposes=(Purpose.URGENT,), reset=True)
    gate.release()
    return Where.MOVES if stage.committed else Where.EITHER


@failure("garbage")
async def garbage(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """The message (or a piece of a page) is damaged on its way."""
    if stage.tag:
        gate.release(change=lambda frame: frame[:LENGTH_BYTES] + b"\xc1" + frame[LENGTH_BYTES + 1 :])
    else:
        gate.release(change=lambda data: data[: len(data) // 2] + bytes(b ^ 0x55 for b in data[len(data) // 2 :]))
    return _where(stage)


@failure("twice", _message)
async def twice(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """The message arrives twice."""
    gate.release(change=lambda frame: frame + frame)
    # Some may repeat by their nature; COMMIT may have been answered before the second was read.
    return Where.MOVES if stage.committed else Where.EITHER


@failure("unreachable", lambda stage: stage.committed or stage.bound)
async def unreachable(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """The network is away for a while, and every attempt to come back is refused; then somebody says resume."""
    rig.proxy.refusing = True
    try:
        rig.proxy.cut()
        gate.release(drop=True)
        if stage.committed and stage.name != "released":
            await rig.source.wait(rig.migration, "postcopy-paused", limit_seconds=LIMIT_SECONDS)
            refused = rig.proxy.refused
            async with within(LIMIT_SECONDS, "two more attempts to reconnect"):
                while rig.proxy.refused < refused + 2:  # noqa: ASYNC110 - plain enough
                    await asyncio.sleep(0.01)
    finally:
        rig.proxy.refusing = False
    try:
        await rig.source.request("POST", f"/v1/migrations/{rig.migration}/resume", {})
    except MigratedError:
        assert not stage.committed or (await rig.source.record(rig.migration))["state"] != "postcopy-paused"
    return _where(stage)


@failure("stall")
async def stall(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Nothing passes for a while, several heartbeats and less than their limit, then everything does: no failure at all."""
    stalling = asyncio.ensure_future(rig.proxy.stall(STALL_SECONDS))
    await asyncio.sleep(0)  # it has begun
    gate.release()
    await stalling
    await rig.over()
    for agent in rig.agents:
        seen = [change["state"] for change in (await agent.record(rig.migration))["timeline"]]
        assert seen[-1] == "completed", f"{agent.role}: {seen}\n{rig.logs()}"
        assert "postcopy-paused" not in seen, f"{agent.role}: {seen}\n{rig.logs()}"
    return Where.MOVES


# ---------------------------------------------------------------- people


async def _refuses_abort(rig: Rig, agent: AgentProcess) -> bool:
    refusal: MigratedError | None = None
    try:
        await agent.request("POST", f"/v1/migrations/{rig.migration}/abort")
    except MigratedError as error:
        refusal = error
    assert refusal is None or refusal.hint, refusal
    return refusal is not None


@failure("abort")
async def abort(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Asked for at the source."""
    refused = await _refuses_abort(rig, rig.source)
    gate.release()
    assert refused == stage.committed, f"abort at {stage.name} was {'refused' if refused else 'accepted'}"
    return _where(stage)


@failure("abort-target", lambda stage: stage.started)
async def abort_target(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """Asked for at the target."""
    refused = await _refuses_abort(rig, rig.target)
    gate.release()
    if stage.bound:
        assert refused, f"abort at {stage.name} was accepted by a target that had said Loaded"
        return Where.MOVES
    return Where.EITHER if refused else Where.STAYS


# ---------------------------------------------------------------- agents


async def _ended(agent: AgentProcess, *, status: int) -> None:
    process = agent.process
    if process is None:
        raise AssertionError
    async with within(LIMIT_SECONDS, f"the {agent.role} agent to end\n{agent.log_tail(20)}"):
        assert await process.wait() == status, agent.log_tail(20)


@failure("terminate-source")
async def terminate_source(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """SIGTERM: it aborts, or stays until it is needed no more; then it is started again."""
    await _terminate(rig.source)
    gate.release()
    await _ended(rig.source, status=0)
    await rig.restart(rig.source)
    return _where(stage)


@failure("terminate-target")
async def terminate_target(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """SIGTERM: it aborts while it may."""
    await _terminate(rig.target)
    gate.release()
    await _ended(rig.target, status=0)
    await rig.restart(rig.target)
    if stage.bound:
        return Where.MOVES
    return Where.EITHER if stage.name == "state-end" else Where.STAYS


async def _terminate(agent: AgentProcess) -> None:
    """SIGTERM; returns when the agent has taken note of it."""
    word = '"event": "stopping"'
    before = agent.log_path.read_text().count(word)
    os.kill(agent.pid, signal.SIGTERM)
    async with within(LIMIT_SECONDS, f"the {agent.role} agent to be stopping"):
        while agent.log_path.read_text().count(word) == before and is_alive(agent.pid):  # noqa: ASYNC110 - a log tells nobody
            await asyncio.sleep(0.01)


@failure("kill-source")
async def kill_source(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """SIGKILL; started again."""
    await rig.source.kill()
    gate.release()
    await rig.restart(rig.source)
    return _where(stage)


@failure("kill-target")
async def kill_target(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """SIGKILL; started again."""
    await rig.target.kill()
    gate.release()
    await rig.restart(rig.target)
    # Loaded may be on its way: then COMMIT comes, and the restarted agent obeys it.
    return Where.EITHER if stage.name in ("loaded", "state-end") else _where(stage)


@failure("kill-both")
async def kill_both(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """SIGKILL of both at once; both started again."""
    await asyncio.gather(rig.source.kill(), rig.target.kill())
    gate.release(drop=True)
    await asyncio.gather(rig.restart(rig.source), rig.restart(rig.target))
    return _where(stage)


# ---------------------------------------------------------------- guests


@failure("target-guest-dies", lambda stage: stage.started and not stage.bound)
async def target_guest_dies(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """The incoming process is killed before it was loaded."""
    for pid in rig.guests():
        if (await rig.ask(pid, "status")).incoming and pid != rig.guest:
            os.kill(pid, signal.SIGKILL)
    gate.release()
    return Where.STAYS


@failure("source-guest-dies", lambda stage: stage.name not in ("released", "done"))
async def source_guest_dies(rig: Rig, gate: Gate, stage: Stage) -> Where:
    """The guest's own process is killed: lost before COMMIT, not needed after it."""
    os.kill(rig.guest, signal.SIGKILL)
    gate.release()
    if stage.bound and not stage.committed:
        return Where.EITHER
    return Where.MOVES if stage.committed else Where.LOST


# ---------------------------------------------------------------- running one


def cases(*, every: bool) -> Iterator[tuple[str, str, str]]:
    """(mode, stage, failure).  Not ``every``: each failure at each stage once, the modes taking turns."""
    turn = 0
    for stage in STAGES.values():
        for name in FAILURES:
            if not FITS[name](stage):
                continue
            turn += 1
            modes = stage.modes if every else (stage.modes[turn % len(stage.modes)],)
            yield from ((mode, stage.name, name) for mode in modes)


async def run_case(rig: Rig, mode: str, stage_name: str, failure_name: str) -> None:
    """Migrate, fail, and look at everything.  AssertionError, or a limit that was reached."""
    stage = STAGES[stage_name]
    guest = rig.guest = await rig.sound()
    gate = stage.gate()
    rig.proxy.expect(gate)
    await rig.begin(**stage.settings(mode))
    async with within(LIMIT_SECONDS, f"{stage.name} to be reached"):
        await gate.reached.wait()
    where = await FAILURES[failure_name](rig, gate, stage)
    record = await rig.over()
    asked = failure_name in LOSES_CONTROL and stage.committed and stage.name != "released"
    rig.check_reconnects(least=1 if asked else 0)
    rig.proxy.expect(None)
    # A source that had Loaded when its guest was killed may have committed, or not.
    if where is Where.LOST or (failure_name == "source-guest-dies" and record.get("state") != "completed"):
        await rig.clean(guests=0)
        assert record.get("state", "failed") == "failed", record
        await rig.start_guest()
        return
    now = await rig.sound()
    state = record.get("state")
    story = f"{state} {record.get('error')}\n{rig.logs()}"
    assert (now == guest) == (where is Where.STAYS) or where is Where.EITHER, f"{where} was wanted; {story}"
    if state is not None:
        assert (state == "completed") == (now != guest), (
            f"the guest is at the {'source' if now == guest else 'target'}: {story}"
        )
