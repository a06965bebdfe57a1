"""README.md: its figures are those of docs/benchmarks.md, and its links lead somewhere."""

from __future__ import annotations

import re

from tests.documents.blocks import ROOT

README = (ROOT / "README.md").read_text()
SYSTEMS = {"migrated": "migrated", "QEMU pre-copy": "qemu-precopy", "QEMU post-copy": "qemu-postcopy"}


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_each_figure_is_measured() -> None:
    measured = {tuple(row[:4]): row for row in rows((ROOT / "docs" / "benchmarks.md").read_text()) if len(row) == 12}
    path, load, compared = "", "", 0
    for row in rows(README):
        if len(row) == 6 and row[1] in SYSTEMS:
            if row[0]:
                link, load = row[0].replace(" set", "").replace(" writes", "").split(", ")
                path = link.replace(" Gbit/s", "g")
            found = measured["memfd", path, load, SYSTEMS[row[1]]]
            total, downtime, stall, wire = (found[index] for index in (4, 5, 6, 8))
            assert row[2] == total
            assert row[3:] in ([downtime, stall, wire], ["", "", ""]), row
            compared += 1
    assert compared == 12


def test_links_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", README):
        if "://" in target:
            continue
        assert (ROOT / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
