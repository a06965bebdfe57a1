"""The list of guests: who is in it, what it says of each, and that a migration never waits behind it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from migrated import config
from migrated.agent.record import Record, State
from migrated.agent.requests import GuestList, StartRequest
from migrated.errors import ConflictError, GuestError, GuestRefusedError
from migrated.guests.driver import Outline
from migrated.guests.libvirt.domains import RunningDomain
from migrated.guests.registry import GuestRegistry
from migrated.source import survey
from migrated.source.agent import SourceAgent
from migrated.source.survey import Survey

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

GIB = 1 << 30
PATIENCE_SECONDS = 30.0
URI = "qemu:///system"
REFUSED = GuestRefusedError("guest vm has a job at work", code="job-running", hint="wait for it")
UNREACHABLE = GuestError("nobody listens", code="qmp-unreachable")


class FakeGuest:
    """``refusal`` is what `open` raises; ``held``: `open` waits for ever.  A guest that is unreachable has no outline."""

    def __init__(self, refusal: Exception | None = None, *, held: bool = False) -> None:
        self.refusal = refusal
        self.held = held
        self.opened = 0
        self.closed = 0
        self.opening = asyncio.Event()

    async def open(self) -> None:
        self.opened += 1
        self.opening.set()
        if self.held:
            await asyncio.Event().wait()
        if self.refusal is not None:
            raise self.refusal

    async def outline(self) -> Outline:
        if self.refusal is UNREACHABLE:
            raise UNREACHABLE
        return Outline("running", GIB)

    async def close(self) -> None:
        self.closed += 1


class Setting:
    """A survey with fake guests, by their name, and domains that a fake libvirt runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], **guests: FakeGuest) -> None:
        self.guests = guests
        self.domains: list[RunningDomain] | Exception = []
        self.records: list[Record] = []
        self.config = config.decode({"tls": {"insecure": True}, **table}, "source")
        self.survey = Survey(
            cast("GuestRegistry", self),
            active=lambda: self.records,
            check=self.check,
        )
        monkeypatch.setattr(survey, "running_domains", self.running_domains)

    def source_guest(self, name: str) -> FakeGuest:
        return self.guests[name]

    async def check(self, name: str) -> None:
        if any(record.guest == name for record in self.records):
            raise ConflictError(f"{name} is being migrated", code="guest-migrating")

    async def running_domains(self, uri: str, *, limit_seconds: float) -> list[RunningDomain]:
        assert limit_seconds > 0
        if isinstance(self.domains, Exception):
            raise self.domains
        return [domain for domain in self.domains if domain.uri == uri]


def domain(name: str, state: str = "running") -> RunningDomain:
    return RunningDomain(URI, name, state, GIB)


def qemu(name: str) -> dict[str, str]:
    return {"driver": "qemu", "qmp": f"/run/{name}.qmp"}


def told(answer: GuestList) -> dict[str, tuple[str, str, int, str]]:
    """Of each guest: driver, state, memory, and the code of its error or ``yes``."""
    assert all(guest.migratable == (guest.error is None) for guest in answer.guests)
    return {
        guest.name: (guest.driver, guest.state, guest.memory_bytes, guest.error.code if guest.error else "yes")
        for guest in answer.guests
    }


async def test_each_guest_is_listed_with_the_reason_its_driver_refuses_it_with(monkeypatch: pytest.MonkeyPatch) -> None:
    guests = {
        "fine": FakeGuest(),
        "busy": FakeGuest(REFUSED),
        "dead": FakeGuest(UNREACHABLE),
        "broken": FakeGuest(KeyError("x")),
    }
    setting = Setting(monkeypatch, {"guests": {name: qemu(name) for name in guests}}, **guests)
    answer = await setting.survey.report()
    assert told(answer) == {
        "broken": ("qemu", "", 0, "internal"),
        "busy": ("qemu", "running", GIB, "job-running"),
        "dead": ("qemu", "", 0, "qmp-unreachable"),
        "fine": ("qemu", "running", GIB, "yes"),
    }
    assert answer.problems == []
    assert all((guest.opened, guest.closed) == (1, 1) for guest in guests.values())


async def test_every_running_domain_is_listed_once_and_by_its_guests_name(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "libvirt": {"domains": ["web-*"]},
        "guests": {"shop": {"driver": "libvirt", "domain": "web-1"}, "web-3": qemu("web-3")},
    }
    setting = Setting(monkeypatch, table, **{name: FakeGuest() for name in ("shop", "web-2", "web-3")})
    setting.domains = [domain("web-1"), domain("web-2"), domain("web-3"), domain("db", "paused")]
    answer = await setting.survey.report()
    # web-3 twice: a QEMU of that name, and a domain for which the configuration has no other name.
    assert [(guest.name, guest.driver) for guest in answer.guests] == [
        ("db", "libvirt"),
        ("shop", "libvirt"),
        ("web-2", "libvirt"),
        ("web-3", "qemu"),
        ("web-3", "libvirt"),
    ]
    assert told(answer)["db"] == ("libvirt", "paused", GIB, "unknown-guest")
    stranger = answer.guests[-1].error
    assert stranger is not None
    assert (stranger.code, 'domain = "web-3"' in stranger.hint) == ("unknown-guest", True)


