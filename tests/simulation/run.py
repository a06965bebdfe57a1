"""Run many schedules in parallel, repeat one, and shrink a failing one."""

from __future__ import annotations

import gc
import multiprocessing
import re
import time
from collections import Counter
from typing import Any

from tests.simulation.schedule import Schedule, draw_schedule
from tests.simulation.world import Violation, World


def attempt(schedule: Schedule, *, trace: bool = False) -> tuple[str | None, World]:
    """Run a schedule, and return the violation, or None."""
    world = World(schedule, trace=trace)
    try:
        world.run()
    except Violation as violation:
        return str(violation), world
    return None, world


def shrink(schedule: Schedule) -> tuple[Schedule, list[int]]:
    """Remove actions as long as the schedule still fails."""
    kept = list(range(len(schedule.actions)))
    index = 0
    while index < len(kept):
        fewer = kept[:index] + kept[index + 1 :]
        if attempt(Schedule(schedule.seed, tuple(schedule.actions[one] for one in fewer)))[0] is not None:
            kept, index = fewer, 0
        else:
            index += 1
    return Schedule(schedule.seed, tuple(schedule.actions[one] for one in kept)), kept


def _some(seeds: range) -> dict[str, Any]:
    """Run these seeds in a worker, and return figures and the failing seeds."""
    gc.freeze()
    figures: Counter[str] = Counter()
    states: set[str] = set()
    failing: list[tuple[int, str]] = []
    for seed in seeds:
        problem, world = attempt(draw_schedule(seed))
        figures["schedules"] += 1
        figures["faults"] += len(world.fired)
        figures["steps"] += world.loop.steps
        figures["virtual seconds"] += int(world.loop.now)
        states |= world.states
        if problem is not None:
            failing.append((seed, problem))
    return {"figures": figures, "states": states, "failing": failing}


def run_many(first: int, count: int, processes: int, seconds: float | None = None) -> dict[str, Any]:
    """Run all schedules; stop early after ``seconds``."""
    pieces = [range(start, min(start + 50, first + count)) for start in range(first, first + count, 50)]
    total: dict[str, Any] = {"figures": Counter(), "states": set(), "failing": []}
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for piece in pool.imap(_some, pieces):
            total["figures"].update(piece["figures"])
            total["states"] |= piece["states"]
            total["failing"] += piece["failing"]
            if seconds is not None and time.monotonic() - began > seconds:
                pool.terminate()
                break
    total["seconds"] = time.monotonic() - began
    return total


def explain(seed: int) -> str:
    """Shrink a failing seed, and describe it."""
    schedule, kept = shrink(draw_schedule(seed))
    problem, _ = attempt(schedule)
    lines = [f"seed {seed}: {problem}", *(f"    {action}" for action in schedule.actions)]
    lines.append(f"    python -m tests.simulation --seed {seed} --keep {','.join(map(str, kept)) or 'none'}")
    return "\n".join(lines)


def kind_of(problem: str) -> str:
    """Return the problem without numbers, so that problems of one kind compare equal."""
    return re.sub(r"[0-9a-f]{12,32}|\d+", "#", problem)
