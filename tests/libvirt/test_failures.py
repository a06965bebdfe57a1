"""Whatever goes wrong with a domain's migration, the domain is in one place, and virsh says in which."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from migrated.waiting import within
from tests.libvirt.conftest import Domains
from tests.rig.guest import MIB
from tests.rig.libvirt_host import domain_xml
from tests.rig.moving_domain import MovingDomain
from tests.rig.pages import pool_full

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.asyncio(loop_scope="module"),
]

#: So slow that a domain stays in pre-copy, or in post-copy, for as long as a test wants it to.
SLOWLY = "1MB"
GONE_SECONDS = 30


async def reaches(domain: MovingDomain, migration: str, state: str) -> None:
    """Wait until the migration is in this state."""
    record = await (await domain.here.source()).wait(migration, state)
    assert record["state"] == state, domain.explain(record)


@contextlib.asynccontextmanager
async def in_precopy(domain: MovingDomain) -> AsyncIterator[str]:
    """In the middle of pre-copy; afterwards the domain runs where it did, and nothing of it is left on the other libvirt."""
    before = await domain.console.stats()
    migration = await domain.begin(mode="hybrid", max_bandwidth=SLOWLY)
    target = await domain.there.target()
    await reaches(domain, migration, "precopy")
    async with within(20, "pages to arrive"):
        while (await target.record(migration))["transferred_bytes"] < MIB:  # noqa: ASYNC110 - the target tells nobody
            await asyncio.sleep(0.05)
    assert await domain.states() == ("running", "paused")
    yield migration
    await stays(domain)
    await domain.alone()
    await domain.assert_sound(before)


async def stays(domain: MovingDomain) -> None:
    """Wait until virsh says that the domain runs here and not there."""
    async with within(GONE_SECONDS, "both libvirts to have the domain here alone"):
        while (states := await domain.states())[0] != "running" or states[1] not in {"none", "shut off"}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------- refusals, and a domain that ends


async def test_another_domain_of_that_name_is_left_alone(domains: Domains) -> None:
    async with domains() as domain:
        other = domain_xml(domain.directory, domain.name, 64 * MIB)
        path = domain.other_libvirt.directory / "other.xml"
        path.write_text(other)
        await domain.other_libvirt.virsh("define", str(path))
        uuid = await domain.other_libvirt.virsh("domuuid", domain.name)
        record = await domain.fail()
        assert record["error"]["code"] == "guest-exists"
        assert await domain.other_libvirt.virsh("domuuid", domain.name) == uuid
        assert await domain.states() == ("running", "shut off")


async def test_a_device_whose_state_would_be_lost_is_refused_by_name(domains: Domains) -> None:
    shared = "<shmem name='window'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>"
    async with domains(devices=shared) as domain:
        record = await domain.fail()
        assert record["error"]["code"] == "unsupported-device"
        assert "memory shared with others" in record["error"]["message"]


async def test_a_host_without_free_huge_pages_is_refused_by_name(domains: Domains) -> None:
    async with domains() as domain:
        with pool_full(2 * MIB):
            record = await domain.fail()
            assert record["error"]["code"] == "no-huge-pages", record["error"]
            assert "nr_hugepages" in record["error"]["hint"]
            assert await domain.states() == ("running", "none")
        await domain.move(downtime_limit_ms=2000)


async def test_a_domain_that_was_given_away_does_not_start_again_by_itself(domains: Domains) -> None:
    """A reboot of the source's host in post-copy would start it there while it runs elsewhere."""
    async with domains(persistent=True) as domain:
        await domain.libvirt.virsh("autostart", domain.name)
        async with in_precopy(domain) as migration:
            await (await domain.here.source()).kill()
            await (await domain.here.source()).wait(migration)
        assert "Autostart:      enable" in await domain.libvirt.virsh("dominfo", domain.name)
        migration = await domain.begin(mode="postcopy", drain_bandwidth=SLOWLY)
        source = await domain.here.source()
        await reaches(domain, migration, "postcopy")
        assert "Autostart:      disable" in await domain.libvirt.virsh("dominfo", domain.name)
        await source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0"})
        await domain.arrive(migration)
        assert "Autostart:      enable" in await domain.libvirt.virsh("dominfo", domain.name)


async def test_a_domain_that_is_destroyed_while_it_leaves_is_gone(domains: Domains) -> None:
    async with domains() as domain:
        migration = await domain.begin(mode="hybrid", max_bandwidth=SLOWLY)
        source, target = await domain.here.source(), await domain.there.target()
        await reaches(domain, migration, "precopy")
        await domain.libvirt.virsh("destroy", domain.name)
        assert (await source.wait(migration))["state"] in {"aborted", "failed"}
        assert (await target.wait(migration))["state"] in {"aborted", "failed"}
        async with within(GONE_SECONDS, "the domain to be gone"):
            while await domain.states() != ("shut off", "none") or domain.pids:  # noqa: ASYNC110 - libvirt tells virsh
                await asyncio.sleep(0.05)


