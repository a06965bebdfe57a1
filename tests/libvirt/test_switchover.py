"""Somebody is killed in the middle of a domain's switchover: an agent or a libvirtd, on either host.

Before COMMIT the domain runs on at its source, after COMMIT it runs on the target, and both libvirts know it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from migrated.protocol.preamble import Purpose
from migrated.waiting import within
from tests.faults.proxy import DOWN, UP, Gate, Proxy
from tests.libvirt.conftest import Domains
from tests.rig.host import Host
from tests.rig.moving_domain import MovingDomain

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.asyncio(loop_scope="module"),
]

CONFIG: dict[str, Any] = {"timeouts": {"reconnect_interval": 0.1, "reconnect_interval_limit": 0.5}}
LIMIT_SECONDS = 60.0
AGENTS = ("source agent", "target agent")
VICTIMS = (*AGENTS, "source's libvirtd", "target's libvirtd")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def domain(domains: Domains) -> AsyncIterator[MovingDomain]:
    """One for all: it survives every test, here or there."""
    async with domains(config=CONFIG) as domain:
        await domain.libvirt.virsh("autostart", domain.name)
        yield domain


@contextlib.asynccontextmanager
async def proxy_to(host: Host) -> AsyncIterator[Proxy]:
    """What the source takes for the target."""
    address, _, port = host.address.rpartition(":")
    async with Proxy((address, int(port))).listening() as proxy:
        yield proxy


async def stopped_at(domain: MovingDomain, proxy: Proxy, gate: Gate, **options: Any) -> str:
    """A migration that waits there; its id."""
    proxy.expect(gate)
    migration = await domain.begin(to=proxy.address, mode="postcopy", **options)
    async with within(LIMIT_SECONDS, f"{gate.tag} to be reached"):
        await gate.reached.wait()
    return migration


async def kill(domain: MovingDomain, victim: str) -> None:
    """SIGKILL it."""
    match victim:
        case "source agent":
            await (await domain.here.source()).kill()
        case "target agent":
            domain.expected.add("cannot continue a migration of the previous agent")
            await (await domain.there.target()).kill()
        case "source's libvirtd":
            await domain.libvirt.kill()
        case _:
            await domain.other_libvirt.kill()


async def start_again(domain: MovingDomain, victim: str) -> None:
    """As a service manager does."""
    match victim:
        case "source agent":
            await domain.here.source()
        case "target agent":
            await domain.there.target()
        case "source's libvirtd":
            await domain.libvirt.start()
        case _:
            await domain.other_libvirt.start()


async def logged(domain: MovingDomain, event: str, migration: str) -> None:
    """Until the source agent has logged it."""
    async with within(LIMIT_SECONDS, f"the source to log {event!r}"):
        while not any(  # noqa: ASYNC110 - a log tells nobody
            line["event"] == event and line.get("migration") == migration for line in domain.here.events("source")
        ):
            await asyncio.sleep(0.02)


async def starts_by_itself(domain: MovingDomain) -> bool:
    return "Autostart:      enable" in await domain.libvirt.virsh("dominfo", domain.name)


@pytest.mark.parametrize("victim", VICTIMS)
async def test_what_is_killed_before_commit_leaves_the_domain_running_at_its_source(
    victim: str, domain: MovingDomain
) -> None:
    async with proxy_to(domain.there) as proxy:
        for gate in (Gate(UP, "state-end"), Gate(DOWN, "loaded")):
            before = await domain.console.stats()
            migration = await stopped_at(domain, proxy, gate)
            assert (await domain.states())[0] == "paused"
            assert not await starts_by_itself(domain)
            await kill(domain, victim)
            proxy.cut(purposes=(Purpose.CONTROL,))
            gate.release(drop=True)
            if victim != "source agent":
                await logged(domain, "migration failed, rolling back", migration)
            await start_again(domain, victim)
            for agent in (await domain.here.source(), await domain.there.target()):
                record = await agent.wait(migration, limit_seconds=LIMIT_SECONDS)
                assert record["state"] in {"failed", "aborted"}, domain.explain(record)
                assert record["error"]["code"] != "guest-not-resumed", domain.explain(record)
            async with within(LIMIT_SECONDS, "both libvirts to have the domain here alone"):
                while await domain.states() not in {("running", "none"), ("running", "shut off")}:  # noqa: ASYNC110 - virsh is asked
                    await asyncio.sleep(0.05)
            await domain.alone()
            assert await starts_by_itself(domain)
            await domain.assert_sound(before)


@pytest.mark.parametrize("victim", VICTIMS)
async def test_what_is_killed_after_commit_lets_the_domain_arrive(victim: str, domain: MovingDomain) -> None:
    for gate in (Gate(UP, "commit"), Gate(DOWN, "running")):
        before = await domain.console.stats()
        async with proxy_to(domain.there) as proxy:
            migration = await stopped_at(domain, proxy, gate, undefine_source=True)
            await kill(domain, victim)
            gate.release(drop=victim in AGENTS)
            await start_again(domain, victim)
            moved = await domain.arrive(migration)
        assert await domain.states() == ("running", "none"), domain.explain(moved.source)
        assert await starts_by_itself(domain)
        await domain.assert_sound(before)


#: libvirtd runs it whenever a domain changes; it ends the process that the test names.
HOOK = """\
#!/bin/sh
[ "$2" = stopped ] && [ -e {victim} ] && kill -KILL "$(cat {victim})"
exit 0
"""


async def test_a_source_agent_killed_while_libvirt_ends_the_domain_leaves_no_definition(domain: MovingDomain) -> None:
    """libvirt finishes the call that the agent made last; what the agent would have called next, nobody does."""
    before = await domain.console.stats()
    libvirt = domain.libvirt
    victim, hook = libvirt.directory / "victim", libvirt.directory / "etc" / "hooks" / "qemu"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(HOOK.format(victim=victim))
    hook.chmod(0o755)
    await libvirt.terminate()  # it looks for hooks when it starts
    await libvirt.start()
    async with proxy_to(domain.there) as proxy:
        migration = await stopped_at(domain, proxy, gate := Gate(DOWN, "running"), undefine_source=True)
        source = await domain.here.source()
        assert source.process is not None
        victim.write_text(str(source.pid))
        gate.release()
        async with within(LIMIT_SECONDS, "the hook to end the source agent"):
            await source.process.wait()
        victim.unlink()
        await source.kill()
        await domain.arrive(migration)
    hook.unlink()
    assert await domain.states() == ("running", "none")
    assert await starts_by_itself(domain)
    await domain.assert_sound(before)
