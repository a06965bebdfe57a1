"""What can be done with a migration under way, and what cannot any more."""

from __future__ import annotations

import pytest

from migrated.errors import MigratedError
from tests.integration.place import CRAWL, Guest, Place

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_aborted_guest_runs_on_and_leaves_nothing_there(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    assert here.left_of(guest.name) != []
    aborted = await here.cli("abort", migration)
    assert aborted.code == 0
    waited = await here.cli("wait", migration, "--json")
    assert waited.code == 3
    assert waited.json["state"] == "aborted"
    assert waited.json["error"]["code"] == "aborted"
    assert waited.json["downtime_seconds"] is None
    await guest.assert_sound()
    other = await here.over(migration, "target")
    assert other["state"] == "aborted"
    assert here.left_of(guest.name) == []
    again = await here.start()
    assert (await here.over(again))["state"] == "completed"
    await guest.arrived()


async def test_the_target_may_abort_too(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    assert (await here.cli("abort", migration, agent="target")).code == 0
    waited = await here.cli("wait", migration, "--json")
    assert waited.code == 3
    assert waited.json["error"]["code"] == "aborted"
    assert "on the target" in waited.json["error"]["message"]
    await guest.assert_sound()
    assert (await here.over(migration, "target"))["state"] == "aborted"
    assert here.left_of(guest.name) == []


async def test_a_command_that_waits_ends_as_the_migration_does(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    assert (await here.cli("abort", guest.name)).code == 0
    assert (await here.cli("wait", guest.name, "--quiet")).code == 3
    assert (await here.cli("status", migration)).code == 3


async def test_switchover_ends_precopy(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    assert (await here.cli("switchover", migration)).code == 0
    assert (await here.source.record(migration))["state"] == "precopy"  # after the round under way
    assert (await here.cli("set", migration, "--max-bandwidth", "0")).code == 0
    record = await here.over(migration)
    assert (record["state"], record["round"]) == ("completed", 1)
    await guest.arrived()


async def test_a_new_limit_takes_effect_at_once(here: Place, guest: Guest) -> None:
    """At the first limit the test would take an hour."""
    migration = await here.start(max_bandwidth="4KB")
    await here.until(migration, lambda record: record["state"] == "precopy")
    assert (await here.source.record(migration))["max_bandwidth_bytes_per_second"] == 4000
    changed = await here.cli("set", migration, "--max-bandwidth", "10Gbit", "--downtime-limit", "1000", "--json")
    assert changed.code == 0
    assert changed.json["max_bandwidth_bytes_per_second"] == 1_250_000_000
    assert (await here.over(migration))["state"] == "completed"
    await guest.arrived()


async def test_the_drain_has_a_limit_of_its_own(here: Place, guest: Guest) -> None:
    migration = await here.start(mode="postcopy", drain_bandwidth=CRAWL)
    paused = await here.until(migration, lambda record: record["state"] == "postcopy")
    assert paused["stale_pages"] > 0
    await guest.arrived()  # all of its memory, by demand, which does not wait for the drain
    assert (await here.over(migration))["state"] == "completed"
    other = await here.over(migration, "target")
    assert other["faults"]["stale"] > 0


async def test_after_commit_it_cannot_be_aborted(here: Place) -> None:
    guest = await here.guest("idle")
    migration = await here.start("idle", mode="postcopy", drain_bandwidth=CRAWL)
    await here.until(migration, lambda record: record["state"] == "postcopy")
    for agent in ("source", "target"):
        refused = await here.cli("abort", migration, "--json", agent=agent)
        assert refused.code == 2
        assert refused.json["error"]["code"] == "conflict"
        assert refused.json["error"]["state"] == "postcopy"
        assert refused.json["error"]["hint"]
    for verb in ("switchover", "resume"):
        with pytest.raises(MigratedError, match=r"is postcopy") as caught:
            await here.source.request("POST", f"/v1/migrations/{migration}/{verb}", {})
        assert caught.value.code == "conflict"
    with pytest.raises(MigratedError, match="only a paused post-copy can be abandoned"):
        await here.target.request("POST", f"/v1/migrations/{migration}/abandon", {"confirm": guest.name})
    assert (await here.cli("set", migration, "--drain-bandwidth", "0")).code == 0
    assert (await here.over(migration))["state"] == "completed"
    await guest.arrived()
    for verb, body in (("abort", {}), ("set", {"max_bandwidth": "1GB"})):
        with pytest.raises(MigratedError) as caught:
            await here.source.request("POST", f"/v1/migrations/{migration}/{verb}", body)
        assert caught.value.code == "conflict"


@pytest.mark.parametrize("verb", ["abort", "status", "wait"])
async def test_no_verb_fits_what_is_not_there(here: Place, verb: str) -> None:
    assert (await here.cli(verb, "ffffffffffff")).code == 2


async def test_a_change_that_makes_no_sense_changes_nothing(here: Place, guest: Guest) -> None:
    migration = await here.precopying()
    before = (await here.source.record(migration))["max_bandwidth_bytes_per_second"]
    assert (await here.cli("set", migration, "--max-bandwidth", "1GB", "--max-rounds", "5000")).code == 2
    assert (await here.source.record(migration))["max_bandwidth_bytes_per_second"] == before
    assert (await here.cli("abort", migration)).code == 0
    await here.over(migration)
    await guest.assert_sound()


async def test_a_plan_asks_both_agents_and_touches_nothing(here: Place, guest: Guest) -> None:
    asked = await here.cli("plan", guest.name, "--to", here.address)
    assert asked.code == 0, asked
    assert f"{guest.name} can be migrated to {here.address}" in asked.out
    assert here.left_of(guest.name) == []
    refused = await here.cli("plan", "nobody", "--to", here.address)  # configured, but not running
    assert refused.code in (1, 2), refused
    assert "nobody" in refused.err
    silent = await here.cli("plan", guest.name, "--to", "127.0.0.1:1")
    assert silent.code == 1, silent
    assert "127.0.0.1:1" in silent.err
    await guest.assert_sound()
