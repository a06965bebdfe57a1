"""What a migration tells about its course, so that `migrated.agent.spans` can trace it with OpenTelemetry.

Without `[tracing]` in the configuration, nobody listens, and OpenTelemetry is not even imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from migrated.agent.record import Laps, Record, State
    from migrated.config import AgentConfig

log = structlog.get_logger("migrated.tracing")


class Trace:
    """The trace of one migration on one agent.  This one records nothing."""

    parent = ""  # the context that the trace continues: the caller's on a source, the source's on a target
    traceparent = ""  # the context for the other agent, as in the header of W3C Trace Context

    def enter(self, state: State, error: BaseException | None) -> None:
        """Note that the record is in a new state, because of ``error`` if there is one."""

    def round(self, began: float, **figures: int) -> None:
        """Note a round of pre-copy that has just ended.  ``began`` is of ``time.monotonic()``."""


class Tracing:
    """Begins the traces of an agent's migrations.  This one records nothing."""

    def begin(self, record: Record, laps: Laps, *, parent: str, started_at: float) -> Trace:
        """Begin the trace of a migration, or continue that of an agent that died.  ``started_at`` is Unix time."""
        del record, laps, parent, started_at
        return Trace()

    def close(self) -> None:
        """Send what has not been sent yet, within a few seconds.  Blocks."""


def start(config: AgentConfig) -> Tracing:
    """Return what traces this agent's migrations.  If it cannot start, the log says why: migrations do not depend on it."""
    if not config.tracing.enabled:
        return Tracing()
    try:
        from migrated.agent.spans import RecordedTracing

        return RecordedTracing.start(config)
    except ImportError as error:
        hint = (
            "install the extra into the agent's environment (pip install 'migrated[otel]'), or remove tracing.enabled"
        )
        log.warning("no tracing: OpenTelemetry is not installed", error=str(error), hint=hint)
    except Exception as error:  # noqa: BLE001 - such as a variable that the library cannot read
        log.warning("no tracing: OpenTelemetry does not start", error=str(error), hint="check the OTEL_* variables")
    return Tracing()
