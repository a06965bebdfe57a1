"""The agents under a real systemd: guests arrive, and whatever happens to an agent, they survive it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.systemd.conftest import MakeGuest
from tests.systemd.units import UnitGuest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(400),  # the first one may make a Debian tree
]

ROLES = ["source", "target"]
PATIENCE_SECONDS = 60


class PostCopy:
    """A guest that has just been switched over to the second machine, and most of its memory has not."""

    def __init__(self, guest: UnitGuest, migration: str) -> None:
        self.migration = migration
        self.source, self.target = guest.source, guest.target

    async def lacking(self) -> int:
        """Bytes that are still to come."""
        return int((await self.target.record(self.migration))["remaining_bytes"])

    async def hurry(self) -> None:
        """Let the rest come."""
        await self.source.wait(self.migration, "postcopy")
        await self.source.request("POST", f"/v1/migrations/{self.migration}/set", {"drain_bandwidth": "0"})


@contextlib.asynccontextmanager
async def post_copy(unit_guest: MakeGuest) -> AsyncIterator[PostCopy]:
    """At the end of the block the rest comes, and the guest's memory is checked."""
    async with unit_guest() as guest:
        before = await guest.console.stats()
        migration = await guest.begin(mode="postcopy", drain_bandwidth="1MB")
        await guest.source.wait(migration, "postcopy")
        await guest.target.wait(migration, "postcopy")
        state = PostCopy(guest, migration)
        assert await state.lacking() > 0
        yield state
        await state.hurry()
        await guest.arrive(migration)
        await guest.assert_sound(before)


async def test_a_qemu_guest_moves_between_units_there_and_back(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        await guest.move()
        await guest.move()


async def test_no_agent_is_under_seccomp(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        for agent in (guest.source, guest.target):
            await agent.start()
            assert "Seccomp:\t0" in agent.machine.path(f"/proc/{agent.pid}/status").read_text()


@pytest.mark.parametrize("role", ROLES)
async def test_a_killed_agent_has_its_descriptors_back_from_the_store(unit_guest: MakeGuest, role: str) -> None:
    async with post_copy(unit_guest) as state:
        agent = state.source if role == "source" else state.target
        former = agent.pid
        assert int(agent.show("NFileDescriptorStore")) > 0
        await agent.kill()
        await agent.restarted(former)
        assert await state.lacking() > 0
        for machine in (state.source.machine, state.target.machine):
            assert not [line for line in machine.processes().values() if "migrated.holder" in line]
    assert int(agent.show("NFileDescriptorStore")) == 0
