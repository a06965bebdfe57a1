"""The states of a migration: every way the table has, and no other."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from migrated.agent.migration import Migration
from migrated.agent.record import ENDED, NEXT, SOURCE_STEPS, TARGET_STEPS, Laps, Record, State
from migrated.config import HooksSection
from migrated.errors import ConflictError, MigratedError

PAIRS = list(itertools.product(State, State))


class Counting(Migration):
    role = "source"
    refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1


def in_state(state: State) -> Counting:
    return Counting(Record(id="0123456789ab", guest="vm1", role="source", mode="hybrid", state=state), HooksSection())


def test_laps_are_all_of_the_time() -> None:
    laps = Laps({})
    laps.lap("before the start")
    assert (laps.seconds, laps.total) == ({}, None)
    laps.start(10.0)
    for step, at in (("stop", 10.5), ("save", 12.5), ("stop", 13.5)):
        laps.lap(step, at)
    assert laps.seconds == {"stop": 1.5, "save": 2.0}
    assert laps.total == 3.5


@pytest.mark.parametrize(("side", "steps"), [("source", SOURCE_STEPS), ("target", TARGET_STEPS)])
def test_every_step_of_the_downtime_is_listed_and_described(side: str, steps: tuple[str, ...]) -> None:
    root = Path(__file__).parents[3]
    flow = (root / "migrated" / side / "migration.py").read_text()
    assert set(re.findall(r'_laps\.lap\("([a-z-]+)"', flow)) == set(steps)
    page = (root / "docs" / "http.md").read_text().partition("| agent | step |")[2].partition("\n\n")[0]
    described = page.partition("| target |")[::2][side == "target"]
    assert re.findall(r"^(?:\| source )?\|? ?\|? ?`([a-z-]+)`", described, re.MULTILINE) == list(steps)


def test_a_switch_over_that_begins_anew_forgets_the_first() -> None:
    seconds: dict[str, float] = {}
    laps = Laps(seconds)
    laps.start(1.0)
    laps.lap("load", 2.0)
    laps.start(10.0)
    laps.lap("load", 10.25)
    assert seconds == {"load": 0.25}


@pytest.mark.parametrize(("before", "after"), [pair for pair in PAIRS if pair[1] in NEXT[pair[0]]])
def test_a_way_of_the_table_is_taken(before: State, after: State) -> None:
    one = in_state(before)
    ended: list[Record] = []
    one.on_end = ended.append
    with capture_logs() as logs:
        one.set_state(after)
    assert one.record.state is after
    assert [change.state for change in one.record.timeline] == [before, after]
    assert one.record.timeline[0].at <= one.record.timeline[1].at
    assert [(log["before"], log["state"]) for log in logs] == [(before.value, after.value)]
    assert one.record.ended == (after in ENDED)
    assert (one.record.ended_at is not None) == (after in ENDED)
    assert one.refreshed == (after in ENDED)
    assert ended == ([one.record] if after in ENDED else [])


@pytest.mark.parametrize(
    ("before", "after"), [pair for pair in PAIRS if pair[1] not in NEXT[pair[0]] and pair[0] is not pair[1]]
)
def test_any_other_is_refused_and_changes_nothing(before: State, after: State) -> None:
    one = in_state(before)
    with pytest.raises(MigratedError, match=f"no way from {before} to {after}"):
        one.set_state(after, ConflictError("x"))
    assert one.record.state is before
    assert len(one.record.timeline) == 1
    assert one.record.error is None


@pytest.mark.parametrize("state", State)
def test_staying_is_no_step(state: State) -> None:
    one = in_state(state)
    one.set_state(state, ConflictError("x"))
    assert len(one.record.timeline) == 1
    assert one.record.error is None


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.SETUP}
    for _ in State:
        reached |= {after for state in reached for after in NEXT[state]}
    assert reached == set(State)
    assert {state for state in State if not NEXT[state]} == ENDED


def test_a_recovered_one_may_begin_paused() -> None:
    assert State.RECOVERING in NEXT[State.POSTCOPY_PAUSED]


def test_the_reason_is_in_the_record() -> None:
    one = in_state(State.SWITCHOVER)
    one.set_state(State.FAILED, ConflictError("it cannot", state="setup", code="why", hint="do this"))
    error = msgspec.to_builtins(one.record)["error"]
    assert error == {"code": "why", "message": "it cannot", "hint": "do this"}


def test_an_exception_that_is_not_ours_is_called_internal() -> None:
    one = in_state(State.PRECOPY)
    one.set_state(State.FAILED, KeyError("x"))
    assert one.record.error is not None
    assert (one.record.error.code, one.record.error.message) == ("internal", "KeyError: 'x'")


def test_a_record_is_plain_json() -> None:
    one = in_state(State.PRECOPY)
    one.set_state(State.ABORTED)
    table = json.loads(json.dumps(msgspec.to_builtins(one.record)))
    assert table["state"] == "aborted"
    assert table["timeline"][-1]["state"] == "aborted"
    assert table["downtime_seconds"] is None
