"""The operator's hook: what it is asked and told, and what its failures do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import structlog

from migrated.agent.hooks import Hooks
from migrated.agent.record import Record, State
from migrated.config import SourceHooksSection, StateName, TargetHooksSection, decode
from migrated.errors import ConfigError, HostError, TimeoutExceededError

PROGRAM = """\
#!/bin/sh
echo "$@ $(cat)" >>"$0.told"
"""


def hook(directory: Path, text: str = PROGRAM) -> Path:
    path = directory / "hook"
    path.write_text(text)
    path.chmod(0o755)
    return path


def hooks(program: Path, record: Record | None = None, **table: Any) -> Hooks:
    config = decode({"tls": {"insecure": True}, "hooks": {"program": str(program), **table}}, "source")
    return Hooks(config.hooks, record or a_record(), structlog.get_logger())


def a_record() -> Record:
    return Record(id="0123", guest="vm1", role="source", mode="hybrid")


def told(program: Path) -> list[tuple[str, str, dict[str, Any]]]:
    path = Path(f"{program}.told")
    lines = [line.split(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []
    return [(when, what, json.loads(record)) for when, what, record in lines]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:  # also ESRCH: it is gone between open and read
        return False


async def test_it_gets_the_phase_and_the_record(tmp_path: Path) -> None:
    program = hook(tmp_path)
    assert await hooks(program, before=["setup"]).before(State.SETUP)
    assert [(when, what, record["guest"], record["state"]) for when, what, record in told(program)] == [
        ("before", "setup", "vm1", "setup")
    ]


async def test_it_is_not_run_where_the_configuration_does_not_name_it(tmp_path: Path) -> None:
    program = hook(tmp_path)
    asked = hooks(program, before=["setup"], on=["completed"])
    assert not await asked.before(State.PRECOPY)
    asked.on(State.POSTCOPY)
    await asked.finish()
    assert told(program) == []


async def test_states_are_told_in_order_each_with_the_record_of_its_moment(tmp_path: Path) -> None:
    program = hook(tmp_path, PROGRAM.replace("cat)", "cat; [ $2 = precopy ] && sleep 0.3)"))
    record = a_record()
    asked = hooks(program, record, on=["precopy", "switchover", "completed"])
    for state in (State.PRECOPY, State.SWITCHOVER, State.COMPLETED):
        record.state = state
        asked.on(state)
    await asked.finish()
    assert [(what, record["state"]) for _, what, record in told(program)] == [
        (state, state) for state in ("precopy", "switchover", "completed")
    ]


async def test_a_refusal_quotes_what_it_said(tmp_path: Path) -> None:
    program = hook(tmp_path, "#!/bin/sh\necho no route >&2\nexit 3\n")
    with pytest.raises(HostError, match="status 3: no route") as caught:
        await hooks(program, before=["setup"]).before(State.SETUP)
    assert caught.value.code == "hook"
    asked = hooks(program, on=["completed"])
    asked.on(State.COMPLETED)
    await asked.finish()  # only logged


async def test_one_that_takes_too_long_ends_with_what_it_has_started(tmp_path: Path) -> None:
    program = hook(tmp_path, "#!/bin/sh\nsleep 1000 &\necho $! >$0.pid\nwait\n")
    with pytest.raises(TimeoutExceededError, match="before setup to end"):
        await hooks(program, before=["setup"], timeout=3.0).before(State.SETUP)
    child = int(Path(f"{program}.pid").read_text())  # noqa: ASYNC240 - at once
    async with asyncio.timeout(30):
        while is_alive(child):  # noqa: ASYNC110 - it is not our child
            await asyncio.sleep(0.01)


async def test_what_it_leaves_running_holds_nothing_up_and_runs_on(tmp_path: Path) -> None:
    program = hook(tmp_path, "#!/bin/sh\nsleep 1000 &\necho $! >$0.pid\n")
    assert await hooks(program, before=["setup"], timeout=20.0).before(State.SETUP)
    child = int(Path(f"{program}.pid").read_text())  # noqa: ASYNC240 - at once
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


async def test_one_that_does_not_read_its_input_is_no_failure(tmp_path: Path) -> None:
    assert await hooks(hook(tmp_path, "#!/bin/sh\nexec <&-\n"), before=["setup"]).before(State.SETUP)


async def test_a_program_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    program = hook(tmp_path, "#!/nowhere/sh\n")
    with pytest.raises(HostError, match=str(program)):
        await hooks(program, before=["setup"]).before(State.SETUP)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"program": "relative"}, "not an executable file"),
        ({"program": "/etc/passwd"}, "not an executable file"),
        ({"on": ["completed"]}, "no program"),
        ({"before": ["postcopy"], "program": "/bin/true"}, "setup, precopy or switchover"),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode({"tls": {"insecure": True}, "hooks": table}, "source")
    assert told in f"{caught.value} {caught.value.hint}"


def test_the_configuration_names_states_of_a_record() -> None:
    assert set(get_args(StateName)) == set(State) - {State.SETUP}  # which a migration begins in
    for kind, phases in (
        (SourceHooksSection, "setup precopy switchover"),
        (TargetHooksSection, "setup precopy postcopy"),
    ):
        (named,) = get_args(kind.model_fields["before"].annotation)
        assert list(get_args(named)) == [State(phase) for phase in phases.split()]
