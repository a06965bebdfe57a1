"""What is asked of an agent and answered: the bodies of the control API's requests, and the state of its health."""

from __future__ import annotations

import msgspec


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
