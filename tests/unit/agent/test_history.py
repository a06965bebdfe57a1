"""What is kept of a migration for display: bounded, thinned evenly, and no reason for anything to fail."""

from __future__ import annotations

import gc
import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from migrated import log
from migrated.agent import history, series
from migrated.agent.history import Histories, History, Kept
from migrated.agent.record import Record
from migrated.agent.series import Series
from migrated.log_lines import MAX_LINES, Line, lines_of
from migrated.memory.page_map import PageMap


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("migrated.agent.series.time.time", lambda: now[0])
    return now


def a_record(**fields: Any) -> Record:
    return Record(id="a1", guest="vm1", role="source", mode="hybrid", **fields)


def test_a_week_of_samples_is_thinned_to_a_bound(clock: list[float]) -> None:
    made, record = Series(), a_record()
    for tick in range(2 * 7 * 24 * 3600):
        clock[0] = 1000.0 + tick / 2
        record.transferred_bytes = tick
        made.add(record)
    assert len(made.at) <= series.MAX_SAMPLES
    assert len(made.at) >= series.MAX_SAMPLES // 2
    assert made.at[0] == 1000.0
    assert clock[0] - made.at[-1] <= made.spacing_seconds
    gaps = [later - sooner for sooner, later in zip(made.at, made.at[1:], strict=False)]
    assert max(gaps) <= 2 * min(gaps)
    assert made.transferred_bytes == [round(2 * (at - 1000.0)) for at in made.at]
    assert {len(getattr(made, name)) for name in Series.__struct_fields__[1:]} == {len(made.at)}


def test_a_change_of_state_is_sampled_at_once(clock: list[float]) -> None:
    made = Series()
    made.add(a_record())
    clock[0] += 0.01
    made.add(a_record())
    assert len(made.at) == 1
    made.add(a_record(), always=True)
    assert len(made.at) == 2


def test_it_is_stored_and_read_back(tmp_path: Path) -> None:
    store = Histories(tmp_path)
    kept = Kept(
        series=Series(at=[1.0], faults=[3]),
        page_map=PageMap(at=1.0, cell_bytes=4096, bytes_by_state={"sent": 1}, cells={"sent": bytes(range(256))}),
        log=[Line(1.0, "info", "state", {"state": "precopy"})],
    )
    store.save("a1", kept)
    assert store.load("a1") == kept
    assert store.load("unknown") == Kept()
    assert (tmp_path / history.NAME).stat().st_mode & 0o077 == 0


def test_what_cannot_be_stored_or_read_is_logged_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with capture_logs() as logs:
        Histories(tmp_path / "file").save("a1", Kept())
        store = Histories(tmp_path)
        store.save("a2", Kept())
        (tmp_path / history.NAME / "a2.json").write_bytes(b'{"series": 3')
        assert store.load("a2") == Kept()
    assert [entry["log_level"] for entry in logs] == ["warning", "warning"]


def test_the_oldest_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FILES", 3)
    store = Histories(tmp_path)
    for number in range(5):
        store.save(f"a{number}", Kept())
        os.utime(tmp_path / history.NAME / f"a{number}.json", (number, number))
    store.save("a5", Kept())
    assert sorted(path.name for path in (tmp_path / history.NAME).iterdir()) == ["a3.json", "a4.json", "a5.json"]


class Engine:
    alive = True
    asked = 0

    async def page_map(self, cell_count: int) -> PageMap:
        self.asked += 1
        return PageMap(at=self.asked, cell_bytes=cell_count, bytes_by_state={}, cells={})


async def test_a_page_map_is_made_twice_a_second_at_most_and_outlives_the_engine() -> None:
    kept, engine = History("a1"), Engine()
    assert await kept.page_map(None) is None
    maps = [await kept.page_map(engine) for _ in range(5)]  # type: ignore[arg-type] # as much of one as is needed
    assert engine.asked == 1
    assert maps[4] is maps[0] is not None
    assert await kept.page_map(engine, now=True) is not maps[0]  # type: ignore[arg-type] # likewise
    engine.alive = False
    last = await kept.page_map(engine, now=True)  # type: ignore[arg-type] # likewise
    assert (engine.asked, last and last.at) == (2, 2)
    assert kept.take().page_map is last
    assert (kept.stored, kept.kept()) == (True, Kept())


@pytest.fixture
def configured() -> Any:
    before = structlog.get_config()
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    log.configure(fmt="json", stream=stream)
    yield stream
    structlog.configure(**before)
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level


def test_lines_that_name_a_migration_are_kept_of_it(configured: io.StringIO) -> None:
    lines = lines_of("a1")
    logger = structlog.get_logger("migrated.source")
    logger.bind(migration="a1", guest="vm1").warning("state", before="setup", token="hush")
    logger.info("of no migration")
    logger.bind(migration="b2").info("of another one")
    with structlog.contextvars.bound_contextvars(migration="a1"):
        structlog.get_logger("migrated.qemu").info("QEMU says hello")
    assert [(line.level, line.event) for line in lines] == [("warning", "state"), ("info", "QEMU says hello")]
    assert lines[0].fields["before"] == "setup"
    assert "hush" not in str(lines[0].fields)
    assert "hush" not in configured.getvalue()
    for number in range(2 * MAX_LINES):
        logger.info(str(number), migration="a1")
    assert len(lines) == MAX_LINES


def test_lines_that_nobody_holds_are_not_kept(configured: io.StringIO) -> None:
    lines = lines_of("a1")
    structlog.get_logger("migrated.source").info("one", migration="a1")
    assert len(lines) == 1
    del lines
    gc.collect()
    assert len(lines_of("a1")) == 0
