"""The request bodies of the control API, the report on a host's guests, and the health report of an agent.

pydantic checks a request where a program makes it, and again before an agent sees it.  In JSON an address is text, and so
is a rate (``"10Gbit"``).  A program may give an `Address` and bytes a second as well.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import msgspec
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from migrated.address import Address
from migrated.agent.record import ErrorInfo
from migrated.errors import ConfigError
from migrated.options import DomainOptions, EvacuationOptions, Limits, MigrationOptions, TargetAddress
from migrated.settings import Table, explain, refuse, text_of


class RequestError(ConfigError):
    """A request is not what the verb takes; it was not sent."""

    default_code = "bad-request"


class _Request(Table):
    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Raise RequestError for what a program gives; the agent explains in its own words what is wrong in JSON."""
        try:
            return handler(values)
        except ValidationError as error:
            if info.mode == "json":
                raise
            problem, hint = explain(error, cls)
            raise RequestError(f"{cls.__name__}: {problem}", hint=hint) from error

    @model_validator(mode="before")
    @classmethod
    def _null_means_left_out(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        return given if info.mode == "json" else {key: cls._as_text(key, value) for key, value in given.items()}

    @classmethod
    def _as_text(cls, key: str, value: Any) -> Any:
        """Return a value as in JSON."""
        text = text_of(cls.model_fields[key]) if key in cls.model_fields else None
        if text is None or isinstance(value, str):
            return value
        return (
            [each if isinstance(each, str) else text.write(each) for each in value]
            if isinstance(value, list)
            else text.write(value)
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

    @model_validator(mode="before")
    @classmethod
    def _not_empty(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(value is None for value in values.values()):
            refuse("nothing to set", f"give at least one of {', '.join(Limits.model_fields)}")
        return values


class ResumeRequest(_Request):
    """Body of ``POST /v1/migrations/ID/resume``."""

    to: TargetAddress | None = Field(default=None, description="where the target agent listens now, if it has moved")


class ConfirmRequest(_Request):
    """Body of the verbs that destroy something if they are wrong."""

    confirm: str = Field(description="the guest's name")


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
