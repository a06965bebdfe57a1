"""``migrated report`` and ``migrated logs``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from migrated.agent.history import Kept
from migrated.agent.requests import StartRequest
from migrated.agent.series import Series
from migrated.log_lines import Line
from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]

START = StartRequest.model_validate({"guest": "vm1", "to": "b:1"})


async def test_a_report_is_one_page_that_needs_nothing_else(source: Served, tmp_path: Path) -> None:
    record = await source.agent.start(START)
    record.guest = "</script><script>alert(1)//"
    source.agent.kept[record.id] = Kept(series=Series(at=[1.0, 2.0]))
    path = tmp_path / "report.html"
    code, out, err = await source.cli("report", record.id, "-o", str(path))
    assert (code, out, err) == (0, f"{path}\n", "")
    page = path.read_text()
    assert not re.search(r"""\s(src|href)=["']""", page.partition("<script>")[0])
    assert "default-src &#x27;none&#x27;" in page
    assert page.count("</script>") == 7  # six scripts and the data, whatever the guest is called
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["record"]["guest"] == record.guest
    code, out, _ = await source.cli("report", record.id, "-o", "-")
    assert (code, out) == (0, page)


async def test_a_report_that_cannot_be_written_says_where(source: Served) -> None:
    await source.agent.start(START)
    code, _, err = await source.cli("report", "vm1", "-o", "/nonexistent/report.html")
    assert code == 1
    assert "cannot write /nonexistent/report.html: No such file or directory" in err


async def test_logs_are_lines_for_people_or_an_object(source: Served) -> None:
    record = await source.agent.start(START)
    source.agent.kept[record.id] = Kept(log=[Line(0.0, "warning", "engine\x1b[31m", {"stream": "1"})])
    code, out, _ = await source.cli("logs", "vm1")
    assert code == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} warning engine\\x1b\[31m  stream=1\n", out)
    code, out, _ = await source.cli("logs", "vm1", "--json")
    assert json.loads(out)["log"][0]["event"] == "engine\x1b[31m"
