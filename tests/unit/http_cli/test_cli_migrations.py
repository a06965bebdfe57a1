"""The command line as users run it: a process of its own, against a real control socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.agent.record import ErrorInfo, Record, State
from migrated.agent.requests import StartRequest
from migrated.cli import failure, progress, rendering
from migrated.cli.migrations import format_loss
from migrated.client import Client, connection
from migrated.errors import HostError, MigratedError
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = StartRequest.model_validate({"guest": "vm1", "to": "b:1"})


def one_object(text: str) -> dict[str, Any]:
    """All of stdout is one JSON object."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


async def test_start_prints_the_id_and_nothing_else(source: Served) -> None:
    code, out, err = await source.cli(
        "start", "vm1", "--to", "b:7440", "--mode", "postcopy", "--max-bandwidth", "10Gbit"
    )
    record = source.agent.record("vm1")
    assert (code, out, err) == (0, f"{record.id}\n", "")
    assert (record.mode, record.peer) == ("postcopy", "b:7440")


@pytest.mark.parametrize(
    ("flags", "requested"),
    [
        ([], {}),
        (["--persistent", "yes", "--undefine-source"], {"persistent": "yes", "undefine_source": True}),
        (["--persistent", "as-source", "--no-undefine-source"], {"persistent": "as-source", "undefine_source": False}),
    ],
)
async def test_start_requests_what_becomes_of_the_domains_definitions(
    source: Served, flags: list[str], requested: dict[str, Any]
) -> None:
    code, _, _ = await source.cli("start", "vm1", "--to", "b:7440", *flags)
    assert (code, source.agent.requested[-1].requested()) == (0, requested)


async def test_start_json_prints_one_object(source: Served) -> None:
    code, out, _ = await source.cli("start", "vm1", "--to", "b:7440", "--json")
    assert code == 0
    assert one_object(out)["state"] == "precopy"


@pytest.mark.parametrize(
    ("end", "expected"),
    [(State.COMPLETED, 0), (State.FAILED, 1), (State.ABORTED, 3)],
    ids=["done", "failed", "aborted"],
)
async def test_start_wait_ends_with_the_summary_and_the_result_as_exit_code(
    source: Served, end: State, expected: int
) -> None:
    process = await source.cli_process("start", "vm1", "--to", "b:7440", "--wait")
    assert process.stdout is not None
    migration = (await process.stdout.readline()).decode().strip()
    await source.agent.move(source.agent.record(migration), end)
    out, err = await process.communicate()
    assert process.returncode == expected
    assert end.value in out.decode()
    assert "time line" in out.decode()
    assert f"{migration} vm1: {end.value}" in err.decode()  # plain progress lines: not a terminal


async def test_wait_json_prints_only_the_end(source: Served) -> None:
    await source.agent.start(START)
    await source.agent.abort("vm1")
    code, out, err = await source.cli("wait", "vm1", "--json")
    assert (code, err) == (3, "")
    assert one_object(out)["state"] == "aborted"


async def test_wait_has_a_limit(source: Served) -> None:
    await source.agent.start(START)
    code, _, err = await source.cli("wait", "vm1", "--timeout", "0.1", "--quiet")
    assert code == 124
    assert "has not ended after 0.1 s" in err
    assert "hint: it continues" in err


async def test_verbs(source: Served) -> None:
    agent = source.agent
    record = await agent.start(START)
    assert (await source.cli("set", record.id, "--max-bandwidth", "500MB"))[0] == 0
    assert record.max_bandwidth_bytes_per_second == 500_000_000
    assert (await source.cli("switchover", record.id))[:2] == (0, f"{record.id} vm1: switching over (postcopy)\n")
    code, out, _ = await source.cli("resume", "vm1", "--to", "c:7440", "--json")
    assert (code, one_object(out)["peer"]) == (0, "c:7440")
    await agent.start(START)
    assert (await source.cli("abort", "vm1"))[0] == 0
    assert agent.all[-1].state is State.ABORTED


def test_abandon_says_how_much_would_be_lost() -> None:
    """What is missing now: not what was stale at the switch-over, of which a restarted agent knows nothing."""
    record = Record(
        id="0" * 12,
        guest="vm1",
        role="target",
        mode="hybrid",
        state=State.POSTCOPY_PAUSED,
        page_size=2 << 20,
        total_bytes=1 << 30,
        remaining_bytes=14 << 20,
        stale_pages=0,
    )
    assert "14 MiB of its 1 GiB" in format_loss(record)


