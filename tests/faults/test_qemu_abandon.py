"""A QEMU guest in post-copy whose source host is gone for good: `abandon` turns its waiting into memory errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.test_qemu import LOAD, hosts, in_postcopy, switch
from tests.guests.conftest import accel, machine, page_pool  # noqa: F401 - fixtures
from tests.rig.guest import MIB, moving_guest
from tests.rig.namespaces import Namespaces, namespaces

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("page_pool"),
]


@pytest.fixture
def link() -> Iterator[Namespaces]:
    with namespaces() as pair:
        yield pair


async def test_an_abandoned_guest_waits_no_longer_and_the_migration_ends(link: Namespaces, accel: str) -> None:  # noqa: F811
    """What the guest makes of the error is up to it.  Under TCG its QEMU ends.

    Under KVM it gets a machine check.  This guest does not handle it and is reset, at which some versions of QEMU end.
    """
    async with moving_guest(kind="boot", accel=accel, load=LOAD, memory_bytes=128 * MIB, hosts=hosts(link)) as guest:
        migration = await in_postcopy(guest)
        target = await guest.there.target()
        switch(link, "down")
        assert (await target.wait(migration, "postcopy-paused", limit_seconds=60))["state"] == "postcopy-paused"
        await target.request("POST", f"/v1/migrations/{migration}/abandon", {"confirm": guest.name})
        record = await target.wait(migration, limit_seconds=60)
        assert record["state"] == "failed"
        assert record["error"]["code"] in {"abandoned", "guest-died"}, record["error"]
        # Nothing is kept for it: a target agent that starts again knows the migration from its records only.
        await guest.there.stop()
        again = await guest.there.target()
        assert (await again.record(migration))["state"] == "failed"
        assert not [event for event in guest.there.events("target") if "recover" in str(event.get("event"))]
