"""The request bodies of the control API, and the health report of an agent.

pydantic checks the requests before an agent sees them.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import msgspec
from pydantic import Field, field_validator, model_validator

from migrated.address import Address
from migrated.agent.record import ErrorInfo
from migrated.options import DomainOptions, EvacuationOptions, Limits, MigrationOptions, TargetAddress
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


class EvacuateRequest(_Request, MigrationOptions, DomainOptions, EvacuationOptions):
    """Body of ``POST /v1/evacuations``; omitted fields take the configured defaults.

    ``max_bandwidth`` is for all migrations together; libvirt's options are for its guests only.  A pattern names guests as in a shell, or a label: ``label=web``.
    """

    to: Annotated[list[TargetAddress], Field(min_length=1, max_length=256)] = Field(
        description="where the target agents listen"
    )
    only: list[str] = Field(default=[], description="patterns of the guests to migrate; none: all")
    exclude: list[str] = Field(default=[], description="patterns of the guests to leave here")
    dry_run: bool = Field(default=False, description="`true`: make the plan, and touch nothing")

    @field_validator("to")
    @classmethod
    def _each_once(cls, targets: list[Address]) -> list[Address]:
        for target in targets:
            if targets.count(target) > 1:
                refuse(f"{target} is named twice", "name each target once")
        return targets


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
