# ruff: noqa: T201 - a program of a user's: this is the example of docs/client.md
"""Migrate a guest: python3 move_guest.py /run/migrated/source vm1 hostb:7440."""

import asyncio
import sys

from migrated.client import Client, MigratedError, StartRequest, State, parse_address, parse_rate


async def move(source: str, guest: str, target: str) -> bool:
    request = StartRequest(guest=guest, to=parse_address(target), max_bandwidth=parse_rate("10Gbit"))
    async with Client(source) as agent:
        migration = await agent.start(request)
        try:
            async with asyncio.timeout(600):
                async for record in agent.events(migration):
                    print(f"{record.state}: {record.remaining_bytes >> 20} MiB left")
        except TimeoutError:
            await agent.abort(migration)
        record = await agent.wait(migration)
    if record.error is not None:
        print(f"{record.error.message} [{record.error.code}]; {record.error.hint}")
    return record.state is State.COMPLETED


try:
    sys.exit(not asyncio.run(move(*sys.argv[1:4])))
except MigratedError as error:
    sys.exit(f"{error.message} [{error.code}]; {error.hint}")
