"""The page of ``migrated report`` in a browser, from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from migrated.agent.record import Record
from migrated.http.dashboard import report
from tests.dashboard import scenes
from tests.dashboard.browser import PATIENCE_MS, opened
from tests.unit.http_cli.fake_agent import FakeAgent

pytest_plugins = ["tests.dashboard.browser_fixtures"]
pytestmark = pytest.mark.asyncio(loop_scope="module")
expect.set_options(timeout=PATIENCE_MS)


def written(directory: Path, agent: FakeAgent, record: Record) -> Path:
    kept = agent.kept[record.id]
    path = directory / "report.html"
    path.write_text(report.make(record, kept.series, kept.page_map, agent="host-a", version="1.0"))
    return path


async def test_a_report_shows_what_the_dashboard_showed(browser: Browser, tmp_path: Path) -> None:
    agent = FakeAgent()
    path = written(tmp_path, agent, scenes.postcopy(agent))
    async with opened(browser, "file://") as watched:
        page = watched.page
        await page.goto(path.as_uri())
        await expect(page.get_by_role("heading", level=1)).to_have_text("Migration of cache-3")
        await expect(page.get_by_role("img", name="Page map of 64")).to_be_visible()
        for name in ("Throughput and dirty rate", "Remaining memory"):
            await expect(page.get_by_role("group", name=name).locator("canvas")).to_be_visible()
        await expect(page.get_by_role("img", name="Fault latency")).to_be_visible()
        await expect(page.get_by_role("table", name="Steps of the downtime")).to_contain_text("journal2.1 ms")


async def test_a_report_of_a_guest_with_a_nasty_name_is_only_text(browser: Browser, tmp_path: Path) -> None:
    agent = FakeAgent()
    record = scenes.completed(agent, guest="</script><img src=x onerror=alert(1)>")
    path = written(tmp_path, agent, record)
    async with opened(browser, "file://") as watched:
        await watched.page.goto(path.as_uri())
        await expect(watched.page.locator("#detail h2")).to_have_text(record.guest)
        assert await watched.page.locator("img:not([role])").count() == 0
