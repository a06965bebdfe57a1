"""What the simulation has found, each as the few schedules that show it: so that it is told by its name when it comes back.

Each is tried with many seeds, which differ in every delay.
"""

from __future__ import annotations

import pytest

from tests.simulation.run import attempt
from tests.simulation.schedule import Action, Schedule

SEEDS = range(30)

FOUND = {
    # COMMIT was lost, and the connection that was to repeat it was cut, too: the target killed the guest.
    "a-bound-target-is-cut-again": (
        Action("cut", what="all", how="both", note="s send commit", steps=0),
        Action("cut", what="all", how="both", note="t1 send resumed-loaded", steps=0),
    ),
    # The source closed a living connection, took that for a new failure, and closed the next one.
    "only-the-source-loses-a-page-connection": (
        Action("cut", what="bulk", how="client", note="t1 recv commit", steps=8),
    ),
    # Nothing was stale, the guest was not running yet: the target said completed, and never ran it.
    "cut-before-the-guest-runs": (Action("cut", what="all", how="both", note="t1 guest resume", steps=1),),
    # The promise to run a paused guest was taken back by a start that was refused.
    "a-refused-start": (
        Action("kill", "s", note="s guest send_state", steps=0),
        Action("command", "s", "", "fail", 3.0, note="fault", steps=1),
        Action("verb", "s", "start", "t2", note="s guest reclaim", after=1.0),
    ),
    # A journal that could not be read for a moment cost the guest its descriptors.
    "no-descriptors-at-the-start": (
        Action("kill", "t1", note="t1 recv commit", steps=5),
        Action("descriptors", "t1", seconds=2.0, note="fault", steps=1),
    ),
    # Another target agent does not know the session: that was the end of the migration.
    "resumed-at-a-wrong-host": (
        Action("block", "t1", "", "both", 9.0, note="t1 send running", steps=0),
        Action("verb", "s", "resume", "t2", note="fault", after=6.0),
    ),
    # After that end a co-operative guest could be moved a second time.
    "moved-twice": (
        Action("block", "t1", "", "both", 9.0, note="t1 send running", steps=0),
        Action("verb", "s", "resume", "t2", note="fault", after=6.0),
        Action("verb", "s", "start", "t2", note="fault", after=7.0),
    ),
    # The target had finished and forgotten when the source asked again.
    "the-target-is-restarted-after-done": (
        Action("cut", what="all", how="both", note="t1 send done", steps=0),
        Action("block", "t1", "", "both", 3.0, note="fault", steps=1),
        Action("kill", "t1", note="t1 disk rename", count=5, after=0.1),
    ),
    # A guest process that no journal named stayed for ever.
    "killed-between-start-and-journal": (Action("kill", "t1", note="t1 guest started", steps=0),),
    # The disk was full, and COMMIT, which was never sent, could not be taken back.
    "no-room-for-commit": (
        Action("disk", "s", "", "ENOSPC", 3.0, note="s recv loaded", steps=0),
        Action("kill", "s", note="s guest resume", steps=5),
    ),
    # Only an operator can decide, and has commands for it.
    "the-source-host-is-gone-at-loaded": (Action("burn", "s", note="t1 send loaded", steps=0),),
    "the-source-host-is-gone-after-commit": (Action("burn", "s", note="t1 recv commit", steps=9),),
    "the-target-host-is-gone-after-commit": (Action("burn", "t1", note="s send commit", steps=3),),
    # The journal still said loaded when the source was let go.
    "no-room-on-the-target": (Action("disk", "t1", "", "EIO", 9.0, note="t1 recv commit", steps=0),),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    for seed in SEEDS:
        problem, world = attempt(Schedule(seed, FOUND[name]))
        assert problem is None, f"seed {seed}: {problem}"
        assert world.fired
