"""Take the picture of the dashboard: migrate a co-operative guest, and photograph the target's page in post-copy.

    .venv/bin/python -m docs.img.dashboard docs/img/dashboard.png

Needs the development tools (Playwright) and the distribution's Chromium.
"""  # noqa: INP001 - a script

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

from migrated.demo.pair import AgentPair, free_port, short_directory
from migrated.demo.process_guest import MIB, RunningProcess
from tests.dashboard.browser import opened, running_browser

MEMORY_BYTES = 256 * MIB
VIEW = {"width": 1500, "height": 1190}


async def photograph(path: Path) -> None:
    """Migrate, and write the picture."""
    with tempfile.TemporaryDirectory(prefix="migrated-", dir=short_directory()) as name:
        guest = RunningProcess(Path(name), memory_bytes=MEMORY_BYTES, name="vm1", rate=6000)
        pair = AgentPair(
            Path(name), source_guests={"vm1": guest.source_table()}, target_guests={"vm1": guest.target_table()}
        )
        port = free_port()
        pair.target.table["agent"] = {"state_dir": str(pair.target.state_dir), "name": "hostb"}
        pair.target.table["http"] = {"status": f"127.0.0.1:{port}"}
        site = f"http://127.0.0.1:{port}"
        async with pair, running_browser() as browser:
            try:
                await guest.start()
                options = {"max_bandwidth": "160Mbit", "drain_bandwidth": "48Mbit", "max_rounds": 1}
                migration = await pair.start("vm1", mode="hybrid", **options)
                async with opened(browser, site, viewport=VIEW) as watched:
                    await watched.page.goto(f"{site}/#/{migration}")
                    await pair.source.wait(migration, "postcopy")
                    attached = asyncio.create_task(guest.console.attach(guest.target_console, 60))
                    async for record in pair.target.events(migration):
                        if record["state"] == "postcopy" and enough(site, migration, record["total_bytes"]):
                            break
                    await watched.page.wait_for_timeout(1000)  # the page shows it at its next look
                    await watched.page.screenshot(path=path, full_page=True)
                    await pair.target.wait(migration)
                    await attached
                    await guest.console.command("quit")
            finally:
                await guest.stop()


def enough(site: str, migration: str, total_bytes: int) -> bool:
    """Whether much is mapped and something is still stale."""
    with urlopen(f"{site}/v1/migrations/{migration}/map") as answer:  # noqa: S310 - ours
        states = json.load(answer)["map"]["bytes_by_state"]
    return 0 < states.get("stale", 0) < total_bytes // 4


if __name__ == "__main__":
    asyncio.run(photograph(Path(sys.argv[1])))