async def test_a_libvirt_that_does_not_answer_hides_no_other_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch, {"guests": {"vm": qemu("vm")}}, vm=FakeGuest())
    setting.domains = GuestRefusedError("no binding", code="libvirt-missing")
    answer = await setting.survey.report()
    assert told(answer) == {"vm": ("qemu", "running", GIB, "yes")}
    assert [problem.code for problem in answer.problems] == ["libvirt-missing"]


async def test_a_guest_under_migration_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    guests = {"vm": FakeGuest(), "web": FakeGuest()}
    setting = Setting(
        monkeypatch,
        {"libvirt": {"domains": ["*"]}, "guests": {"vm": qemu("vm"), "alias": {"driver": "libvirt", "domain": "web"}}},
        **guests,
    )
    setting.domains = [domain("web")]
    for name, driver in (("vm", "qemu"), ("web", "libvirt")):
        setting.records.append(
            Record(
                id=name, guest=name, role="source", mode="hybrid", driver=driver, state=State.PRECOPY, total_bytes=GIB
            )
        )
    assert told(await setting.survey.report()) == {
        "vm": ("qemu", "precopy", GIB, "guest-migrating"),
        "web": ("libvirt", "precopy", GIB, "guest-migrating"),
    }
    assert [guest.opened for guest in guests.values()] == [0, 0]


async def test_a_migration_does_not_wait_for_an_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    held = FakeGuest(held=True)
    setting = Setting(monkeypatch, {"guests": {"vm": qemu("vm"), "other": qemu("other")}}, vm=held, other=FakeGuest())
    listing = asyncio.ensure_future(setting.survey.report())
    second = asyncio.ensure_future(setting.survey.report())
    await held.opening.wait()
    await setting.survey.leave("vm")
    assert held.closed == 1
    for answer in (await listing, await second):
        assert {name: row[3] for name, row in told(answer).items()} == {"other": "yes", "vm": "guest-migrating"}
    assert held.opened == 1  # for both requests


@pytest.mark.parametrize("limit", ["_GUEST_SECONDS", "_LIST_SECONDS"])
async def test_a_guest_that_never_answers_is_listed_as_such(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(survey, limit, 0.01)
    held = FakeGuest(held=True)
    setting = Setting(monkeypatch, {"guests": {"vm": qemu("vm")}}, vm=held)
    assert told(await setting.survey.report()) == {"vm": ("qemu", "", 0, "timeout")}
    await setting.survey.close()
    assert held.closed == 1


async def test_a_migration_takes_the_monitor_from_an_examination(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that never greets holds an examination up; the migration gets the next connection at once."""
    sessions: asyncio.Queue[asyncio.StreamReader] = asyncio.Queue()
    writers = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        sessions.put_nowait(reader)

    async def no_domains(uri: str, *, limit_seconds: float) -> list[RunningDomain]:
        del uri, limit_seconds
        return []

    monkeypatch.setattr(survey, "running_domains", no_domains)
    qmp = short_dir / "vm.qmp"
    table = {
        "agent": {"state_dir": str(short_dir / "state")},
        "tls": {"insecure": True},
        "timeouts": {"guest_command": 3600},
        "guests": {"vm": {"driver": "qemu", "qmp": str(qmp)}},
    }
    monkeypatch.setattr(survey, "_GUEST_SECONDS", 3600)
    (short_dir / "state").mkdir()
    agent = SourceAgent(config.decode(table, "source"))
    stop = asyncio.Event()
    server = await asyncio.start_unix_server(silent, str(qmp))
    running = asyncio.create_task(agent.run(stop))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not agent.health().ready:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            listing = asyncio.ensure_future(agent.survey())
            examined = await sessions.get()
            await agent.start(StartRequest.model_validate({"guest": "vm", "to": "127.0.0.1:1"}))
            assert await examined.read() == b""  # closed
            assert told(await listing)["vm"][3] == "guest-migrating"
            await sessions.get()  # the migration's
            assert told(await agent.survey())["vm"][1:] == ("setup", 0, "guest-migrating")
            stop.set()
            await running
    finally:
        running.cancel()
        await asyncio.wait({running})
        for writer in writers:
            writer.close()
        server.close()