@pytest.mark.parametrize("verb", ["abandon", "force-run", "discard"])
async def test_what_may_destroy_a_guest_is_asked_twice(source: Served, verb: str) -> None:
    await source.agent.start(START)
    code, _, err = await source.cli(verb, "vm1")
    assert code == 2
    assert "must be confirmed" in err
    assert "--confirm vm1" in err
    assert (await source.cli(verb, "vm1", "--confirm", "vm2"))[0] == 2
    assert source.agent.record("vm1").state is State.PRECOPY
    assert (await source.cli(verb, "vm1", "--confirm", "vm1"))[0] == 0
    assert source.agent.record("vm1").state is State.FAILED


async def test_list_shows_what_is_under_way_and_all_on_request(source: Served) -> None:
    code, out, _ = await source.cli("list")
    assert (code, out) == (0, "no migration is under way; --all shows those that have ended\n")
    record = await source.agent.start(START)
    assert record.id in (await source.cli("list"))[1]
    await source.agent.abort("vm1")
    assert one_object((await source.cli("list", "--json"))[1]) == {"migrations": []}
    assert one_object((await source.cli("list", "--all", "--json"))[1])["migrations"][0]["state"] == "aborted"


async def test_status_of_the_agent_and_of_one_migration(source: Served) -> None:
    code, out, _ = await source.cli("status")
    assert code == 0
    assert out.startswith("source host-a, version ")
    record = await source.agent.start(START)
    assert record.id in (await source.cli("status"))[1]
    everything = one_object((await source.cli("status", "--json"))[1])
    assert (everything["role"], everything["migrations"][0]["id"]) == ("source", record.id)
    assert one_object((await source.cli("status", "vm1", "--json"))[1])["id"] == record.id
    await source.agent.move(record, State.FAILED)
    assert (await source.cli("status", "vm1"))[0] == 1


async def test_status_watch_follows_to_the_end(source: Served) -> None:
    record = await source.agent.start(START)
    process = await source.cli_process("status", "vm1", "--watch", "--json")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["state"] == "precopy"
    await source.agent.move(record, State.COMPLETED)
    assert json.loads(await process.stdout.readline())["state"] == "completed"
    assert await process.wait() == 0


async def test_an_agent_is_picked_by_url_for_looking_only(source: Served) -> None:
    await source.agent.start(START)
    assert (await source.cli("status", "vm1", agent=source.status_url))[0] == 0
    code, _, err = await source.cli("abort", "vm1", agent=source.status_url)
    assert code == 2
    assert "read-only" in err
    assert source.agent.record("vm1").state is State.PRECOPY


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["start", "nobody", "--to", "b:1"], 2, "no guest 'nobody'\n  hint: guests: vm1, other"),
        (["start", "refused", "--to", "b:1"], 1, "memory is not shared\n  hint: start QEMU with share=on"),
        (["start", "vm1"], 2, "Missing option '--to'"),
        (["start", "vm1", "--to", "b"], 2, "the port is missing"),
        (["start", "vm1", "--to", "b:1", "--max-bandwidth", "10G"], 2, "unknown unit 'G'"),
        (["start", "vm1", "--to", "b:1", "--mode", "fast"], 2, "'fast' is not one of"),
        (["start", "vm1", "--to", "b:1", "--streams", "0"], 2, "--streams"),
        (["abort", "nobody"], 2, "no migration 'nobody'"),
        (["wait", "nobody"], 2, "no migration 'nobody'"),
        (["abort", "../../x"], 2, "is neither an id nor a guest's name"),
        (["set", "vm1"], 2, "nothing to set"),
        (["fly"], 2, "No such command 'fly'"),
    ],
)
async def test_errors_name_what_is_wrong_and_what_to_do(
    source: Served, arguments: list[str], code: int, text: str
) -> None:
    got, out, err = await source.cli(*arguments)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert text in err


async def test_an_error_is_one_object_too_where_json_is_asked_for(source: Served) -> None:
    record = await source.agent.start(START)
    await source.agent.switchover(record.id)
    code, out, err = await source.cli("abort", "vm1", "--json")
    assert code == 2
    assert err.startswith("error: the guest has moved")
    assert one_object(out)["error"] == {
        "code": "conflict",
        "message": "the guest has moved",
        "hint": "`migrated resume` or `migrated abandon`",
        "state": "postcopy",
    }


async def test_no_agent_there(source: Served) -> None:
    code, out, err = await source.cli("list", agent="/nonexistent/control.sock")
    assert (code, out) == (1, "")
    assert err.startswith("error: no agent answers at /nonexistent/control.sock\n  hint: start one with")


