"""Call the C core: `call` turns its errors into exceptions, and its small functions have typed wrappers here.

The engines are wrapped in `migrated.memory.engine`, the dirty tracker in `migrated.memory.tracker`.  Every call
releases the interpreter lock while it is in C.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Sequence
from typing import Any

from migrated._native import ffi, lib
from migrated.errors import (
    ConnectionLostError,
    GuestError,
    HostError,
    MigratedError,
    NativeError,
    PoolError,
    RemoteProtocolError,
    TlsError,
)

__all__ = [
    "Injected",
    "call",
    "digest",
    "error_from",
    "ffi",
    "inject_syscall",
    "lib",
    "uffd_api",
    "uffd_open",
    "uffd_register",
    "uffd_unregister",
]

#: Errno values of a socket whose peer is gone or unreachable.
_CONNECTION_ERRNOS = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENOTCONN,
    }
)


def _text(raw: Any) -> str:
    text = ffi.string(raw)
    return text if isinstance(text, str) else text.decode(errors="replace")


def error_from(raw: Any) -> MigratedError:
    """Return the exception for a filled-in ``struct mgd_error``."""
    kind = int(raw.kind)
    os_errno = int(raw.os_errno)
    message = _text(raw.message) or f"the C core failed (kind {kind})"
    if kind == lib.MGD_ERR_PEER:
        return RemoteProtocolError(
            message, hint="are both agents of one version, and is it the agent that answers there?"
        )
    if kind == lib.MGD_ERR_CLOSED or (kind == lib.MGD_ERR_OS and os_errno in _CONNECTION_ERRNOS):
        return ConnectionLostError(message)
    if kind == lib.MGD_ERR_TLS:
        return TlsError(message, hint="`migrated check` on both hosts; if the peer refuses us, its log says why")
    if kind == lib.MGD_ERR_POOL:
        return PoolError(message, hint="raise the number of huge pages, or free some: `migrated check` shows the pools")
    if kind == lib.MGD_ERR_UNSUPPORTED:
        return HostError(message, code="kernel-lacks-feature", hint="`migrated check` lists what this host lacks")
    if kind == lib.MGD_ERR_GUEST_GONE:
        return GuestError(message, code="guest-gone")
    if kind == lib.MGD_ERR_OS and os_errno in {errno.EPERM, errno.EACCES}:
        return NativeError(
            message,
            kind=kind,
            os_errno=os_errno,
            code="no-rights",
            hint="`migrated check` shows which right is missing",
        )
    if kind == lib.MGD_ERR_OS:
        return NativeError(message, kind=kind, os_errno=os_errno)
    return NativeError(message, kind=kind, os_errno=os_errno, hint="this is a bug: please report it")


def call(function: Any, *arguments: Any) -> None:
    """Call ``function(*arguments, &error)``; if it fails, raise `error_from` of the error."""
    raw = ffi.new("struct mgd_error *")
    if function(*arguments, raw) != 0:
        raise error_from(raw)


def uffd_open(*, user_mode_only: bool = False) -> int:
    """Return a userfaultfd of this very process (tests, demo, benchmarks); the caller closes it."""
    out = ffi.new("int *")
    call(lib.mgd_uffd_open, int(user_mode_only), out)
    return int(out[0])


def uffd_api(uffd: int, *, faults: bool, tracking: bool) -> None:
    """Run UFFDIO_API, once per descriptor.  HostError ``kernel-lacks-feature`` names what is missing."""
    call(lib.mgd_uffd_api, uffd, int(faults), int(tracking))


def uffd_register(uffd: int, start: int, length_bytes: int, *, missing: bool, minor: bool, tracking: bool) -> None:
    """Run UFFDIO_REGISTER: choose which faults on ``[start, start+length)`` to report and whether to track writes."""
    mode = (
        (lib.MGD_REGISTER_MISSING if missing else 0)
        | (lib.MGD_REGISTER_MINOR if minor else 0)
        | (lib.MGD_REGISTER_WP if tracking else 0)
    )
    call(lib.mgd_uffd_register, uffd, start, length_bytes, mode)


def uffd_unregister(uffd: int, start: int, length_bytes: int) -> None:
    """Run UFFDIO_UNREGISTER, then wake every thread that waits there."""
    call(lib.mgd_uffd_unregister, uffd, start, length_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Injected:
    """The result of an injected system call.

    ``result``: what it returned (``-errno`` on failure); ``stopped_seconds``: how long the thread stood still.
    """

    result: int
    stopped_seconds: float


def inject_syscall(pid: int, number: int, arguments: Sequence[int] = ()) -> Injected:
    """Run one system call in thread ``pid`` of another process (x86-64).  Blocks, a few seconds at worst."""
    raw = ffi.new("uint64_t[6]", [*arguments, 0, 0, 0, 0, 0, 0][:6])
    result = ffi.new("int64_t *")
    stopped = ffi.new("uint64_t *")
    call(lib.mgd_inject_syscall, pid, number, raw, result, stopped)
    return Injected(int(result[0]), int(stopped[0]) / 1e9)


def hash_key(secret: bytes) -> bytes:
    """Return the key of the block hash as C takes it; ValueError for any other length than MGD_SECRET_BYTES."""
    if len(secret) != lib.MGD_SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, not {lib.MGD_SECRET_BYTES}")
    return secret


def digest(memory_fd: int, offset: int, size_bytes: int, secret: bytes) -> int:
    """Return the keyed hash of a part of a file; holes count as zeros and are not populated.  Blocks."""
    out = ffi.new("uint64_t *")
    call(lib.mgd_digest, memory_fd, offset, size_bytes, hash_key(secret), out)
    return int(out[0])
