"""An evacuation takes domains of libvirt's and other guests in one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.demo.console import GuestConsole
from tests.evacuation.site import PATIENCE_SECONDS, site
from tests.integration.conftest import program
from tests.rig.libvirt_host import LibvirtHost, domain_xml
from tests.rig.moving_domain import MEMORY_BYTES, NAME

__all__ = ["program"]

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.asyncio(loop_scope="module"),
]


async def test_a_domain_and_a_process_leave_in_one_run(program: Path, libvirts: tuple[LibvirtHost, ...]) -> None:
    here, there = libvirts
    hosts = (
        {"source": {"libvirt": {"uri": here.uri, "domains": [NAME]}}},
        {"target": {"libvirt": {"uri": there.uri, "accept": [NAME]}}},
    )
    console = GuestConsole(NAME)
    xml = domain_xml(here.directory.parent, NAME, MEMORY_BYTES, size="60%", rate=1000, pattern="hot")
    try:
        await here.start_domain(xml, persistent=True)
        await console.attach(here.console)
        await console.wait_booted(PATIENCE_SECONDS)
        before = await console.stats(PATIENCE_SECONDS)
        async with site(program, {"p0": 2}, hosts=hosts) as place:
            over = await place.evacuate("--to", place.to, "--order", "largest", "--json")
            assert over.code == 0, f"{over}\n{place.explain(await place.now())}"
            left = [(move["guest"], move["driver"], move["state"]) for move in over.json["guests"]]
            assert left == [(NAME, "libvirt", "completed"), ("p0", "process", "completed")]
            await place.verify(over.json)
            assert (await here.state(NAME), await there.state(NAME)) == ("shut off", "running")
            await console.attach(there.console, PATIENCE_SECONDS)
            swept = await console.sweep(PATIENCE_SECONDS)
            after = await console.stats(PATIENCE_SECONDS)
            assert (swept.wrong, swept.errors, after.errors, console.corrupt) == (0, 0, 0, [])
            assert swept.blocks * 4096 > MEMORY_BYTES // 4
            assert after.operations > before.operations
            assert place.complaints() == []
    finally:
        await console.close()
        for libvirt in libvirts:
            await libvirt.forget(NAME)
