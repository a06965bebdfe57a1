"""The other host is gone for good, and a person decides with `migrated force-run` or `migrated discard`; then it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.pair import AgentProcess
from migrated.errors import MigratedError
from migrated.recovery.store import HolderStore
from migrated.waiting import within
from tests.faults.cases import STAGES
from tests.faults.rig import GUEST, LIMIT_SECONDS, Rig, is_alive, rig

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


async def command(made: Rig, agent: AgentProcess, verb: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """`migrated VERB ID`, as an operator gives it: its exit code, and the record or the error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "migrated", "--agent", str(agent.socket), verb, made.migration, "--json"),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await process.communicate()
    try:
        answer: dict[str, Any] = json.loads(said or complained)
    except ValueError:
        raise AssertionError(f"{verb}: {said.decode()!r} {complained.decode()!r}") from None
    return int(process.returncode or 0), answer


async def refused(made: Rig, agent: AgentProcess, verb: str, confirm: str = GUEST, code: str = "conflict") -> None:
    """It is, by this name and with a word on why."""
    with pytest.raises(MigratedError) as caught:
        await agent.request("POST", f"/v1/migrations/{made.migration}/{verb}", {"confirm": confirm})
    assert caught.value.code == code, caught.value
    assert caught.value.message


async def decided(made: Rig, agent: AgentProcess, verb: str) -> None:
    """Confirmed with the guest's name, and not without it."""
    await refused(made, agent, verb, "another", code="confirm")
    status, answer = await command(made, agent, verb)
    assert (status, answer["error"]["code"]) == (2, "not-confirmed"), answer
    status, answer = await command(made, agent, verb, "--confirm", GUEST)
    assert status == 0, answer


async def stopped_at(made: Rig, stage_name: str, mode: str, *, gone: str) -> int:
    """A migration in which one host, its agent and its guest, is gone at that stage; the pid of the guest at the source."""
    stage = STAGES[stage_name]
    guest = made.guest = await made.sound()
    gate = stage.gate()
    made.proxy.expect(gate)
    await made.begin(**stage.settings(mode))
    async with within(LIMIT_SECONDS, f"{stage_name} to be reached"):
        await gate.reached.wait()
    agent = made.source if gone == "source" else made.target
    pid = guest if gone == "source" else next(iter(set(made.guests()) - {guest}))
    await agent.kill()
    os.kill(pid, signal.SIGKILL)
    made.proxy.cut()
    gate.release(drop=True)
    left = made.target if gone == "source" else made.source
    await left.wait(made.migration, "postcopy-paused", limit_seconds=LIMIT_SECONDS)
    async with within(LIMIT_SECONDS, "the guest that is gone to have ended"):
        while is_alive(pid):  # noqa: ASYNC110 - processes tell nobody of their end
            await asyncio.sleep(0.01)
    return guest


async def forget_everything(agent: AgentProcess) -> None:
    """A host that comes back with a new disk."""
    store = HolderStore(agent.state_dir)
    for name, fds in (await store.taken()).items():
        for fd in fds:
            os.close(fd)
        await store.forget(name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(agent.state_dir)


async def verified(made: Rig, pid: int) -> None:
    """The guest runs, and every byte is what it wrote last."""
    status = await made.sweep(pid)
    assert (status.wrong, status.errors, status.twice) == (0, 0, 0), f"{status}\n{made.logs()}"


def error_of(record: dict[str, Any]) -> str:
    assert record["state"] == "failed", record
    return str(record["error"]["code"])


async def test_a_target_that_never_heard_commit_runs_the_guest_when_it_is_told_to(guest_program: Path) -> None:
    async with rig(guest_program, prove=False) as made:
        await stopped_at(made, "commit", "precopy", gone="source")
        await refused(made, made.target, "abandon")
        await decided(made, made.target, "force-run")
        record = await made.target.wait(made.migration, limit_seconds=LIMIT_SECONDS)
        assert record["state"] == "completed", f"{record}\n{made.logs()}"
        (arrived,) = made.guests()
        await verified(made, arrived)
        await refused(made, made.target, "force-run")
        # The source comes back after all: it had sent COMMIT, hears that nothing is lacking, and is through.
        made.proxy.expect(None)
        await made.restart(made.source)
        assert (await made.over())["state"] == "completed", made.logs()
        await made.clean()
        await verified(made, arrived)


async def test_a_target_that_lacks_pages_gives_the_guest_up_when_it_is_told_to(guest_program: Path) -> None:
    async with rig(guest_program, prove=False) as made:
        await stopped_at(made, "drain-early", "postcopy", gone="source")
        await refused(made, made.target, "force-run")  # it runs here, and waits
        await decided(made, made.target, "discard")
        assert error_of(await made.target.wait(made.migration, limit_seconds=LIMIT_SECONDS)) == "guest-died"
        assert made.guests() == []
        # The source comes back, and has only memory: it is told, and waits for a decision of its own.
        made.proxy.expect(None)
        await made.restart(made.source)
        assert error_of(await made.source.wait(made.migration, limit_seconds=LIMIT_SECONDS)) == "target-lost-guest"
        await refused(made, made.source, "force-run")  # its process is gone
        await decided(made, made.source, "discard")
        await made.clean(guests=0)


@pytest.mark.parametrize("stage", ["commit", "drain-early"], ids=["commit-not-received", "commit-received"])
async def test_a_source_runs_the_guest_on_when_it_is_told_to(guest_program: Path, stage: str) -> None:
    async with rig(guest_program, prove=False) as made:
        guest = await stopped_at(made, stage, "postcopy", gone="target")
        assert (await made.ask(guest, "status")).paused
        await forget_everything(made.target)
        await refused(made, made.source, "abandon")
        await decided(made, made.source, "force-run")
        record = await made.source.wait(made.migration, limit_seconds=LIMIT_SECONDS)
        assert error_of(record) == "forced"
        assert not (await made.ask(guest, "status")).paused
        await verified(made, guest)
        # The target's host comes back with a new disk: the source hears that nothing is left there.
        made.proxy.expect(None)
        await made.restart(made.target)
        await made.clean()
        assert made.guests() == [guest]
        await verified(made, guest)
        assert (await made.migrate(**STAGES[stage].settings("postcopy")))["state"] == "completed", made.logs()


async def test_a_source_gives_the_guest_up_when_it_is_told_to(guest_program: Path) -> None:
    async with rig(guest_program, prove=False) as made:
        guest = await stopped_at(made, "drain-early", "postcopy", gone="target")
        await forget_everything(made.target)
        await decided(made, made.source, "discard")
        assert error_of(await made.source.wait(made.migration, limit_seconds=LIMIT_SECONDS)) == "discarded"
        async with within(LIMIT_SECONDS, "the paused process to end"):
            while is_alive(guest):  # noqa: ASYNC110 - processes tell nobody of their end
                await asyncio.sleep(0.01)
        made.proxy.expect(None)
        await made.restart(made.target)
        await made.clean(guests=0)
