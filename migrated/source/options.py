"""The options of one migration: the request, with the configuration's defaults for what it omits.

They start out fixed by the request, and `set` may change the limits later.
"""

from __future__ import annotations

from pydantic import ConfigDict

from migrated.agent.requests import SetRequest, StartRequest
from migrated.options import MigrationOptions, TargetAddress


class Options(MigrationOptions):
    """Options whose limits may change while the migration runs (`apply`)."""

    model_config = ConfigDict(frozen=False)

    target: TargetAddress

    @classmethod
    def of(cls, request: StartRequest, defaults: MigrationOptions) -> Options:
        """Return the request's options; omitted ones take the configured defaults."""
        return cls.model_construct(target=request.to, **{**dict(defaults), **request.given()})

    def apply(self, request: SetRequest) -> None:
        """Change the options that the request gives."""
        for name, value in request.given().items():
            setattr(self, name, value)
