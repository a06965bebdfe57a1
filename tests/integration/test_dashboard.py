"""The dashboard and the page maps of both agents, while a real guest is migrated."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from tests.dashboard.browser import PATIENCE_MS, opened
from tests.integration.place import CRAWL, Guest, Place

pytest_plugins = ["tests.dashboard.browser_fixtures"]
pytestmark = pytest.mark.asyncio(loop_scope="module")
expect.set_options(timeout=PATIENCE_MS)


def site(here: Place, agent: str = "source") -> str:
    return f"http://127.0.0.1:{here.status_ports[agent]}"


async def page_map(here: Place, migration: str, agent: str = "source") -> dict[str, Any]:
    found = json.loads(await here.get(f"/v1/migrations/{migration}/map", agent))["map"]
    assert sum(found["bytes_by_state"].values()) == here.memory_bytes
    cells = [base64.b64decode(column) for column in found["cells"].values()]
    assert {len(column) for column in cells} == {-(-here.memory_bytes // found["cell_bytes"])}
    assert all(sum(shares) in range(240, 270) for shares in zip(*cells, strict=True))
    return dict(found["bytes_by_state"])


async def series(here: Place, migration: str, agent: str = "source") -> dict[str, list[float]]:
    return dict(json.loads(await here.get(f"/v1/migrations/{migration}/series", agent)))


@pytest_asyncio.fixture(loop_scope="module")
async def aborted(here: Place) -> AsyncIterator[str]:
    """A migration that was aborted in pre-copy."""
    await here.guest()
    migration = await here.precopying()
    await here.cli("abort", migration)
    await here.over(migration)
    yield migration


async def test_the_maps_fill_in_and_the_figures_are_kept(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    source = await page_map(here, migration)
    assert source["sent"] > 0
    assert source["dirty"] > 0
    target = await page_map(here, migration, "target")
    assert target.keys() <= {"absent", "received"}
    await here.cli("set", migration, "--max-bandwidth", "0")
    for agent in ("source", "target"):
        record = await here.over(migration, agent)
        assert record["state"] == "completed"
    await guest.arrived()
    target = await page_map(here, migration, "target")
    assert target.keys() <= {"absent", "current", "mapped"}  # nothing is stale, nobody waits
    assert (await page_map(here, migration)).keys() <= {"absent", "sent"}
    kept = await series(here, migration)
    assert kept["remaining_bytes"][-1] == 0
    assert kept["transferred_bytes"] == sorted(kept["transferred_bytes"])
    assert kept["at"] == sorted(kept["at"])


async def test_a_real_migration_is_followed_to_its_end(browser: Browser, here: Place) -> None:
    guest = await here.guest("idle")
    async with opened(browser, site(here)) as watched, opened(browser, site(here, "target")) as other:
        for one in (watched, other):
            await one.page.goto(one.site)
            await expect(one.page.locator("#health")).to_have_text("✓ ready")
        migration = await here.start("idle", mode="postcopy", drain_bandwidth=CRAWL)
        for one in (watched, other):
            await one.page.goto(f"{one.site}/#/{migration}")
            await expect(one.page.locator(".head .badge")).to_have_text("▶ postcopy")
            await expect(one.page.locator("#map-numbers tbody")).to_contain_text("stale")
        await guest.arrived()  # touches every page: the map fills in, and there are faults
        for one in (watched, other):
            await expect(one.page.locator(".head .badge")).to_have_text("✓ completed")
            await expect(one.page.locator("#map-numbers tbody")).not_to_contain_text("stale")
            await expect(one.page.get_by_role("table", name="Steps of the downtime")).to_contain_text("commit")
            await expect(one.page.get_by_role("group", name="Remaining memory")).to_be_visible()
        await expect(other.page.get_by_role("img", name="Fault latency")).to_be_visible()


async def test_an_aborted_one_is_shown_with_its_error(browser: Browser, here: Place, aborted: str) -> None:
    record = await here.over(aborted)
    async with opened(browser, site(here)) as watched:
        await watched.page.goto(f"{watched.site}/#/{aborted}")
        await expect(watched.page.locator(".head .badge")).to_have_text("■ aborted")
        await expect(watched.page.locator(".error strong")).to_have_text(record["error"]["message"])


async def test_plots_and_log_outlive_the_agent(here: Place, aborted: str) -> None:
    before = await series(here, aborted)
    assert len(before["at"]) >= 2  # each of its states at least
    await here.source.stop()
    await here.source.start()
    assert await series(here, aborted) == before
    assert (await page_map(here, aborted)).keys() <= {"absent", "sent", "dirty"}
    log = (await here.source.request("GET", f"/v1/migrations/{aborted}/log"))["log"]
    assert [line["fields"].get("state") for line in log if line["event"] == "state"] == ["precopy", "aborted"]
