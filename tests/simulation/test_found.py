"""Bugs that the simulation has found, each as a minimal schedule under a name, so that a regression reports that name.

Each schedule runs with many seeds, which differ in every delay.
"""

from __future__ import annotations

import pytest

from tests.simulation.run import attempt
from tests.simulation.schedule import Action, Schedule

SEEDS = range(30)

FOUND = {
    # COMMIT was lost, and so was the connection that should have repeated it.  The target killed the guest.
    "a-bound-target-is-cut-again": (
        Action("cut", what="all", how="both", note="s send commit", steps=0),
        Action("cut", what="all", how="both", note="t1 send resumed-loaded", steps=0),
    ),
    # The source closed a working connection, mistook that for a new failure, and closed the next one.
    "only-the-source-loses-a-page-connection": (
        Action("cut", what="bulk", how="client", note="t1 recv commit", steps=8),
    ),
    # No page was stale, and the guest was not running yet.  The target reported completed and never ran it.
    "cut-before-the-guest-runs": (Action("cut", what="all", how="both", note="t1 guest resume", steps=1),),
    # A refused start cancelled the promise to resume a paused guest.
    "a-refused-start": (
        Action("kill", "s", note="s guest send_state", steps=0),
        Action("command", "s", "", "fail", 3.0, note="fault", steps=1),
        Action("verb", "s", "start", "t2", note="s guest reclaim", after=1.0),
    ),
    # A journal that was temporarily unreadable lost the guest's descriptors.
    "no-descriptors-at-the-start": (
        Action("kill", "t1", note="t1 recv commit", steps=5),
        Action("descriptors", "t1", seconds=2.0, note="fault", steps=1),
    ),
    # Another target agent did not know the session, and that ended the migration.
    "resumed-at-a-wrong-host": (
        Action("block", "t1", "", "both", 9.0, note="t1 send running", steps=0),
        Action("verb", "s", "resume", "t2", note="fault", after=6.0),
    ),
    # After that end a co-operative guest could be migrated a second time.
    "moved-twice": (
        Action("block", "t1", "", "both", 9.0, note="t1 send running", steps=0),
        Action("verb", "s", "resume", "t2", note="fault", after=6.0),
        Action("verb", "s", "start", "t2", note="fault", after=7.0),
    ),
    # The target had finished and forgotten the session when the source asked again.
    "the-target-is-restarted-after-done": (
        Action("cut", what="all", how="both", note="t1 send done", steps=0),
        Action("block", "t1", "", "both", 3.0, note="fault", steps=1),
        Action("kill", "t1", note="t1 disk rename", count=5, after=0.1),
    ),
    # A guest process that no journal named was never cleaned up.
    "killed-between-start-and-journal": (Action("kill", "t1", note="t1 guest started", steps=0),),
    # The disk was full, and the journal entry for a COMMIT that was never sent could not be rolled back.
    "no-room-for-commit": (
        Action("disk", "s", "", "ENOSPC", 3.0, note="s recv loaded", steps=0),
        Action("kill", "s", note="s guest resume", steps=5),
    ),
    # The journal did not say released, its descriptors were let go of, and the old process was still there.
    "no-room-for-released": (
        Action("descriptors", "s", seconds=0.3, note="s recv running", steps=0),
        Action("command", "s", "release", "hang", 4.0, note="s recv running", steps=0),
    ),
    # COMMIT was journalled and never sent.
    "aborted-between-the-journal-and-commit": (
        Action("block", "t1", "", "both", 9.0, note="s recv loaded", steps=0),
        Action("verb", "s", "abort", note="s recv loaded", steps=1),
        Action("kill", "s", note="s guest resume", steps=9),
    ),
    # Only an operator can decide these; there are commands for it.
    "the-source-host-is-gone-at-loaded": (Action("burn", "s", note="t1 send loaded", steps=0),),
    "the-source-host-is-gone-after-commit": (Action("burn", "s", note="t1 recv commit", steps=9),),
    "the-target-host-is-gone-after-commit": (Action("burn", "t1", note="s send commit", steps=3),),
    # Another version did not understand, and removed, the word that all is in; then the target knew nothing of the guest.
    "the-target-is-upgraded-after-done": (
        Action("cut", what="all", how="both", note="t1 send done", steps=0),
        Action("block", "t1", "", "both", 3.0, note="fault", steps=1),
        Action("version", "t1", "journal", "newer", 9.0, note="fault", after=2.0),
    ),
    # A target of another version "refuses to go on": the hint was to force the guest to run at its source.
    "the-target-is-upgraded-after-commit": (
        Action("version", "t1", "protocol", "newer", 9.0, note="t1 recv commit", steps=5),
    ),
    # The source withdrew while the target was closing the connection for another reason: the guest waited for ever.
    "withdrawn-when-a-page-connection-is-lost": (
        Action("verb", "s", "abort", note="t1 send loaded", steps=0),
        Action("cut", what="bulk", how="server", note="s send abort", steps=0),
        Action("burn", "s", note="t1 recv abort", steps=0),
    ),
    # The journal still said loaded when the source was released.
    "no-room-on-the-target": (Action("disk", "t1", "", "EIO", 9.0, note="t1 recv commit", steps=0),),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    for seed in SEEDS:
        problem, world = attempt(Schedule(seed, FOUND[name]))
        assert problem is None, f"seed {seed}: {problem}"
        assert world.fired
