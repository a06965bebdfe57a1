"""A test to be killed: it creates everything that a run could leave behind, notes it in $LEFT_BEHIND, and waits forever.

pytest does not collect it (no ``test_`` in the file name); tests/faults/test_supervisor.py runs it.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from migrated.demo.pair import short_directory
from tests.faults.cases import STAGES
from tests.faults.rig import build_guest, rig
from tests.rig import supervisor
from tests.rig.namespaces import namespaces
from tests.rig.pages import more_pages

PAGES, PAGE_BYTES = 3, 2 << 20


async def test_waits_for_its_end() -> None:
    """Stop in the middle of a migration: agents, a guest process on each side, and descriptor holders exist."""
    with supervisor.directory("mg-", short_directory()) as directory, namespaces() as pair:
        mount = directory / "mount"
        mount.mkdir()
        mounting = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount)
        assert await mounting.wait() == 0
        with supervisor.undoing("umount", "-l", str(mount)), more_pages(PAGES, PAGE_BYTES):
            async with rig(build_guest(directory)) as made:
                gate = STAGES["round-1-pages"].gate()
                made.proxy.expect(gate)
                await made.begin(**STAGES["round-1-pages"].settings("hybrid"))
                await gate.reached.wait()
                note = {
                    "directories": [str(directory), str(made.directory)],
                    "namespaces": pair.names,
                    "mount": str(mount),
                    "guests": made.guests(),
                    "agents": [agent.pid for agent in made.agents],
                }
                whole = Path(os.environ["LEFT_BEHIND"])
                part = whole.with_suffix(".part")
                part.write_text(json.dumps(note))
                part.rename(whole)
                await asyncio.Event().wait()
