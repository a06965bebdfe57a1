"""The file of ended migrations: bounded, and nothing in it or its absence stops an agent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrated.agent.archive import MAX_LINE_BYTES, Archive
from migrated.agent.record import ErrorInfo, Faults, FaultSeconds, Record, State, StateChange


def record(number: int, **fields: object) -> Record:
    values: dict[str, object] = {"state": State.COMPLETED, "ended_at": 2.0, **fields}
    return Record(id=f"{number:012x}", guest="vm1", role="source", mode="hybrid", started_at=1.0, **values)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def ids(path: Path, keep: int = 100) -> list[int]:
    return [int(one.id, 16) for one in Archive(path, keep=keep).load()]


def test_a_record_comes_back_as_it_was(path: Path) -> None:
    one = record(
        1,
        state=State.FAILED,
        downtime_seconds=0.03,
        faults=Faults(1, 2, 3),
        fault_seconds=FaultSeconds(0.1, 0.2, 0.3, [1, 2]),
        error=ErrorInfo("guest-died", "it ended", "see its log"),
        timeline=[StateChange(State.SETUP, 1.0), StateChange(State.FAILED, 2.0)],
        bytes_by_kind={"payload": 5},
    )
    Archive(path, keep=1).add(one)
    assert Archive(path, keep=1).load() == [one]
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_no_records(path: Path) -> None:
    with capture_logs() as logs:
        assert Archive(path, keep=5).load() == []
    assert logs == []


def test_the_file_stays_bounded(path: Path) -> None:
    archive = Archive(path, keep=4)
    most = 0
    for number in range(50):
        archive.add(record(number))
        most = max(most, len(path.read_text().splitlines()))
    assert most <= 8
    assert ids(path, keep=4) == [46, 47, 48, 49]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_it_stays_bounded_across_restarts(path: Path) -> None:
    for number in range(30):
        archive = Archive(path, keep=3)
        archive.load()
        archive.add(record(number))
    assert len(path.read_text().splitlines()) <= 6
    assert ids(path, keep=3) == [27, 28, 29]


def test_nothing_is_kept_where_nothing_is_to_be(path: Path) -> None:
    archive = Archive(path, keep=0)
    for number in range(3):
        archive.add(record(number))
    assert ids(path) == []


def test_the_last_line_of_an_id_counts(path: Path) -> None:
    archive = Archive(path, keep=5)
    archive.add(record(1, state=State.FAILED))
    archive.add(record(2))
    archive.add(record(1, state=State.ABORTED))
    assert [one.state for one in Archive(path, keep=5).load()] == [State.COMPLETED, State.ABORTED]


@pytest.mark.parametrize(
    "damage",
    [
        b"not json\n",
        b"{}\n",
        b"\xff\xfe\x00\n",
        b'{"id":1}\n',
        b"x" * (MAX_LINE_BYTES + 5) + b"\n",
        json.dumps({"id": "a", "guest": "vm1", "role": "source", "mode": "hybrid", "state": "precopy"}).encode()
        + b"\n",
    ],
    ids=["words", "empty", "binary", "wrong-type", "endless", "not-ended"],
)
def test_a_corrupt_line_is_reported_and_skipped(path: Path, damage: bytes) -> None:
    archive = Archive(path, keep=9)
    archive.add(record(1))
    with path.open("ab") as file:
        file.write(damage)
    after = Archive(path, keep=9)
    with capture_logs() as logs:
        after.load()
    assert {(log["log_level"], log["line"]) for log in logs if log["line"] == 2} == {("warning", 2)}
    after.add(record(2))
    assert ids(path) == [1, 2]


def test_a_line_cut_short_by_a_crash_takes_no_other_with_it(path: Path) -> None:
    archive = Archive(path, keep=9)
    archive.add(record(1))
    archive.add(record(2))
    path.write_bytes(path.read_bytes()[:-10])
    after = Archive(path, keep=9)
    assert [int(one.id, 16) for one in after.load()] == [1]
    after.add(record(3))
    assert ids(path) == [1, 3]


def test_a_file_that_cannot_be_written_is_reported(path: Path) -> None:
    path.mkdir()
    archive = Archive(path, keep=9)
    with capture_logs() as logs:
        assert archive.load() == []
        archive.add(record(1))
    assert [log["log_level"] for log in logs] == ["warning", "warning"]


def test_records_of_another_version_are_read_as_far_as_they_go(path: Path) -> None:
    table = {
        "id": "a",
        "guest": "vm1",
        "role": "source",
        "mode": "hybrid",
        "state": "completed",
        "of_a_later_version": 1,
    }
    path.write_text(json.dumps(table) + "\n")
    assert [one.guest for one in Archive(path, keep=1).load()] == ["vm1"]
