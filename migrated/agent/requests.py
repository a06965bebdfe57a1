"""What an agent offers to the HTTP side and the CLI: both agents implement `Agent`; nothing there knows more of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from migrated.agent.record import Record


class StartRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/migrations``; ``None``: take the configuration's default."""

    guest: str
    to: str  # HOST:PORT
    mode: str | None = None
    downtime_limit_ms: float | None = None
    max_rounds: int | None = None
    streams: int | None = None
    max_bandwidth: str | None = None  # "0", "10Gbit", "500MB" (a second)
    drain_bandwidth: str | None = None
    compression: str | None = None  # "off", "zstd"


class SetRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/migrations/ID/set``: what may change while running."""

    max_bandwidth: str | None = None
    drain_bandwidth: str | None = None
    downtime_limit_ms: float | None = None
    max_rounds: int | None = None


class Health(msgspec.Struct, kw_only=True):
    """``healthy``: the process does its work (fault threads turn); ``ready``: it can take a migration; why not."""

    healthy: bool
    ready: bool
    reasons: list[str] = msgspec.field(default_factory=list)


class Agent(Protocol):
    """The verbs.  Errors: NotFoundError, ConflictError, ConfigError and what the work itself raises."""

    role: str  # "source" | "target"

    def guests(self) -> list[str]: ...

    def records(self, *, ended: bool = True) -> list[Record]:
        """All migrations, oldest first, with fresh figures; ended=False leaves out those that are over."""
        ...

    def record(self, migration_id: str) -> Record:
        """By id, a unique prefix of it, or the guest's name (its newest); NotFoundError."""
        ...

    async def start(self, request: StartRequest) -> Record:
        """Check what can be checked at once, start in the background (source only; ConflictError on a target)."""
        ...

    async def abort(self, migration_id: str) -> Record: ...

    async def switchover(self, migration_id: str) -> Record:
        """End pre-copy now."""
        ...

    async def resume(self, migration_id: str, to: str | None = None) -> Record:
        """Reconnect a paused post-copy now, perhaps at a new address."""
        ...

    async def abandon(self, migration_id: str, *, confirm: str) -> Record:
        """Post-copy whose source is lost: poison what is missing.  confirm must be the guest's name."""
        ...

    async def force_run(self, migration_id: str, *, confirm: str) -> Record:
        """The other host is gone and took the word on COMMIT with it: run the guest here.  confirm must be its name."""
        ...

    async def discard(self, migration_id: str, *, confirm: str) -> Record:
        """The guest is not to run here: end what is left of it on this host.  confirm must be its name."""
        ...

    async def set(self, migration_id: str, request: SetRequest) -> Record: ...

    def events(self, migration_id: str) -> AsyncIterator[Record]:
        """The record now, and again whenever it changes (state at once, figures at most twice a second), until ended."""
        ...

    def health(self) -> Health: ...

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop``; then abort what can be aborted, leave every guest safe, and return."""
        ...
