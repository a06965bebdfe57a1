"""The dashboard in a browser, over an agent that pretends: every state, a phone, the keyboard, and many migrations."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from migrated.agent.record import ErrorInfo, State
from migrated.demo.pair import free_port
from tests.dashboard import scenes
from tests.dashboard.browser import PATIENCE_MS, Watched, opened
from tests.unit.http_cli.served import Served, serving

pytest_plugins = ["tests.dashboard.browser_fixtures"]
pytestmark = pytest.mark.asyncio(loop_scope="module")
expect.set_options(timeout=PATIENCE_MS)

WIDE: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 375, "height": 740}, "is_mobile": True, "has_touch": True}


@pytest_asyncio.fixture(loop_scope="module")
async def agent() -> AsyncIterator[Served]:
    with tempfile.TemporaryDirectory(prefix="mgd-") as directory:
        async with serving(Path(directory), "source", free_port()) as served:
            yield served


async def go(watched: Watched, path: str = "/") -> Page:
    await watched.page.goto(watched.site + path)
    await expect(watched.page.locator("#health")).to_have_text("✓ ready")
    return watched.page


async def widths(page: Page) -> tuple[int, int]:
    """What is there, and what fits."""
    script = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, fits = await page.evaluate(script)
    return wide, fits


async def test_an_agent_without_migrations_says_so(browser: Browser, agent: Served) -> None:
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        await expect(page.locator("#active-none")).to_have_text("No migration is running. Guests here: vm1, other.")
        await expect(page.locator("#ended-none")).to_have_text("No migration has ended yet.")
        assert await page.title() == "host-a · migrated source"


async def test_a_migration_appears_and_is_followed_to_its_end(browser: Browser, agent: Served) -> None:
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        record = scenes.precopy(agent.agent)
        agent.agent.all.append(record)
        detail = page.locator("#detail")
        await expect(detail.get_by_role("heading", level=2)).to_have_text("db-primary")
        await expect(detail.locator(".outlook")).to_have_text("61.8 % of 1.00 TiB up to date; about 49.0 s left")
        record.remaining_bytes = 128 << 30
        await expect(detail.locator(".outlook")).to_contain_text("87.5 % of 1.00 TiB up to date")
        await expect(page.locator("#active tbody tr")).to_contain_text(["87.5 %"])
        await expect(detail.get_by_role("group", name="Throughput and dirty rate")).to_be_visible()
        await agent.agent.move(record, State.COMPLETED)
        await expect(detail.locator(".head .badge")).to_have_text("✓ completed")
        await expect(page.locator("#ended tbody tr")).to_contain_text(["db-primary"])
        await expect(page.locator("#active-none")).to_be_visible()
        await expect(page.locator("#announce")).to_have_text("db-primary: completed")


async def test_the_page_map_is_drawn_and_its_numbers_are_a_table(browser: Browser, agent: Served) -> None:
    agent.agent.all.append(record := scenes.precopy(agent.agent))
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        canvas = page.get_by_role("img", name="Page map of 1.00 TiB")
        await expect(canvas).to_be_visible()
        numbers = page.locator("#map-numbers tbody tr")
        await expect(numbers).to_have_count(3)
        assert await canvas.get_attribute("aria-describedby") == "map-numbers"
        before = await painted(page)
        agent.agent.kept[record.id].page_map = scenes.page_map(1 << 40, {"sent": (0, 0.5), "dirty": (0.5, 1)})
        record.transferred_bytes += 1  # so that the page looks
        await expect(numbers).to_have_count(2)
        await expect(numbers.first).to_contain_text("512 GiB")
        await expect(numbers.first).to_contain_text("50.0 %")
        assert await painted(page) != before
        await canvas.focus()
        for key, said in (("Home", "At 0 B: 100 % sent"), ("End", "At 1.00 TiB: 100 % dirty")):
            await page.keyboard.press(key)
            await expect(page.locator(".cell")).to_have_text(said)
        await page.keyboard.press("ArrowLeft")
        await expect(page.locator(".cell")).to_contain_text("dirty")


async def painted(page: Page) -> str:
    return str(await page.locator("canvas.map").evaluate("(canvas) => canvas.toDataURL()"))


async def test_what_went_wrong_is_shown_with_what_to_do(browser: Browser, agent: Served) -> None:
    agent.agent.all.append(scenes.aborted(agent.agent))
    agent.agent.all.append(failed := scenes.failed(agent.agent))
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched, f"/#/{failed.id}")
        error = page.get_by_role("alert").filter(has_text="not-converging")
        await expect(error).to_contain_text("the guest changes its memory faster than it can be sent")
        await expect(error).to_contain_text("What to do: use mode hybrid")
        await page.get_by_role("link", name="build").click()
        await expect(page.locator(".head .badge")).to_have_text("■ aborted")
        await expect(page.locator(".error")).to_contain_text("aborted by an operator")
        await expect(page.locator("[aria-current]")).to_have_text("build")


async def test_postcopy_shows_faults_and_the_downtime_by_steps(browser: Browser, agent: Served) -> None:
    agent.agent.all.append(scenes.postcopy(agent.agent))
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        await expect(
            page.get_by_role("img", name="Fault latency: half below 41 µs, 99 % below 3.10 ms, longest 18.7 ms")
        ).to_be_visible()
        await page.get_by_text("Numbers").click()
        table = page.get_by_role("table", name="Faults by latency and kind of page")
        await expect(table.get_by_role("row").nth(1)).to_contain_text("4 µs to 8 µs")
        downtime = page.get_by_role("table", name="Steps of the downtime")
        await expect(downtime.get_by_role("row")).to_contain_text(["load", "journal", "commit", "run"])
        await expect(page.get_by_role("img", name="States: ")).to_be_visible()
        await expect(page.locator("#map-numbers")).to_contain_text("requested")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_has_enough_contrast_in_both_themes(browser: Browser, agent: Served, scheme: str) -> None:
    scenes.everything(agent.agent)
    async with opened(browser, agent.status_url, color_scheme=scheme, **WIDE) as watched:
        page = await go(watched)
        for record in agent.agent.all:
            await page.goto(f"{watched.site}/#/{record.id}")
            await expect(page.locator("#detail h2")).to_have_text(record.guest)
            assert await page.evaluate(POOR_CONTRAST) == []


#: Texts with less contrast to their background than WCAG 2 asks for (AA: 4.5).
POOR_CONTRAST = """() => {
  const numbers = (colour) => {
    const pen = document.createElement("canvas").getContext("2d");
    pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility() || node.closest("noscript, .unseen, .skip")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(numbers(node.closest("svg") ? style.fill : style.color)), light(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${walker.currentNode.textContent.trim()}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return [...new Set(poor)];
}"""


async def test_everything_has_a_name_and_the_headings_are_in_order(browser: Browser, agent: Served) -> None:
    scenes.everything(agent.agent)
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        await expect(page.locator("#detail h2")).to_be_visible()
        assert await page.evaluate(NAMELESS) == []
        levels = await page.evaluate(
            "() => [...document.querySelectorAll('h1, h2, h3, h4')].filter((one) => one.checkVisibility())"
            ".map((one) => Number(one.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later <= sooner + 1 for sooner, later in itertools.pairwise(levels))
        assert await page.evaluate("() => document.documentElement.lang") == "en"


#: Controls, pictures and tables without a name, and ids that are there twice.
NAMELESS = """() => {
  const named = (node) => node.getAttribute("aria-label") || node.getAttribute("aria-labelledby")
    || (node.labels && node.labels.length) || node.textContent.trim() || (node.caption && node.caption.textContent);
  const lacking = [...document.querySelectorAll("a, button, input, progress, nav, [role=img], [role=group], table, canvas.map")]
    .filter((node) => node.checkVisibility() && !named(node)).map((node) => node.outerHTML.slice(0, 90));
  for (const table of document.querySelectorAll("table")) if (!table.caption) lacking.push("a table without a caption");
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  return [...lacking, ...ids.filter((id, index) => ids.indexOf(id) !== index)];
}"""


async def test_the_keyboard_reaches_everything(browser: Browser, agent: Served) -> None:
    scenes.everything(agent.agent)
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        await expect(page.locator("canvas.map")).to_be_visible()
        seen = []
        for _ in range(30):
            await page.keyboard.press("Tab")
            seen.append(await page.evaluate("() => document.activeElement.textContent || document.activeElement.id"))
            if await page.evaluate("() => document.activeElement.matches('canvas.map')"):
                break
        wanted = ["Skip to the selected migration", "Metrics", "Theme: auto", "filter", "db-primary", "web-1"]
        assert [name for name in seen if name in wanted] == wanted
        assert await page.evaluate("() => document.activeElement.matches('canvas.map')")


async def test_the_theme_is_remembered(browser: Browser, agent: Served) -> None:
    async with opened(browser, agent.status_url, **WIDE, color_scheme="light") as watched:
        page = await go(watched)
        ground = "() => getComputedStyle(document.body).backgroundColor"
        light = await page.evaluate(ground)
        for _ in range(2):
            await page.get_by_role("button", name="Theme").click()
        await expect(page.get_by_role("button", name="Theme")).to_have_text("Theme: dark")
        dark = await page.evaluate(ground)
        assert dark != light
        await page.reload()
        await expect(page.get_by_role("button", name="Theme")).to_have_text("Theme: dark")
        assert await page.evaluate(ground) == dark


async def test_a_phone_shows_the_list_or_one_migration_and_never_scrolls_sideways(
    browser: Browser, agent: Served
) -> None:
    scenes.everything(agent.agent)
    async with opened(browser, agent.status_url, **PHONE) as watched:
        page = await go(watched)
        await expect(page.get_by_role("link", name="cache-3")).to_be_visible()
        await expect(page.locator("#detail")).to_be_hidden()
        wide, fits = await widths(page)
        assert wide <= fits
        assert await page.evaluate(OVERFLOWING) == []
        for record in agent.agent.all:
            await page.get_by_role("link", name=record.guest).click()
            await expect(page.locator("#detail h2")).to_have_text(record.guest)
            await expect(page.get_by_role("navigation", name="Migrations")).to_be_hidden()
            wide, fits = await widths(page)
            assert wide <= fits, record.guest
            await page.get_by_role("link", name="← All migrations").click()
            await expect(page.get_by_role("navigation", name="Migrations")).to_be_visible()


#: Cells whose text reaches into the next one.
OVERFLOWING = """() => [...document.querySelectorAll("nav th, nav td")]
  .filter((cell) => cell.scrollWidth > cell.clientWidth).map((cell) => cell.textContent)"""


async def test_guests_are_text_and_never_markup(browser: Browser, agent: Served) -> None:
    name = "<img src=x onerror=alert(1)>"
    record = scenes.aborted(agent.agent, guest=name)
    record.error = ErrorInfo(code="aborted", message=f"{name} was aborted", hint=name)
    agent.agent.all.append(record)
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        await expect(page.locator("#detail h2")).to_have_text(name)
        await expect(page.locator(".error strong")).to_have_text(f"{name} was aborted")
        assert await page.locator("img:not([role])").count() == 0


async def test_two_hundred_migrations_are_listed_followed_and_filtered(browser: Browser, agent: Served) -> None:
    scenes.many(agent.agent, 200)
    async with opened(browser, agent.status_url, **WIDE) as watched:
        page = await go(watched)
        rows = page.locator("#active tbody tr")
        await expect(rows).to_have_count(200)
        first = await rows.first.element_handle()
        for share in (2, 4, 8):  # all of them change at once, again and again
            for record in agent.agent.all:
                record.remaining_bytes = record.total_bytes // share
            await expect(page.locator("#active tbody td:nth-child(2)")).to_have_text(
                [f"{100 - 100 / share:.1f} %"] * 200
            )
        assert first is not None
        assert await first.evaluate("(row) => row.isConnected")  # rows are changed in place, not made anew
        await page.get_by_label("Filter").fill("vm19")
        await expect(rows).to_have_count(10)
        await page.get_by_role("link", name="vm195").click()
        await expect(page.locator("#detail h2")).to_have_text("vm195")
        for record in agent.agent.all[:150]:
            await agent.agent.move(record, State.COMPLETED)
        await page.get_by_label("Filter").fill("")
        await expect(rows).to_have_count(50)
        await expect(page.locator("#ended tbody tr")).to_have_count(150)


async def test_an_agent_that_is_gone_is_noticed_and_found_again(browser: Browser) -> None:
    with tempfile.TemporaryDirectory(prefix="mgd-") as directory:
        port = free_port()
        site = f"http://127.0.0.1:{port}"
        context = await browser.new_context()
        page = await context.new_page()
        try:
            async with serving(Path(directory), "source", port) as served:
                await page.goto(site)
                await expect(page.locator("#health")).to_have_text("✓ ready")
                assert served.status_url == site
            await expect(page.get_by_role("alert").filter(has_text="is lost")).to_be_visible()
            async with serving(Path(directory), "source", port):
                await expect(page.locator("#health")).to_have_text("✓ ready")
                await expect(page.locator("#lost")).to_be_hidden()
        finally:
            await context.close()
