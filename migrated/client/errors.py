"""The errors that a client raises.  Each has ``code``, ``message`` and ``hint`` (see docs/errors.md for every code).

MigratedError
├── RemoteError           the agent refused the request, or failed; with ``status`` and ``state``
├── ConnectionLostError   the connection broke: whether the request was carried out is unknown
├── HostError
│   └── NoAgentError      no agent answers there, or this user may not ask it
└── ConfigError           an address or a certificate is unusable; nothing was sent
└── RequestError      a request is not what the verb takes; nothing was sent
"""

from __future__ import annotations

from migrated.errors import HostError, MigratedError


class RemoteError(MigratedError):
    """The agent answered with an error.

    ``status`` is that of HTTP.  ``state`` is the migration's, if the request does not fit it, else empty.
    """

    def __init__(self, message: str, *, code: str, hint: str = "", status: int, state: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.status = status
        self.state = state

    def as_dict(self) -> dict[str, str]:
        return {**super().as_dict(), **({"state": self.state} if self.state else {})}


class NoAgentError(HostError):
    """No agent answers at this address, or this user may not ask it."""

    default_code = "no-agent"
