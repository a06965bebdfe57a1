"""The list of migrations: who is found by what, what is forgotten, and what a restart leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrated.agent.archive import Archive
from migrated.agent.migration import Migration
from migrated.agent.record import Record, State
from migrated.agent.table import MigrationTable
from migrated.config import HooksSection
from migrated.errors import ConflictError, NotFoundError

Make = Callable[..., Migration]


class OneMigration(Migration):
    """Does nothing but have figures."""

    role = "source"
    refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1
        self.record.transferred_bytes = self.refreshed


def migration(name: str, guest: str = "vm1") -> OneMigration:
    return OneMigration(Record(id=name, guest=guest, role="source", mode="hybrid"), HooksSection())


def ended(one: OneMigration, state: State = State.ABORTED) -> OneMigration:
    one.set_state(state)
    one._over = True  # its `run` has returned
    return one


@pytest.fixture
def table() -> MigrationTable[OneMigration]:
    return MigrationTable(keep=3)


def test_found_by_id_prefix_or_guest(table: MigrationTable[OneMigration]) -> None:
    first, second, other = migration("aa11"), migration("ab22"), migration("cc33", "vm2")
    table.add(ended(first))
    table.add(second)
    table.add(other)
    assert table.find("aa11") is first
    assert table.find("ab") is second
    assert table.find("vm1") is second  # the newest of that guest
    assert table.find("vm2") is other
    assert list(table) == [first, second, other]
    assert table.active == [second, other]


def test_what_fits_several_or_none_is_said(table: MigrationTable[OneMigration]) -> None:
    table.add(migration("aa11"))
    table.add(migration("aa22", "vm2"))
    with pytest.raises(ConflictError, match="aa11, aa22"):
        table.find("aa")
    for nothing in ("x", "", "aa11b"):
        with pytest.raises(NotFoundError):
            table.find(nothing)


def test_an_id_comes_before_a_guest_of_that_name(table: MigrationTable[OneMigration]) -> None:
    one, other = migration("abc", "vm1"), migration("123", "abc")
    table.add(one)
    table.add(other)
    assert table.find("abc") is one


def test_only_one_under_way_counts_for_a_guest(table: MigrationTable[OneMigration]) -> None:
    table.add(ended(migration("aa11")))
    assert table.of_guest("vm1") is None
    running = migration("ab22")
    table.add(running)
    assert table.of_guest("vm1") is running
    assert table.of_guest("vm2") is None


def test_the_oldest_ended_ones_are_forgotten_and_no_other(table: MigrationTable[OneMigration]) -> None:
    running = migration("run")
    table.add(running)
    for number in range(5):
        table.add(ended(migration(f"e{number}")))
    assert [one.id for one in table] == ["run", "e2", "e3", "e4"]


def test_one_that_has_ended_and_still_settles_is_not_forgotten(table: MigrationTable[OneMigration]) -> None:
    settling = migration("settling")
    settling.set_state(State.ABORTED)
    table.add(settling)
    for number in range(5):
        table.add(ended(migration(f"e{number}")))
    assert table.find("settling") is settling


def test_figures_of_those_under_way_are_fresh(table: MigrationTable[OneMigration]) -> None:
    running, over = migration("run"), ended(migration("over"))
    table.add(over)
    table.add(running)
    before = over.record.transferred_bytes
    assert [record.transferred_bytes for record in table.records(ended=True)] == [before, 1]
    assert [record.transferred_bytes for record in table.records(ended=False)] == [2]


# ---------------------------------------------------------------- across a restart


def table_of(directory: Path, keep: int = 3) -> MigrationTable[OneMigration]:
    return MigrationTable(keep=keep, archive=Archive(directory / "records.jsonl", keep=keep))


async def test_records_of_the_agent_before_are_shown(tmp_path: Path) -> None:
    before = table_of(tmp_path)
    for name in ("aa11", "bb22"):
        one = migration(name)
        before.add(one)
        ended(one, State.FAILED)
    before.add(migration("cc33"))  # under way: no record of it is kept
    await before.archived()
    after = table_of(tmp_path)
    assert [record.id for record in after.records(ended=True)] == ["aa11", "bb22"]
    assert after.records(ended=False) == []
    assert after.record("bb").state is State.FAILED
    assert after.record("vm1").id == "bb22"
    assert [change.state for change in after.record("aa11").timeline] == [State.SETUP, State.FAILED]
    assert [record.id async for record in after.events("aa11")] == ["aa11"]
    assert list(after) == after.active == []


async def test_no_verb_fits_them(tmp_path: Path) -> None:
    before = table_of(tmp_path)
    one = migration("aa11")
    before.add(one)
    ended(one)
    await before.archived()
    with pytest.raises(ConflictError, match="ended before this agent") as caught:
        table_of(tmp_path).find("aa11")
    assert caught.value.state == "aborted"


async def test_a_former_one_that_goes_on_is_one_and_not_two(tmp_path: Path) -> None:
    one = migration("aa11")
    before = table_of(tmp_path)
    before.add(one)
    ended(one, State.FAILED)
    await before.archived()
    after = table_of(tmp_path)
    again = migration("aa11")
    after.add(again)
    assert after.records(ended=True) == [again.record]
    ended(again, State.ABORTED)
    await after.archived()
    assert [record.state for record in table_of(tmp_path).records(ended=True)] == [State.ABORTED]


async def test_former_ones_are_the_first_to_be_forgotten(tmp_path: Path) -> None:
    before = table_of(tmp_path)
    for number in range(3):
        one = migration(f"a{number}")
        before.add(one)
        ended(one)
    await before.archived()
    after = table_of(tmp_path)
    for number in range(2):
        one = migration(f"b{number}")
        after.add(one)
        ended(one)
    after.add(migration("last"))
    assert [record.id for record in after.records(ended=True)] == ["a2", "b0", "b1", "last"]
    await after.archived()