# ---------------------------------------------------------------- one domain for all: it survives, here or there


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def domain(domains: Domains) -> AsyncIterator[MovingDomain]:
    """One for the rest of this file: on one host there is room for one domain at a time."""
    async with domains() as domain:
        yield domain


async def test_an_abort_leaves_the_domain_running_on_the_source(domain: MovingDomain) -> None:
    for side in ("source", "target"):
        async with in_precopy(domain) as migration:
            source, target = await domain.here.source(), await domain.there.target()
            agent = source if side == "source" else target
            await agent.request("POST", f"/v1/migrations/{migration}/abort")
            assert (await source.wait(migration))["state"] in {"aborted", "failed"}
            assert (await target.wait(migration))["state"] in {"aborted", "failed"}
    await domain.move(downtime_limit_ms=2000)


async def test_a_source_agent_that_is_killed_in_precopy_leaves_the_domain_running(domain: MovingDomain) -> None:
    async with in_precopy(domain) as migration:
        await (await domain.here.source()).kill()
        source = await domain.here.source()
        record = await source.wait(migration)  # it has been taken back
        assert (record["state"], record["error"]["code"]) == ("failed", "agent-restarted")


async def test_a_target_agent_that_is_killed_in_precopy_leaves_nothing(domain: MovingDomain) -> None:
    async with in_precopy(domain) as migration:
        await (await domain.there.target()).kill()
        record = await (await domain.here.source()).wait(migration)
        assert record["state"] in {"aborted", "failed"}
        domain.expected.add("cannot continue a migration of the previous agent")
        await domain.there.target()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_an_agent_that_is_killed_in_postcopy_is_followed_by_one_that_goes_on(
    side: str, domain: MovingDomain
) -> None:
    before = await domain.console.stats()
    migration = await domain.begin(mode="postcopy", drain_bandwidth=SLOWLY)
    source, target = await domain.here.source(), await domain.there.target()
    await reaches(domain, migration, "postcopy")
    await (source if side == "source" else target).kill()
    source, target = await domain.here.source(), await domain.there.target()
    async with within(GONE_SECONDS, "the migration to be taken up again"):
        while (await source.record(migration))["state"] not in {"postcopy", "completed"}:  # noqa: ASYNC110 - two agents
            await asyncio.sleep(0.05)
    with contextlib.suppress(Exception):  # it may be over
        await source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0"})
    await domain.arrive(migration)
    assert await domain.states() == ("running", "shut off")
    await domain.assert_sound(before)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_libvirtd_that_is_killed_in_precopy_leaves_the_domain_running_on_the_source(
    side: str, domain: MovingDomain
) -> None:
    async with in_precopy(domain) as migration:
        libvirt = domain.libvirt if side == "source" else domain.other_libvirt
        await libvirt.kill()
        await libvirt.start()
        source = await domain.here.source()
        with contextlib.suppress(Exception):  # it may be over
            await source.request("POST", f"/v1/migrations/{migration}/abort")
        assert (await source.wait(migration))["state"] in {"aborted", "failed"}


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_libvirtd_that_is_killed_in_postcopy_finds_the_domain_where_it_is(
    side: str, domain: MovingDomain
) -> None:
    before = await domain.console.stats()
    migration = await domain.begin(mode="postcopy", drain_bandwidth=SLOWLY)
    source = await domain.here.source()
    await reaches(domain, migration, "postcopy")
    libvirt = domain.libvirt if side == "source" else domain.other_libvirt
    await libvirt.kill()
    await libvirt.start()
    await source.request("POST", f"/v1/migrations/{migration}/set", {"drain_bandwidth": "0"})
    await domain.arrive(migration)
    assert await domain.states() == ("running", "shut off")
    await domain.assert_sound(before)


async def test_a_domain_that_is_destroyed_while_it_arrives_runs_on_at_the_source(domain: MovingDomain) -> None:
    async with in_precopy(domain) as migration:
        await domain.other_libvirt.virsh("destroy", domain.name)
        assert (await (await domain.here.source()).wait(migration))["state"] in {"aborted", "failed"}


async def test_nobody_can_run_a_domain_that_is_still_arriving(domain: MovingDomain) -> None:
    async with in_precopy(domain) as migration:
        running = asyncio.ensure_future(domain.other_libvirt.fails("resume", domain.name))
        await domain.console.stats()
        assert await domain.states() == ("running", "paused")
        source = await domain.here.source()
        await source.request("POST", f"/v1/migrations/{migration}/abort")
        assert (await source.wait(migration))["state"] in {"aborted", "failed"}
        await running
