"""Each limit of [timeouts] that a flow waits by, in virtual time: every other limit is too long to be met.

The limits by which a driver waits for its guest are in tests/unit/guests/test_timeouts.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from migrated.settings import Timeouts
from tests.simulation.network import SILENCE_SECONDS
from tests.simulation.schedule import Action, Schedule
from tests.simulation.world import World

SEEDS = range(10)
#: A limit that is tested; the kernel gives a silent connection up later.
SHORT = 1.5
LONG = 30.0
PATH_SECONDS = 20.0
assert SHORT < SILENCE_SECONDS < PATH_SECONDS < LONG


def silent(note: str) -> tuple[Action, ...]:
    """Nothing passes between the two hosts, from that moment on."""
    return (Action("block", "t1", "", "both", PATH_SECONDS, note=note, steps=-1),)


def world_of(seed: int, actions: tuple[Action, ...], mode: str = "hybrid", **limits: float) -> World:
    """A run with these limits; it has ended well."""
    wide: dict[str, Any] = dict.fromkeys(Timeouts.model_fields, LONG)
    wide |= {"heartbeat_interval": 1.0, "reconnect": 0.0, "reconnect_interval": 0.5, "shutdown": 5.0, **limits}
    world = World(Schedule(seed, actions), trace=True, timeouts=Timeouts(**wide))
    world.mode = mode
    world.net.high_water = 0  # a sender waits until what it has sent is taken
    world.run()
    assert world.fired, "it was never met"
    return world


@dataclasses.dataclass(frozen=True)
class Case:
    """What is met where, and how the record says so."""

    limits: dict[str, float]
    actions: tuple[Action, ...]
    says: str
    mode: str = "hybrid"


CASES = {
    "connect": Case(
        {"connect": SHORT}, (Action("block", "t1", "", "both", PATH_SECONDS, at=0.05),), "no answer within 1.5 s"
    ),
    "ready": Case(
        {"guest_start": 1.0, "handshake": 0.5}, silent("t1 send ready"), "waited 1.5 s for the target to be ready"
    ),
    "barrier": Case(
        {"switchover": SHORT}, silent("t1 send barrier-ack"), "waited 1.5 s for the barrier to be acknowledged"
    ),
    "stale-map": Case(
        {"switchover": SHORT}, silent("s send switchover"), "waited 1.5 s for the stale map to be sent", mode="postcopy"
    ),
    "loaded": Case({"guest_state": SHORT}, silent("t1 send loaded"), "waited 1.5 s for the guest state to be loaded"),
    "silence": Case(
        {"heartbeat_limit": SHORT, "heartbeat_interval": 0.5},
        silent("t1 recv commit"),
        "nothing was heard from t1:7440 for 1.",
    ),
    "reconnect": Case(
        {"reconnect": 3.0, "connect": SHORT},
        silent("t1 recv commit"),
        "could not be reached for 3 s; the guest waits there",
    ),
    "commit": Case({"switchover": SHORT}, silent("t1 recv commit"), "waited 1.5 s for the guest to run there"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wait_ends_at_its_limit_and_is_named(name: str) -> None:
    case = CASES[name]
    for seed in SEEDS:
        world = world_of(seed, case.actions, case.mode, **case.limits)
        said = [line for line in world.lines if " -> " in line and case.says in line]
        assert said, f"seed {seed}:\n" + "\n".join(world.lines[-60:])


def when(world: World, text: str) -> float:
    """The virtual time of the first line with this text."""
    return next(float(line.split()[0]) for line in world.lines if text in line)


@pytest.mark.parametrize(
    ("key", "actions", "ends"),
    [
        ("abort", (Action("verb", "s", "abort", note="t1 recv round"), *silent("s send abort")), "precopy -> aborted"),
        ("release", silent("s send released"), "-> completed"),
        ("shutdown", (*silent("t1 recv commit"), Action("stop", "s", note="fault", after=6.0)), "s is gone"),
    ],
    ids=["abort", "release", "shutdown"],
)
def test_what_is_not_confirmed_in_time_is_not_waited_for(key: str, actions: tuple[Action, ...], ends: str) -> None:
    for seed in SEEDS:
        limits: dict[str, Any] = {"connect": 0.5, key: SHORT}
        world = world_of(seed, actions, **limits)
        took = when(world, ends) - when(world, f"--- {actions[-1].kind}")
        assert SHORT <= took < SILENCE_SECONDS, f"seed {seed}: {took:g} s"


def test_pauses_between_attempts_to_reconnect_double_up_to_their_limit() -> None:
    for seed in SEEDS:
        world = world_of(
            seed, silent("t1 recv commit"), connect=0.1, reconnect_interval=0.2, reconnect_interval_limit=1.0
        )
        lost = when(world, "-> postcopy-paused")
        dials = [at for at, host, _ in world.net.dials if host == "s" and round(at, 4) >= lost]  # a line has 4 decimals
        pauses = [after - at for at, after in itertools.pairwise(dials)]
        for pause, wanted in zip(pauses, [0.2, 0.4, 0.8, 1.0, 1.0, 1.0], strict=False):
            # Whether the attempt itself, which takes 0.1 s, is part of the pause is left open.
            assert wanted - 0.02 < pause < wanted + 0.12, f"seed {seed}: {pauses[:6]}"


def test_a_quiet_connection_is_pinged_as_often_as_configured() -> None:
    for seed in SEEDS:
        quiet = (Action("command", "t1", "load_state", "hang", 3.0, note="s send switchover", steps=-1),)
        often = world_of(seed, quiet, heartbeat_interval=0.1).notes.get("s send ping", 0)
        seldom = world_of(seed, quiet, heartbeat_interval=20.0, heartbeat_limit=40.0).notes.get("s send ping", 0)
        assert often > 10, f"seed {seed}"
        assert seldom <= 1, f"seed {seed}"


def test_every_limit_is_tested() -> None:
    """Here, or with the guests' drivers."""
    here = {key for case in CASES.values() for key in case.limits}
    here |= {"abort", "release", "shutdown", "reconnect_interval", "reconnect_interval_limit"}
    assert here | {"guest_command", "guest_pause"} == set(Timeouts.model_fields)
