"""The distribution's Chromium, without a window, and a page that may talk to one site only."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import Any

from playwright.async_api import Browser, ConsoleMessage, Page, Route, async_playwright

#: Nothing waits this long unless something is broken.
PATIENCE_MS = 60_000
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)


def executable() -> str | None:
    """Where Chromium is; None without it."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable(), args=list(_ARGUMENTS), timeout=PATIENCE_MS
        )
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page, what it complained of, and where it wanted to go."""

    def __init__(self, page: Page, site: str) -> None:
        self.page = page
        self.site = site
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def guard(self, route: Route) -> None:
        if route.request.url.startswith(f"{self.site}/"):
            await route.continue_()
        else:
            self.strangers.append(route.request.url)
            await route.abort()


@contextlib.asynccontextmanager
async def opened(browser: Browser, site: str, **options: Any) -> AsyncIterator[Watched]:
    """A new page for a site.  At the end nothing was complained of, and nothing else was asked for anything."""
    context = await browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = await context.new_page()
    watched = Watched(page, site)
    await page.route("**/*", watched.guard)
    try:
        yield watched
    finally:
        await context.close()
    assert watched.complaints == []
    assert watched.strangers == []
