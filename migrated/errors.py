"""The errors that the package raises.  Each has a stable code for programs, and a message and a hint for people.

        MigratedError                 base: code, message, hint
    ├── ConfigError               a configuration file or a command line is wrong
        ├── UsageError                a verb does not apply (unknown guest, wrong state); HTTP 404/409
    │   ├── NotFoundError
    │   └── ConflictError         carries the state
        ├── GuestError                the guest (its process, QMP, its client library) refused or is gone
        │   └── GuestRefusedError     the guest cannot be moved as it is; raised before anything is touched
        ├── HostError                 this host lacks something: a kernel feature, a permission, memory
    │   └── PoolError             no (huge) pages left
    ├── NativeError               the C core reported a failure
    ├── TimeoutExceededError      a wait reached its limit
    ├── ProtocolError
        │   ├── LocalProtocolError    we broke the protocol: a bug
        │   └── RemoteProtocolError   the peer broke the protocol: ends the session, never the daemon
        ├── PeerError                 the peer ended the session; carries the peer's code and message
    ├── ConnectionLostError       a connection to the peer ended
    ├── TlsError                  a certificate or key is unusable, or one side refuses the other's
        └── AbortedError              the migration was aborted on request

``code`` is a stable word without dots (``no-huge-pages``); ``message`` says what went wrong and where; ``hint`` says
what to do.  ``status --json`` shows the three as ``error{code,message,hint}``.
"""

from __future__ import annotations

from typing import Any


class MigratedError(Exception):
    """Base: ``code`` for programs, ``message`` for people, ``hint`` for what to do next."""

    default_code = "internal"

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.default_code
        self.hint = hint

    def as_dict(self) -> dict[str, str]:
        """``{code, message, hint}``, as status and HTTP errors carry it."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class ConfigError(MigratedError):
    """A configuration file or command line is wrong; raised before anything is touched."""

    default_code = "bad-configuration"


class UsageError(MigratedError):
    """The verb does not apply."""

    default_code = "usage"


class NotFoundError(UsageError):
    """No such guest or migration."""

    default_code = "not-found"


class ConflictError(UsageError):
    """The verb does not apply in the migration's current state."""

    default_code = "conflict"

    def __init__(self, message: str, *, state: str = "", code: str | None = None, hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.state = state

    def as_dict(self) -> dict[str, str]:
        return {**super().as_dict(), "state": self.state}


class GuestError(MigratedError):
    """The guest, its process or its control socket failed."""

    default_code = "guest-failed"


class GuestRefusedError(GuestError):
    """The guest cannot be moved as it is (memory not shared, mapped elsewhere, preallocated, …)."""

    default_code = "guest-refused"


class HostError(MigratedError):
    """This host lacks something: a kernel feature, a permission, memory."""

    default_code = "host-unfit"


class PoolError(HostError):
    """No pages of the requested size are left."""

    default_code = "no-pages"


class NativeError(MigratedError):
    """The C core reported a failure; ``kind`` is one of MGD_ERR_*, ``os_errno`` 0 if unknown."""

    default_code = "native"

    def __init__(self, message: str, *, kind: int, os_errno: int = 0, code: str | None = None, hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.kind = kind
        self.os_errno = os_errno


class TimeoutExceededError(MigratedError):
    """A wait reached its limit; the message names what was waited for."""

    default_code = "timeout"


class ProtocolError(MigratedError):
    """The control protocol was violated."""

    default_code = "protocol"


class LocalProtocolError(ProtocolError):
    """We tried to send what the state does not allow; the state is unchanged."""

    default_code = "protocol-local"


class RemoteProtocolError(ProtocolError):
    """The peer sent a malformed message, or one that the state does not allow."""

    default_code = "protocol-remote"


class PeerError(MigratedError):
    """The peer ended the session and said why."""

    default_code = "peer"


class ConnectionLostError(MigratedError):
    """A connection to the peer was closed, reset or timed out."""

    default_code = "connection-lost"


class TlsError(MigratedError):
    """A certificate or key is unusable, one side refuses the other's, or the peer does not speak TLS 1.3."""

    default_code = "tls"


class AbortedError(MigratedError):
    """The migration was aborted on request."""

    default_code = "aborted"


def as_migrated_error(error: BaseException) -> MigratedError:
    """Convert any exception to a MigratedError; one that is not ours gets the code ``internal``."""
    if isinstance(error, MigratedError):
        return error
    return MigratedError(f"{type(error).__name__}: {error}", hint="this is a bug: please report it")


def log_fields(error: BaseException) -> dict[str, str]:
    """Return an error as the fields of a log line: its message as ``error``, ``code`` and, if there is one, ``hint``."""
    ours = as_migrated_error(error)
    return {"error": ours.message, "code": ours.code, **({"hint": ours.hint} if ours.hint else {})}


def error_fields(error: BaseException) -> dict[str, Any]:
    """Convert any exception to ``{code, message, hint}``."""
    return as_migrated_error(error).as_dict()