async def test_interrupting_wait_ends_the_watching_only(source: Served) -> None:
    record = await source.agent.start(START)
    process = await source.cli_process("wait", "vm1")
    assert process.stderr is not None
    await process.stderr.readline()  # the first progress line: it watches
    process.send_signal(2)
    async with asyncio.timeout(20):
        _, err = await process.communicate()
    assert process.returncode == 130
    assert f"migrated wait {record.id}" in err.decode()
    assert "Traceback" not in err.decode()
    assert record.state is State.PRECOPY


async def test_a_reader_that_goes_away_is_no_error(source: Served) -> None:
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m migrated status --json --watch --agent {source.settings.state_dir} 2>&1 | head -c1",
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert b"Traceback" not in out


def test_tables_show_as_much_of_an_id_as_people_need(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(id="0123456789abcdef" * 2, guest="vm1", role="target", mode="hybrid")
    rendering.console().print(rendering.migrations_table([record]))
    assert capsys.readouterr().out.splitlines()[1].startswith("0123456789ab ")
    assert progress.line(record).startswith("0123456789ab ")


# ---------------------------------------------------------------- an ordinary user


@contextlib.contextmanager
def hidden(short_dir: Path) -> Iterator[None]:
    """A state directory that is another user's: root gives up its right to look into every directory."""
    directory = short_dir / "source"
    directory.mkdir()
    (directory / "control.sock").touch()
    short_dir.chmod(0o755)
    is_root = os.geteuid() == 0
    directory.chmod(0o700 if is_root else 0)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)


@pytest.mark.parametrize("agent", [None, "source", "source/control.sock"])
async def test_a_user_who_may_not_see_the_control_socket_is_told_to_use_sudo(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, agent: str | None
) -> None:
    monkeypatch.setattr(connection, "STATE_DIRECTORY", short_dir)
    with hidden(short_dir):
        async with Client(agent and str(short_dir / agent)) as connected:
            with pytest.raises(HostError, match="permission denied") as caught:
                await connected.migrations()
    assert caught.value.code == "no-agent"
    assert "sudo" in caught.value.hint
    assert "control.group" in caught.value.hint
    assert re.search(r"user \d+ lacks 'x' on /.*/source \(d[rwx-]{9} \w+:\w+\)", caught.value.message)


@contextlib.contextmanager
def of_a_group(short_dir: Path) -> Iterator[Path]:
    """The control socket of a group that this user is no member of."""
    short_dir.chmod(0o755)
    path = short_dir / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.chown(path, 0, 64002)
        path.chmod(0o660)
        os.seteuid(65534)
        try:
            yield path
        finally:
            os.seteuid(0)


@pytest.mark.root
async def test_a_user_outside_the_group_is_told_which_one(short_dir: Path) -> None:
    with of_a_group(short_dir) as path:
        async with Client(str(path)) as connected:
            with pytest.raises(HostError) as caught:
                await connected.migrations()
    assert "user 65534 lacks 'w' on" in caught.value.message
    assert "(srw-rw---- root:64002)" in caught.value.message
    assert "become a member of the group 64002" in caught.value.hint


# ---------------------------------------------------------------- text of others

HOSTILE = "QEMU said: \x1b]0;owned\x07\x1b[2J\u202egone\nsecond line"
HARMLESS = "QEMU said: \\x1b]0;owned\\x07\\x1b[2J\\u202egone\nsecond line"


def test_errors_carry_no_control_sequences_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failure.tell(MigratedError(HOSTILE, hint=HOSTILE), as_json=False)
    assert capsys.readouterr().err == f"error: {HARMLESS}\n  hint: {HARMLESS}\n"


def test_a_summary_carries_no_control_sequences_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(id="0" * 12, guest="vm1", role="target", mode="hybrid", state=State.FAILED)
    record.error = ErrorInfo(code="guest-start", message=HOSTILE, hint=HOSTILE)
    rendering.console().print(rendering.summary(record))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b[2J" in out


async def test_guests_are_listed_with_the_reason_of_those_that_cannot_be_migrated(source: Served) -> None:
    code, out, err = await source.cli("guests")
    assert (code, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows[1] == "vm1 qemu running 1 GiB yes -"
    assert rows[2] == "other libvirt paused 2 GiB no guest other has a job at work: backup [job-running]"
    assert "no [libvirt] binding\\x1b[31m [libvirt-missing]; install it" in out


async def test_guests_json_prints_one_object(source: Served) -> None:
    code, out, _ = await source.cli("guests", "--json")
    assert code == 0
    answer = one_object(out)
    assert [guest["migratable"] for guest in answer["guests"]] == [True, False]
    assert answer["problems"][0]["code"] == "libvirt-missing"


async def test_guests_are_asked_of_a_source(target: Served) -> None:
    code, out, err = await target.cli("guests", "--json")
    assert (code, one_object(out)["error"]["code"]) == (2, "conflict")
    assert "ask the source" in err
