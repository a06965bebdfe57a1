"""The request bodies of the control API, and the health report of an agent.

pydantic checks the requests before an agent sees them.
"""

from __future__ import annotations

from typing import Any, Self

import msgspec
from pydantic import Field, model_validator

from migrated.agent.record import ErrorInfo
from migrated.options import DomainOptions, Limits, MigrationOptions, TargetAddress
from migrated.settings import Table, refuse


class _Request(Table):
    @model_validator(mode="before")
    @classmethod
    def _null_means_left_out(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class StartRequest(_Request, MigrationOptions, DomainOptions):
    """Body of ``POST /v1/migrations``; omitted fields take the configured defaults."""

    guest: str = Field(description="the guest's name in the source's configuration")
    to: TargetAddress = Field(description="where the target agent listens")


class SetRequest(_Request, Limits):
    """Body of ``POST /v1/migrations/ID/set``."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set:
            refuse("nothing to set", f"give at least one of {', '.join(Limits.model_fields)}")
        return self


class GuestReport(msgspec.Struct, kw_only=True):
    """One guest of this host.

    ``state`` and ``memory_bytes`` are empty and 0 if nobody could be asked.  ``error``: why it cannot be migrated.
    """

    name: str
    driver: str
    state: str = ""
    memory_bytes: int = 0
    migratable: bool = False
    error: ErrorInfo | None = None


class GuestList(msgspec.Struct, kw_only=True):
    """Answer of ``GET /v1/guests``.  ``problems``: why guests may be missing from the list."""

    guests: list[GuestReport]
    problems: list[ErrorInfo] = []


class Health(msgspec.Struct, kw_only=True):
    """``healthy``: the fault threads are running; ``ready``: the agent accepts migrations; ``reasons``: why not."""

    healthy: bool
    ready: bool
    reasons: list[str] = msgspec.field(default_factory=list)
