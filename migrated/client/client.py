"""`Client`: a method for each request of the control API and of the status site."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self, TypeAlias

from migrated.agent.answers import (
    AgentChange,
    AgentStatus,
    Healthy,
    LogAnswer,
    MigrationList,
    PageMapAnswer,
    Ready,
)
from migrated.agent.evacuation import Evacuation, EvacuationList
from migrated.agent.record import Record
from migrated.agent.requests import (
    ConfirmRequest,
    EvacuateRequest,
    GuestList,
    ResumeRequest,
    SetRequest,
    StartRequest,
)
from migrated.agent.series import Series
from migrated.client.connection import Connection, decode, default_agent
from migrated.errors import ConfigError, ConnectionLostError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator
    from types import TracebackType

    from migrated.address import Address
    from migrated.log_lines import Line
    from migrated.memory.page_map import PageMap
    from migrated.settings import Table

#: A migration is named by its record, its id, a unique prefix of that, or a guest (its newest migration).
Migration: TypeAlias = Record | str


class Client:
    """One agent: an asynchronous context manager.  docs/client.md has an example.

    Methods raise RemoteError, NoAgentError and ConnectionLostError; see `migrated.client.errors`.
    """

    def __init__(self, agent: str | os.PathLike[str] | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        """Name the agent by its state directory, its control socket, or a URL.

        By default it is the source agent of this host, else the target agent.  ``tls`` is for ``https://``; by default it
        uses the files in MIGRATED_TLS_DIR or /etc/migrated/tls.  Raises ConfigError.
        """
        self._agent = Connection(os.fspath(agent) if agent else default_agent(), tls)

    async def __aenter__(self) -> Self:
        self._agent.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._agent.close()

    # ------------------------------------------------------------ the agent

    async def about(self) -> AgentStatus:
        """Return who the agent is, its health, and its active migrations."""
        return await self._agent.call("GET", "/v1/agent", AgentStatus)

    async def guests(self) -> GuestList:
        """Return the guests of the agent's host that can be migrated, and why the others cannot.  Source only."""
        return await self._agent.call("GET", "/v1/guests", GuestList)

    async def changes(self) -> AsyncGenerator[AgentChange | Record, None]:
        """Yield the agent and every record, then each of them when it has changed, until the agent stops."""
        async with contextlib.aclosing(self._agent.stream("/v1/events")) as events:
            async for kind, data in events:
                if kind == "agent":
                    yield decode(data, AgentChange)
                elif kind == "record":
                    yield decode(data, Record)

    async def openapi(self) -> dict[str, object]:
        """Return the description of the API that the agent serves here, in OpenAPI 3.1."""
        return await self._agent.call("GET", "/v1/openapi.json", dict[str, object])

    async def status(self) -> AgentStatus:
        """Return the same as `about`, with all migrations.  Status site only."""
        return await self._agent.call("GET", "/status", AgentStatus)

    async def health(self) -> Healthy:
        """Return whether the agent works.  Status site only."""
        return await self._agent.call("GET", "/healthz", Healthy, statuses=(200, 503))

    async def readiness(self) -> Ready:
        """Return whether the agent accepts migrations.  Status site only."""
        return await self._agent.call("GET", "/readyz", Ready, statuses=(200, 503))

    # ------------------------------------------------------------ migrations

    async def migrations(self, *, ended: bool = True) -> list[Record]:
        """Return all migrations, oldest first; ``ended=False``: only active ones."""
        path = f"/v1/migrations?ended={'true' if ended else 'false'}"
        return (await self._agent.call("GET", path, MigrationList)).migrations

    async def migration(self, migration: Migration) -> Record:
        """Return the record as it is now."""
        return await self._agent.call("GET", _path(migration), Record)

    async def series(self, migration: Migration) -> Series:
        """Return the migration's figures over time."""
        return await self._agent.call("GET", f"{_path(migration)}/series", Series)

    async def page_map(self, migration: Migration) -> PageMap | None:
        """Return the migration's page map, if there is one."""
        return (await self._agent.call("GET", f"{_path(migration)}/map", PageMapAnswer)).map

    async def log(self, migration: Migration) -> list[Line]:
        """Return the lines of the agent's log that name the migration."""
        return (await self._agent.call("GET", f"{_path(migration)}/log", LogAnswer)).log

    async def start(self, request: StartRequest) -> Record:
        """Start a migration."""
        return await self._agent.call("POST", "/v1/migrations", Record, request)

    async def events(self, migration: Migration) -> AsyncGenerator[Record, None]:
        """Yield the record, now and at each change.  The last one is that of the migration's end.

        Raises ConnectionLostError with the code ``agent-stopped`` if the agent stops before.
        """
        record: Record | None = None
        async with contextlib.aclosing(self._agent.stream(f"{_path(migration)}/events")) as events:
            async for _, data in events:
                record = decode(data, Record)
                yield record
        if record is None or not record.ended:  # the stream may end before the agent sends its last event
            record = await self.migration(record or migration)
            if not record.ended:
                message = f"the agent stopped while migration {record.id} was in state {record.state.value}"
                hint = "start the agent again; guests are safe meanwhile"
                raise ConnectionLostError(message, code="agent-stopped", hint=hint)
            yield record

    async def wait(self, migration: Migration) -> Record:
        """Wait until the migration has ended, however; return its record.  Raises as `events` does."""
        async with contextlib.aclosing(self.events(migration)) as records:
            return await anext(record async for record in records if record.ended)

    async def abort(self, migration: Migration) -> Record:
        """Abort it before the switchover; the guest runs on at its source."""
        return await self._verb(migration, "abort")

    async def switchover(self, migration: Migration) -> Record:
        """End pre-copy after the current round."""
        return await self._verb(migration, "switchover")

    async def resume(self, migration: Migration, *, to: Address | None = None) -> Record:
        """Reconnect a paused post-copy now.  ``to``: where the target agent listens, if it has moved."""
        return await self._verb(migration, "resume", ResumeRequest(to=to))

    async def set(self, migration: Migration, limits: SetRequest) -> Record:
        """Change the limits of an active migration."""
        return await self._verb(migration, "set", limits)

    async def abandon(self, migration: Migration, *, confirm: str) -> Record:
        """Give up a source that is lost for good: the memory it had not sent is LOST.  ``confirm``: the guest's name."""
        return await self._verb(migration, "abandon", ConfirmRequest(confirm=confirm))

    async def force_run(self, migration: Migration, *, confirm: str) -> Record:
        """Run the guest on the agent's host because the other host is gone for good.  ``confirm``: the guest's name.

        If the guest runs on the other host, it runs twice and destroys its disks.
        """
        return await self._verb(migration, "force-run", ConfirmRequest(confirm=confirm))

    async def discard(self, migration: Migration, *, confirm: str) -> Record:
        """End what is left of the guest on the agent's host; its memory there is LOST.  ``confirm``: the guest's name."""
        return await self._verb(migration, "discard", ConfirmRequest(confirm=confirm))

    async def _verb(self, migration: Migration, verb: str, body: Table | None = None) -> Record:
        return await self._agent.call("POST", f"{_path(migration)}/{verb}", Record, body)

    # ------------------------------------------------------------ evacuations

    async def evacuate(self, request: EvacuateRequest) -> Evacuation:
        """Begin an evacuation; a dry run returns the plan."""
        return await self._agent.call("POST", "/v1/evacuations", Evacuation, request)

    async def evacuations(self) -> list[Evacuation]:
        """Return the evacuations that the agent remembers, oldest first."""
        return (await self._agent.call("GET", "/v1/evacuations", EvacuationList)).evacuations

    async def evacuation(self, evacuation: Evacuation | str) -> Evacuation:
        """Return the evacuation as it is now."""
        return await self._agent.call("GET", _path_of_evacuation(evacuation), Evacuation)

    async def abort_evacuation(self, evacuation: Evacuation | str) -> Evacuation:
        """Start nothing further, and abort what can be aborted."""
        return await self._agent.call("POST", f"{_path_of_evacuation(evacuation)}/abort", Evacuation)


def _path(migration: Migration) -> str:
    name = migration if isinstance(migration, str) else migration.id
    if not _is_name(name):
        message = f"{name!r} is neither an id nor a guest's name"
        raise ConfigError(message, hint="`migrated list` shows both")
    return f"/v1/migrations/{name}"


def _path_of_evacuation(evacuation: Evacuation | str) -> str:
    name = evacuation if isinstance(evacuation, str) else evacuation.id
    if not _is_name(name):
        raise ConfigError(
            f"{name!r} is not an id", hint="`migrated evacuate --status` shows that of the last evacuation"
        )
    return f"/v1/evacuations/{name}"


def _is_name(text: str) -> bool:
    return bool(text) and all(sign.isascii() and (sign.isalnum() or sign in "._-") for sign in text)
