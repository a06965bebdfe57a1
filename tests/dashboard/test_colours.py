"""Colours that mean different things in one picture are different, also for the colour-blind and in grey."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import pytest
from playwright.async_api import Browser

from tests.dashboard.browser import opened

pytest_plugins = ["tests.dashboard.browser_fixtures"]
pytestmark = pytest.mark.asyncio(loop_scope="module")

STYLE = Path(__file__).parents[2] / "migrated" / "http" / "dashboard" / "dashboard.css"
#: In CIE 1976; 2.3 is just noticeable side by side.
DIFFERENT = 9.0
#: What is drawn without a pattern, or with the same one, in one picture.  (The time line names its parts, in their order.)
PICTURES = {
    "page map of a source": ("--page-absent", "--page-sent"),
    "page map of a target": ("--page-absent", "--page-received", "--page-current", "--page-mapped"),
    "fault latency": ("--page-current", "--page-stale", "--fault-missing"),
}
VISIONS = ("none", "protanopia", "deuteranopia", "tritanopia", "achromatopsia")
#: The colours of a picture of squares, as CIE L*a*b*.
LAB = """async ([image, count]) => {
  const bitmap = new Image();
  bitmap.src = `data:image/png;base64,${image}`;
  await bitmap.decode();
  const pen = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height }).getContext("2d");
  pen.drawImage(bitmap, 0, 0);
  const linear = (value) => value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const root = (value) => value > 0.008856 ? Math.cbrt(value) : 7.787 * value + 16 / 116;
  return Array.from({ length: count }, (_, index) => {
    const [r, g, b] = [...pen.getImageData(20 * index + 10, 10, 1, 1).data].map(linear);
    const x = root((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505), y = root(0.2126 * r + 0.7152 * g + 0.0722 * b);
    const z = root((0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089);
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_colours_are_different_for_everybody(browser: Browser, scheme: str) -> None:
    names = list(dict.fromkeys(itertools.chain(*PICTURES.values())))
    squares = "".join(f'<i style="background: var({name})"></i>' for name in names)
    look = "body { margin: 0; display: flex; } i { width: 20px; height: 20px; }"
    async with opened(browser, "about:blank", color_scheme=scheme, viewport={"width": 400, "height": 20}) as watched:
        page = watched.page
        await page.set_content(f"<style>{STYLE.read_text()}\n{look}</style>{squares}")
        decoder = await page.context.new_page()  # sees the picture as it is
        session = await page.context.new_cdp_session(page)
        alike = []
        for vision in VISIONS:
            await session.send("Emulation.setEmulatedVisionDeficiency", {"type": vision})
            picture = base64.b64encode(await page.screenshot()).decode()
            colours = dict(zip(names, await decoder.evaluate(LAB, [picture, len(names)]), strict=True))
            for title, parts in PICTURES.items():
                for one, other in itertools.combinations(parts, 2):
                    distance = sum((a - b) ** 2 for a, b in zip(colours[one], colours[other], strict=True)) ** 0.5
                    if distance < DIFFERENT:
                        alike.append((vision, title, one, other, round(distance, 1)))
    assert not alike, json.dumps(alike, indent=1)
