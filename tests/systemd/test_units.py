"""The agents under a real systemd: guests arrive, and whatever happens to an agent, they survive it."""

from __future__ import annotations

import pytest

from tests.systemd.conftest import MakeGuest

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(400),  # the first one may make a Debian tree
]


async def test_a_qemu_guest_moves_between_units_there_and_back(unit_guest: MakeGuest) -> None:
    async with unit_guest() as guest:
        await guest.move()
        await guest.move()
