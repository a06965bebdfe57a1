"""Say what this host has room for: the answer to a source that looks for a place for its guests.

The figures are those of this moment.  A guest that is refused here would be refused as an incoming migration, too; the other
way round, only a migration shows whether the guest can be started.
"""

from __future__ import annotations

from collections.abc import Callable

from migrated import __version__
from migrated.errors import MigratedError
from migrated.memory import memfd
from migrated.protocol.bounds import abort_of
from migrated.protocol.messages import MAX_POOLS, Capacity, Inquire, PagePool, Refusal, Verdict
from migrated.settings import MemoryTable
from migrated.waiting import in_thread


async def capacity(
    inquire: Inquire, admissible: Callable[[str, str], MemoryTable], *, active: int, limit: int
) -> Capacity:
    """Answer the inquiry.  ``admissible`` returns the table of a guest with a driver, or raises why it may not come."""
    memory_bytes, pools = await in_thread(lambda: (memfd.available_bytes(), memfd.pools()))
    return Capacity(
        agent=f"migrated {__version__}",
        memory_bytes=memory_bytes,
        pools=tuple(PagePool(pool.page_bytes, max(0, pool.available)) for pool in pools[:MAX_POOLS]),
        migrations=active,
        max_migrations=limit,
        guests=tuple(_verdict(asked.guest, asked.driver, admissible) for asked in inquire.guests),
    )


def _verdict(guest: str, driver: str, admissible: Callable[[str, str], MemoryTable]) -> Verdict:
    try:
        table = admissible(guest, driver)
    except MigratedError as error:
        told = abort_of(error)
        return Verdict(refusal=Refusal(told.code, told.message, told.hint))
    return Verdict(page_bytes=table.page_size or 0, reserve=table.reserve)
