"""Notify the service manager, and use its descriptor store: sd_notify(3) in a few lines.

If no service manager started us, every function does nothing and returns False, None or an empty result.
"""

from __future__ import annotations

import os
import re
import select
import socket
from typing import TYPE_CHECKING, Final

from migrated.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
# A descriptor's name goes into a colon-separated list in the environment (sd_pid_notify_with_fds(3)).
_FD_NAME: Final = re.compile(r"[!-9;-~]{1,255}", re.ASCII)
#: Name of the descriptor that probes for a store.  The manager may return it if we died in between.
PROBE_NAME: Final = "migrated.probe"
#: The manager answers at once, unless it is busy with something else.
BARRIER_SECONDS: Final = 10.0


def notify(*assignments: str, fds: Sequence[int] = ()) -> bool:
    """Send ``"READY=1"``, ``"STATUS=…"`` and the like; return True if there is a service manager.

    Raises HostError if the service manager is configured but cannot be reached.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    if path[0] not in "/@":
        message = f"NOTIFY_SOCKET={path}: not a Unix socket"
        raise HostError(
            message, code="service-manager", hint="the service manager sets it; unset it to run without one"
        )
    address = "\0" + path[1:] if path[0] == "@" else path
    payload = "\n".join(one.replace("\n", " ") for one in assignments).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.connect(address)
            if fds:
                socket.send_fds(connection, [payload], list(fds))
            else:
                connection.send(payload)
    except OSError as error:
        message = f"cannot notify the service manager at {path}: {error.strerror}"
        raise HostError(message, code="service-manager", hint="is the service manager running?") from error
    return True


def watchdog_seconds() -> float | None:
    """Return the longest interval in seconds at which the service manager wants ``WATCHDOG=1``, or None."""
    pid = os.environ.get("WATCHDOG_PID", "")
    interval = os.environ.get("WATCHDOG_USEC", "")
    if not (interval.isascii() and interval.isdigit()) or int(interval) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 1e6


def store_fd(name: str, fd: int) -> bool:
    """Ask the service manager to keep a duplicate of ``fd`` under ``name`` across our death (``FDSTORE=1``).

    It does not say whether it does: check with `keeps_fds`.  It returns descriptors in no particular order, and keeps
    only one of several that refer to the same open file.  Raises HostError, ValueError.
    """
    _check_name(name)
    # FDPOLL=0: the manager would otherwise drop a descriptor that polls POLLERR or POLLHUP.  A blocking userfaultfd
    # always polls POLLERR, and losing that one loses the guest.
    return notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])


def keeps_fds() -> bool:
    """Check that the service manager stores descriptors, and has stored all that were sent before this call.

    NOTIFY_SOCKET does not say so: a supervisor may understand only READY=1, and systemd silently drops descriptors
    beyond FileDescriptorStoreMax=.  FDSTORE in the environment does say so, but only from systemd 254 on.  So we store
    the writing end of a pipe and close our own: while the reading end sees no hang-up, the manager keeps it.  Raises
    HostError.
    """
    reading, writing = os.pipe()
    try:
        try:
            notify("FDSTORE=1", f"FDNAME={PROBE_NAME}", "FDPOLL=0", fds=[writing])
        finally:
            os.close(writing)
        return _barrier() and not _hung_up(reading, 0)
    finally:
        os.close(reading)
        forget_fds(PROBE_NAME)


def _barrier() -> bool:
    """Wait until the manager has read everything sent so far (sd_notify_barrier(3)); return False on a timeout."""
    reading, writing = os.pipe()
    try:
        try:
            notify("BARRIER=1", fds=[writing])
        finally:
            os.close(writing)
        return _hung_up(reading, BARRIER_SECONDS)
    finally:
        os.close(reading)


def _hung_up(reading: int, limit_seconds: float) -> bool:
    poller = select.poll()
    poller.register(reading, 0)
    return bool(poller.poll(limit_seconds * 1000))


def forget_fds(name: str) -> bool:
    """Ask the service manager to close the descriptors it keeps under ``name``."""
    _check_name(name)
    return notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def take_stored_fds() -> dict[str, list[int]]:
    """Return the descriptors that the service manager passed to us, by name, with close-on-exec set.

    The caller owns them.  A second call returns nothing.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return {}
    given = names.split(":") if names else []
    result: dict[str, list[int]] = {}
    for index in range(int(count)):
        fd = _FIRST_FD + index
        os.set_inheritable(fd, False)
        result.setdefault(given[index] if index < len(given) else "unknown", []).append(fd)
    return result


def _check_name(name: str) -> None:
    if _FD_NAME.fullmatch(name) is None:
        message = f"{name!r} cannot name a stored descriptor: up to 255 printable ASCII characters without ':' or space"
        raise ValueError(message)
