"""One browser for the tests of a module, loaded as a plugin by those that want it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.dashboard.browser import executable, running_browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if executable() is None:
        pytest.skip("no Chromium (Debian package chromium)")
    async with running_browser() as running:
        yield running
