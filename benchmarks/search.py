"""Measure the search of a demanded page of 1 GiB with 1, 2, 4 and 8 threads: search_page.c."""

from __future__ import annotations

import asyncio
import json

from benchmarks.figures import build
from benchmarks.pool import warm_pages
from benchmarks.report import Section
from benchmarks.sample import median
from benchmarks.settings import MIB, Settings
from migrated.errors import HostError

GIB = 1 << 30
LIMIT_SECONDS = 300


async def run(settings: Settings) -> Section:
    """Measure the source's engine alone, on a page that is reported as a whole and of which 1 % has changed."""
    section = Section(
        "search",
        "A demanded page of 1 GiB, the source's engine alone",
        ("threads", "demanded", "longest"),
        notes=[
            (
                f"1 % of its blocks changed, 2 MiB pages on the source; medians of {settings.runs} runs, in milliseconds. "
                "Demanded: from the demand until all of the page is written to the connection, whose other end discards it."
            )
        ],
    )
    program = await asyncio.to_thread(build, settings.output, "search_page")
    with warm_pages(GIB, 2 * MIB):
        process = await asyncio.create_subprocess_exec(str(program), str(settings.runs), stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), LIMIT_SECONDS)
    if process.returncode:
        raise HostError(f"{program} failed with status {process.returncode}")
    for threads, milliseconds in json.loads(output).items():
        seconds = {kind: [one / 1e3 for one in runs] for kind, runs in milliseconds.items()}
        section.rows.append((threads, f"{median(milliseconds['demand']):.1f}", f"{max(milliseconds['demand']):.1f}"))
        section.data.append({"threads": int(threads), **seconds})
    settings.save(section)
    return section
