"""What a source writes down of its progress, and takes back: a journal that says COMMIT is believed."""

from __future__ import annotations

import asyncio
from copy import copy
from pathlib import Path
from typing import cast

import pytest
import structlog

from migrated.address import Address
from migrated.errors import HostError
from migrated.guests.driver import Memento, SourceGuest
from migrated.link.dialing import Dialer, DialTerms
from migrated.recovery.journal import Journal, JournalError, SourceEntry
from migrated.recovery.state import RecoveryState
from migrated.recovery.store import HolderStore
from migrated.settings import Timeouts, read
from migrated.source.options import Options
from migrated.source.stage import RestartStage
from tests.unit.recovery.entries import HELLO, SOURCE

ID = "0123456789ab"


class QuietGuest:
    def memento(self) -> Memento:
        return {"runs": True}


@pytest.fixture
def journal(tmp_path: Path) -> Journal[SourceEntry]:
    return Journal(tmp_path / "journal", SourceEntry)


@pytest.fixture
def stage(journal: Journal[SourceEntry], tmp_path: Path) -> RestartStage:
    made = stage_of(journal, tmp_path)
    made.entry, made.written = copy(SOURCE), True
    return made


def stage_of(journal: Journal[SourceEntry], tmp_path: Path, entry: SourceEntry | None = None) -> RestartStage:
    address = Address("host-c", 7440)
    dialer = Dialer(address, session_id=HELLO.session, token=HELLO.token, terms=DialTerms(Timeouts()))
    return RestartStage(
        RecoveryState(journal, HolderStore(tmp_path), ID),
        cast("SourceGuest", QuietGuest()),
        dialer,
        read(Options, {"target": str(address), "streams": 1, "max_bandwidth": "5B"}, "options"),
        log=structlog.get_logger(),
        entry=entry,
    )


async def test_a_stage_is_written_with_where_the_target_is_now_and_what_the_guest_needs(
    journal: Journal[SourceEntry], stage: RestartStage
) -> None:
    await stage.write("committed")
    entry = journal.load()[ID]
    assert (entry.stage, entry.target, entry.guest) == ("committed", "host-c:7440", {"runs": True})


async def test_what_the_agent_before_us_knew_of_the_guest_stays_written(
    journal: Journal[SourceEntry], tmp_path: Path
) -> None:
    """Our driver need not have found the guest's process yet: by what it says, that could not be ended."""
    entry = copy(SOURCE)
    entry.guest = {"started": 4711}
    await stage_of(journal, tmp_path, entry).write("released")
    assert journal.load()[ID].guest == {"started": 4711}


async def test_a_new_address_and_new_limits_are_written_and_nothing_else(
    journal: Journal[SourceEntry], stage: RestartStage
) -> None:
    await stage.write("committed")
    stage._dialer.address = Address("host-d", 7441)
    stage._options.max_bandwidth = 7
    await stage.rewrite()
    entry = journal.load()[ID]
    assert (entry.stage, entry.target, entry.max_bandwidth) == ("committed", "host-d:7441", 7)


async def test_before_the_guest_is_touched_new_limits_make_no_entry(
    journal: Journal[SourceEntry], stage: RestartStage
) -> None:
    """It would take the place of one that promises to run the guest."""
    stage.written = False
    await stage.rewrite()
    assert journal.load() == {}


async def test_a_stage_that_is_taken_back_is_not_written_with_new_limits(
    stage: RestartStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    full = asyncio.Event()

    async def write(entry: SourceEntry) -> None:
        if not full.is_set():
            await full.wait()
            raise JournalError("the disk is full", replaced=False, hint="")
        written.append(entry.stage)

    monkeypatch.setattr(stage._recovery_state, "write", write)
    writing = asyncio.ensure_future(stage.write("committed"))
    rewriting = asyncio.ensure_future(stage.rewrite())
    await asyncio.sleep(0)
    full.set()
    with pytest.raises(HostError):
        await writing
    await rewriting
    assert written == ["active"]


async def test_a_commit_that_was_not_sent_is_taken_back(journal: Journal[SourceEntry], stage: RestartStage) -> None:
    await stage.write("committed")
    assert await stage.withdraw_commit()
    assert journal.load()[ID].stage == "active"


async def test_where_it_cannot_be_changed_the_entry_goes(journal: Journal[SourceEntry], stage: RestartStage) -> None:
    await stage.write("committed")
    (journal.directory / f"{ID}.new").mkdir()
    assert await stage.withdraw_commit()
    assert journal.load() == {}


async def test_where_it_cannot_go_either_this_is_said(journal: Journal[SourceEntry], stage: RestartStage) -> None:
    await stage.write("committed")
    journal.directory.rename(journal.directory.with_name("away"))
    journal.directory.write_text("not a directory")
    assert not await stage.withdraw_commit()


async def test_without_a_commit_nothing_is_to_be_taken_back(journal: Journal[SourceEntry], stage: RestartStage) -> None:
    assert await stage.withdraw_commit()
    stage.entry = None
    assert await stage.withdraw_commit()
    assert journal.load() == {}


async def test_what_cannot_be_written_is_an_error(journal: Journal[SourceEntry], stage: RestartStage) -> None:
    journal.directory.write_text("not a directory")
    with pytest.raises(HostError):
        await stage.write("active")
