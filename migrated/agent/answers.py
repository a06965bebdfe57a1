"""The answers of an agent to requests, beside records: `migrated.http` encodes them, and `migrated.client` decodes them."""

from __future__ import annotations

import msgspec

from migrated.agent.record import Record
from migrated.log_lines import Line
from migrated.memory.page_map import PageMap


class Certificate(msgspec.Struct, kw_only=True):
    """The certificate that an agent shows its peers.  ``problems``: such as that it expires soon."""

    expires_at: float
    problems: list[str]


class _Agent(msgspec.Struct, kw_only=True):
    name: str
    version: str
    pid: int
    role: str  # "source" | "target"
    guests: list[str]
    healthy: bool
    ready: bool
    reasons: list[str]
    certificate: Certificate | None


class AgentStatus(_Agent, kw_only=True):
    """Who an agent is, its health, and its migrations, oldest first.  ``reasons``: why it is not healthy or not ready."""

    migrations: list[Record]


class AgentChange(_Agent, kw_only=True):
    """What the stream of all changes says of an agent: ``migrations`` are the ids of all that it remembers."""

    migrations: list[str]


class Healthy(msgspec.Struct):
    """Whether an agent works.  ``reasons``: why not."""

    healthy: bool
    reasons: list[str]


class Ready(msgspec.Struct):
    """Whether an agent accepts migrations.  ``reasons``: why not."""

    ready: bool
    reasons: list[str]


class MigrationList(msgspec.Struct):
    """Migrations, oldest first."""

    migrations: list[Record]


class PageMapAnswer(msgspec.Struct):
    """``map``: null if there is none: before the first round, or of a migration long ago."""

    map: PageMap | None


class LogAnswer(msgspec.Struct):
    """The last lines that name the migration, oldest first."""

    log: list[Line]


class ErrorFields(msgspec.Struct):
    """What was wrong.  ``state``: of the migration, if the request does not fit it."""

    code: str
    message: str
    hint: str = ""
    state: str | msgspec.UnsetType = msgspec.UNSET


class ErrorAnswer(msgspec.Struct):
    """The answer of every request that fails."""

    error: ErrorFields
