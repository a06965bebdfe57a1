"""What one migration was asked to be: the request over the configuration's defaults."""

from __future__ import annotations

from pydantic import ConfigDict

from migrated.agent.requests import SetRequest, StartRequest
from migrated.options import MigrationOptions, TargetAddress


class Options(MigrationOptions):
    """Limits may change while the migration runs (`apply`)."""

    model_config = ConfigDict(frozen=False)

    target: TargetAddress

    @classmethod
    def of(cls, request: StartRequest, defaults: MigrationOptions) -> Options:
        """All that the request does not say is the configuration's."""
        return cls.model_construct(target=request.to, **{**dict(defaults), **request.given()})

    def apply(self, request: SetRequest) -> None:
        """Change what the request says."""
        for name, value in request.given().items():
            setattr(self, name, value)
