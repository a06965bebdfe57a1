"""Migrations as a fake agent shows them: each state that the dashboard has to draw, and many at once."""

from __future__ import annotations

import math
import random
import time

from migrated.agent.history import MAP_CELLS, Kept
from migrated.agent.record import ErrorInfo, Faults, FaultSeconds, Record, State, StateChange
from migrated.agent.series import Series
from migrated.memory.page_map import PageMap
from tests.unit.http_cli.fake_agent import FakeAgent

TIB = 1 << 40
GIB = 1 << 30


def page_map(total_bytes: int, shares: dict[str, tuple[float, float]]) -> PageMap:
    """A map in which each state has a stretch of the memory, by begin and end (0 to 1)."""
    cells = {
        state: bytes(255 if first <= cell / MAP_CELLS < end else 0 for cell in range(MAP_CELLS))
        for state, (first, end) in shares.items()
    }
    return PageMap(
        at=time.time(),
        cell_bytes=total_bytes // MAP_CELLS,
        bytes_by_state={state: sum(column) // 255 * (total_bytes // MAP_CELLS) for state, column in cells.items()},
        cells=cells,
    )


def scattered(total_bytes: int, weights: dict[str, float], *, waiting: int = 0) -> PageMap:
    """A map in which the states are mixed, from cell to cell and within one; ``waiting`` cells have a waiting thread."""
    dice = random.Random(7)
    columns = {state: bytearray(MAP_CELLS) for state in (*weights, "requested")}
    for cell in range(MAP_CELLS):
        left = 255
        for state, weight in weights.items():
            wave = 0.5 + 0.5 * math.sin(cell / 90 + len(state))
            share = min(left, round(255 * weight * wave * dice.uniform(0.6, 1.8)))
            columns[state][cell] = share
            left -= share
        columns[next(iter(weights))][cell] += left
    for cell in dice.sample(range(MAP_CELLS), waiting):
        columns["requested"][cell] = 3
    cell_bytes = total_bytes // MAP_CELLS
    return PageMap(
        at=time.time(),
        cell_bytes=cell_bytes,
        bytes_by_state={state: sum(column) * cell_bytes // 255 for state, column in columns.items() if any(column)},
        cells={state: bytes(column) for state, column in columns.items() if any(column)},
    )


def series(record: Record, seconds: float, *, pace: float, dirty: float) -> Series:
    """Rounds that become shorter, as a sawtooth of remaining memory."""
    made = Series()
    dice = random.Random(11)
    rounds = 6
    for step in range(int(seconds * 2)):
        share = step / (seconds * 2)
        turn = share * rounds
        made.at.append(record.started_at + step / 2)
        made.transferred_bytes.append(int(pace * step / 2))
        made.remaining_bytes.append(int(record.total_bytes * 0.5 ** int(turn) * (1 - turn % 1) * 0.95))
        made.throughput_bytes_per_second.append(pace * dice.uniform(0.86, 1.03) * min(1.0, step / 4))
        made.dirty_bytes_per_second.append(dirty * dice.uniform(0.7, 1.3) * (0 if step < 3 else 1))
        made.faults.append(0)
    return made


def timeline(started: float, *steps: tuple[State, float]) -> list[StateChange]:
    """A time line of ``(state, seconds after the start)``."""
    return [StateChange(state, started + offset) for state, offset in steps]


def base(number: int, guest: str, started: float, **fields: object) -> Record:
    """A record of a source with everything that all of them have."""
    given: dict[str, object] = {
        "id": f"{0x6B1C5A00D2E94F1183A07D55E1C40000 + number:032x}",
        "guest": guest,
        "role": "source",
        "mode": "hybrid",
        "peer": "192.0.2.20:7440",
        "driver": "qemu",
        "page_size": 2 << 20,
        "total_bytes": 64 * GIB,
        "started_at": started,
        **fields,
    }
    return Record(**given)  # type: ignore[arg-type] # as named in `given`


def precopy(agent: FakeAgent, number: int = 1, guest: str = "db-primary") -> Record:
    started = time.time() - 74
    record = base(
        number,
        guest,
        started,
        state=State.PRECOPY,
        total_bytes=TIB,
        transferred_bytes=702 * GIB,
        remaining_bytes=391 * GIB,
        round=2,
        dirty_bytes_per_second=1.31e9,
        throughput_bytes_per_second=9.87e9,
        timeline=timeline(started, (State.SETUP, 0), (State.PRECOPY, 0.42)),
    )
    agent.kept[record.id] = Kept(
        series=series(record, 74, pace=9.9e9, dirty=1.3e9),
        page_map=scattered(TIB, {"sent": 0.7, "dirty": 0.4, "absent": 0.3}),
    )
    return record


def postcopy(agent: FakeAgent, number: int = 2, guest: str = "cache-3") -> Record:
    started = time.time() - 41
    record = base(
        number,
        guest,
        started,
        role="target",
        peer="192.0.2.10:51022",
        state=State.POSTCOPY,
        transferred_bytes=66 * GIB,
        remaining_bytes=5 * GIB,
        stale_pages=4120,
        stale_bytes=4120 * (2 << 20),
        throughput_bytes_per_second=3.4e9,
        downtime_seconds=0.0218,
        downtime_breakdown={"load": 0.0112, "journal": 0.0021, "commit": 0.0064, "run": 0.0021},
        faults=Faults(current=812, stale=341, missing=17),
        fault_seconds=FaultSeconds(p50=4.1e-5, p99=0.0031, max=0.0187),
        faults_by_kind_us={
            "current": [0, 0, 12, 220, 401, 150, 25, 4],
            "stale": [0] * 7 + [3, 41, 120, 118, 48, 9, 1, 1],
            "missing": [0] * 4 + [2, 9, 5, 1],
        },
        timeline=timeline(
            started, (State.SETUP, 0), (State.PRECOPY, 0.3), (State.SWITCHOVER, 34.1), (State.POSTCOPY, 34.13)
        ),
    )
    agent.kept[record.id] = Kept(
        series=series(record, 41, pace=3.4e9, dirty=0),
        page_map=scattered(64 * GIB, {"mapped": 0.6, "current": 0.5, "stale": 0.3, "absent": 0.2}, waiting=9),
    )
    return record


def paused(agent: FakeAgent, number: int = 3, guest: str = "mail") -> Record:
    record = postcopy(agent, number, guest)
    record.state = State.POSTCOPY_PAUSED
    record.throughput_bytes_per_second = 0.0
    record.timeline.append(StateChange(State.POSTCOPY_PAUSED, time.time() - 4))
    record.error = ErrorInfo(
        code="connection-lost",
        message="the control connection to 192.0.2.10:51022 was lost: connection reset by peer",
        hint="the agents reconnect by themselves; `migrated resume` tries again now",
    )
    return record


def ended(state: State, number: int, guest: str, error: ErrorInfo | None = None, *, ago: float = 3600) -> Record:
    started = time.time() - ago
    steps = [(State.SETUP, 0.0), (State.PRECOPY, 0.2)]
    if state is State.COMPLETED:
        steps += [(State.SWITCHOVER, 21.0), (State.POSTCOPY, 21.02)]
    return base(
        number,
        guest,
        started,
        state=state,
        transferred_bytes=71 * GIB,
        round=4,
        ended_at=started + 25.4,
        downtime_seconds=0.0174 if state is State.COMPLETED else None,
        downtime_breakdown={
            "stop": 0.0021,
            "save": 0.0052,
            "scan": 0.0009,
            "map": 0.0004,
            "load": 0.0061,
            "commit": 0.0019,
            "run": 0.0008,
        }
        if state is State.COMPLETED
        else {},
        error=error,
        timeline=timeline(started, *steps, (state, 25.4)),
    )


def completed(agent: FakeAgent, number: int = 4, guest: str = "web-1") -> Record:
    record = ended(State.COMPLETED, number, guest)
    agent.kept[record.id] = Kept(
        series=series(record, 25, pace=3.1e9, dirty=2.2e8),
        page_map=page_map(64 * GIB, {"sent": (0, 0.86), "absent": (0.86, 1)}),
    )
    return record


def aborted(agent: FakeAgent, number: int = 5, guest: str = "build") -> Record:
    record = ended(
        State.ABORTED,
        number,
        guest,
        ErrorInfo(code="aborted", message="the migration was aborted by an operator", hint="the guest runs on here"),
    )
    agent.kept[record.id] = Kept(series=series(record, 25, pace=1.1e9, dirty=9e8))
    return record


def failed(agent: FakeAgent, number: int = 6, guest: str = "a-guest-with-a-very-long-name.example.org") -> Record:
    error = ErrorInfo(
        code="not-converging",
        message="the guest changes its memory faster than it can be sent: 1.2 GB/s against 1.1 GB/s after 30 rounds",
        hint="use mode hybrid, raise max_bandwidth, or allow a longer downtime_limit_ms",
    )
    return ended(State.FAILED, number, guest, error, ago=200_000)


def everything(agent: FakeAgent) -> None:
    """One of each; those that run come last, as they began last."""
    for make in (failed, aborted, completed, paused, postcopy, precopy):
        agent.all.append(make(agent))


def many(agent: FakeAgent, count: int) -> None:
    """Migrations under way, all different."""
    for number in range(count):
        record = precopy(agent, 100 + number, f"vm{number:03}")
        agent.kept.pop(record.id)
        agent.all.append(record)
