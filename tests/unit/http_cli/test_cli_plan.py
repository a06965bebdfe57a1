"""``migrated plan``: what the agents say about one guest, before anything is touched."""

from __future__ import annotations

import json

from tests.unit.http_cli.served import Served

pytest_plugins = ["tests.unit.http_cli.served_fixtures"]


async def test_a_plan_says_what_the_guest_needs_and_what_the_target_has(source: Served) -> None:
    code, out, err = await source.cli("plan", "vm1", "--to", "b:7440")
    assert (code, err, source.agent.all, source.agent.evacuated) == (0, "", [], [])
    assert "vm1 can be migrated to b:7440: it needs 1 GiB in pages of 2 MiB" in out
    assert "b:7440 has 4 GiB of memory, 512 pages of 2 MiB available, and runs 0 of at most 8 migrations" in out
    code, out, _ = await source.cli("plan", "vm1", "--to", "b:7440", "--json")
    assert (code, json.loads(out)["guest"]["target"]) == (0, "b:7440")


async def test_a_guest_that_cannot_be_migrated_is_an_error_with_its_reason(source: Served) -> None:
    code, out, err = await source.cli("plan", "other", "--to", "b:7440")
    assert (code, out) == (1, "")
    assert err == "error: guest other has a job at work: backup\n  hint: wait for it\n"
    code, _, err = await source.cli("plan", "nobody", "--to", "b:7440")
    assert code == 2
    assert "no guest 'nobody' runs here" in err
