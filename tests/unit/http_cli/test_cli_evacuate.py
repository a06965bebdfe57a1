"""``migrated evacuate`` and its part of HTTP, with an agent whose evacuations end when the test says so."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest

from migrated.agent.evacuation import Attempt, Evacuation, EvacuationState, Move, MoveState, Target
from migrated.agent.record import ErrorInfo
from migrated.cli import command
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

TO = ("--to", "b:7440,c:7440")
ROOM = ErrorInfo(code="no-room", message="c:7440 has no room for vm1", hint="free memory there")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - it is asked
            await asyncio.sleep(0.01)


def end(evacuation: Evacuation, state: EvacuationState, vm1: MoveState, error: ErrorInfo | None = None) -> None:
    """The small guest has gone, and vm1 as the test says."""
    first, small, _ = evacuation.guests
    first.state, first.error = vm1, error
    if error is not None:
        first.attempts = [Attempt(target="c:7440", migration="00", at=1.0, error=error)]
    small.state, small.started_at, small.ended_at, small.downtime_seconds = MoveState.COMPLETED, 10.0, 11.5, 0.021
    evacuation.ended_at = evacuation.started_at + 9
    evacuation.state = state


async def test_a_dry_run_prints_the_plan_and_begins_nothing(source: Served) -> None:
    code, out, err = await source.cli("evacuate", *TO, "--dry-run")
    assert (code, err, source.agent.evacuated) == (0, "", [])
    assert "b:7440: 4 GiB of memory, 512 pages of 2 MiB, 0 of 8 migrations" in out
    assert re.search(r"^vm1 +1 GiB +c:7440 +planned", out, re.MULTILINE)
    assert re.search(r"^other .*ineligible.*has a job at work: backup \[job-running\]", out, re.MULTILINE)
    assert "plan: 2 of 2 guests have a target; 1 cannot be migrated; nothing was touched" in out
    assert "hint: wait for it" in out
    code, out, _ = await source.cli("evacuate", *TO, "--dry-run", "--json")
    assert (code, json.loads(out)["state"]) == (0, "planned")


async def test_options_reach_the_agent(source: Served) -> None:
    options = ("--order", "priority", "--parallel", "5", "--parallel-per-target", "3", "--attempts", "7")
    code, out, _ = await source.cli("evacuate", *TO, *options, "--patience", "0", "--no-wait")
    (evacuation,) = source.agent.evacuated
    assert (code, out) == (0, f"{evacuation.id}\n")
    assert [target.address for target in evacuation.targets] == ["b:7440", "c:7440"]
    assert (evacuation.order, evacuation.parallel, evacuation.parallel_per_target) == ("priority", 5, 3)
    assert (evacuation.max_attempts, evacuation.patience_seconds) == (7, 0)


@pytest.mark.parametrize(
    ("state", "vm1", "error", "expected"),
    [
        (EvacuationState.COMPLETED, MoveState.COMPLETED, None, 0),
        (EvacuationState.FAILED, MoveState.FAILED, ROOM, 1),
        (EvacuationState.ABORTED, MoveState.ABORTED, None, 3),
    ],
)
async def test_it_ends_with_a_report_and_the_result_as_exit_code(
    source: Served, state: EvacuationState, vm1: MoveState, error: ErrorInfo | None, expected: int
) -> None:
    process = await source.cli_process("evacuate", *TO)
    await until(lambda: source.agent.evacuated)
    (evacuation,) = source.agent.evacuated
    end(evacuation, state, vm1, error)
    out, _ = await process.communicate()
    text = out.decode()
    assert process.returncode == expected
    assert re.search(r"^small +1 MiB +b:7440 +completed +1 +1\.5 s +21 ms", text, re.MULTILINE)
    assert f"{state.value}, {1 + (expected == 0)} of 2 guests migrated in 9 s; 1 cannot be migrated" in text
    assert ("c:7440 has no room for vm1 [no-room]" in text) is (error is not None)
    assert ("hint: free memory there" in text) is (error is not None)


async def test_json_is_the_whole_record(source: Served) -> None:
    process = await source.cli_process("evacuate", *TO, "--json")
    await until(lambda: source.agent.evacuated)
    (evacuation,) = source.agent.evacuated
    end(evacuation, EvacuationState.FAILED, MoveState.FAILED, ROOM)
    out, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")
    assert msgspec.json.decode(out, type=Evacuation) == evacuation


async def test_interrupting_the_command_only_ends_the_watching(source: Served) -> None:
    process = await source.cli_process("evacuate", *TO)
    assert process.stderr is not None
    assert b"vm1: waiting to c:7440" in await process.stderr.readline()  # it watches
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130
    assert "the evacuation continues: migrated evacuate --resume" in err.decode()
    (evacuation,) = source.agent.evacuated
    assert evacuation.state is EvacuationState.RUNNING
    code, out, _ = await source.cli("evacuate", "--status", "--json")
    assert (code, json.loads(out)["state"]) == (0, "running")
    process = await source.cli_process("evacuate", "--resume")
    end(evacuation, EvacuationState.COMPLETED, MoveState.COMPLETED)
    out_again, _ = await process.communicate()
    assert (process.returncode, b"2 of 2 guests migrated" in out_again) == (0, True)


async def test_abort_says_how_to_wait_for_the_end(source: Served) -> None:
    await source.cli("evacuate", *TO, "--no-wait")
    code, out, _ = await source.cli("evacuate", "--abort")
    assert (code, source.agent.evacuated[0].state) == (0, EvacuationState.ABORTING)
    assert "aborting; `migrated evacuate --resume` waits for its end" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say where to"),
        (("--to", "b"), "the port is missing"),
        (("--to", "b:1,c"), "the port is missing"),
        (("--status", "--to", "b:1"), "--status takes no other option"),
        (("--abort", "--parallel", "1"), "--abort takes no other option"),
        (("--to", "b:1", "--parallel", "0"), "'0' is not allowed"),
    ],
)
def test_what_does_not_fit_is_a_usage_error(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(["evacuate", *arguments, "--agent", "/nowhere"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


async def test_what_the_agent_refuses_is_a_usage_error_too(source: Served) -> None:
    code, _, err = await source.cli("evacuate", "--to", "b:1,b:1")
    assert (code, "b:1 is named twice" in err) == (2, True)
    code, _, err = await source.cli("evacuate", "--resume")
    assert (code, "this agent knows of no evacuation" in err) == (2, True)


async def test_a_target_agent_refers_to_the_source(target: Served) -> None:
    code, _, err = await target.cli("evacuate", *TO)
    assert code == 2
    assert "guests leave through the source agent" in err
    async with target.control() as session:
        async with session.get("/v1/evacuations") as answer:
            assert await answer.json() == {"evacuations": []}
        async with session.post("/v1/evacuations/00/abort") as answer:
            assert answer.status == 404


async def test_http_gives_the_place_of_an_evacuation_and_none_for_a_plan(source: Served) -> None:
    async with source.control() as session:
        async with session.post("/v1/evacuations", json={"to": ["b:1"], "dry_run": True}) as answer:
            assert (answer.status, "Location" in answer.headers) == (200, False)
        async with session.post("/v1/evacuations", json={"to": ["b:1"]}) as answer:
            assert answer.status == 202
            place = answer.headers["Location"]
        async with session.get(place) as answer:
            assert (await answer.json())["targets"][0]["address"] == "b:1"
        async with session.post("/v1/evacuations", json={"to": []}) as answer:
            assert answer.status == 400
        async with session.get("/v1/evacuations/nobody") as answer:
            assert answer.status == 404
    async with aiohttp.ClientSession(source.status_url) as session:
        async with session.get(place) as answer:
            assert answer.status == 200
        async with session.post("/v1/evacuations", json={"to": ["b:1"]}) as answer:
            assert answer.status == 405


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "http.md").read_text()
    described = text.partition("\n## Evacuations\n")[2].partition("\n## ")[0]
    for kind in (Evacuation, Move, Target, Attempt):
        for field in msgspec.structs.fields(kind):
            assert re.search(rf"[ \n`]{field.name}\b", described), (kind, field.name)
