"""A test run that is killed leaves no process, namespace, mount, directory or huge page behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from migrated.waiting import within
from tests.faults.rig import LIMIT_SECONDS, is_alive
from tests.rig import supervisor, traces
from tests.rig.left_behind import PAGES
from tests.rig.namespaces import ip
from tests.rig.pages import PagesUnavailableError, more_pages

pytestmark = [pytest.mark.root, pytest.mark.slow]


def left(note: dict[str, Any]) -> list[str]:
    """What is there of that run."""
    found = [f"process {pid}" for pid in (*note["agents"], *note["guests"]) if is_alive(pid)]
    for directory in note["directories"]:
        found += [f"{pid}: {line}" for pid, line in traces.processes(Path(directory)).items()]
        found += [directory] if os.path.exists(directory) else []
    found += [name for name in note["namespaces"] if name in ip("netns", "list").split()]
    found += [note["mount"]] if note["mount"] in Path("/proc/self/mounts").read_text() else []
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
async def test_a_killed_test_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    try:
        with more_pages(PAGES, 2 << 20):
            pass
    except PagesUnavailableError as error:
        pytest.skip(str(error))
    whole = tmp_path / "note"
    with (tmp_path / "log").open("wb") as log:
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/rig/left_behind.py"),
            cwd=supervisor.ROOT,
            env={**os.environ, "LEFT_BEHIND": str(whole)},
            stdout=log,
            stderr=log,
        )
    try:
        async with within(LIMIT_SECONDS, "a run to kill"):
            while not whole.exists():
                assert run.returncode is None, (tmp_path / "log").read_text()
                await asyncio.sleep(0.02)
        note = json.loads(whole.read_text())
        # Both agents, both guests, and for either agent who holds its descriptors.
        assert set(traces.processes(Path(note["directories"][1]))) > set(note["agents"])
        assert len(traces.processes(Path(note["directories"][1]))) == 4
        assert len([pid for pid in note["guests"] if is_alive(pid)]) == 2
    finally:
        run.send_signal(number)
        await run.wait()
    async with within(LIMIT_SECONDS, "everything to be gone"):
        while left(note):  # noqa: ASYNC110 - none of it tells of its end
            await asyncio.sleep(0.02)
