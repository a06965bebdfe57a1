"""What we tell the service manager, and the descriptors it keeps for us: sd_notify(3), in our own few lines.

All functions do nothing, and say so by returning False or nothing, when no service manager started us.
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
#: Of a descriptor that shows whether there is a store.  It may be handed back if we died in between.
PROBE_NAME: Final = "migrated.probe"
#: The manager answers at once, unless it is busy with something else.
BARRIER_SECONDS: Final = 10.0


def notify(*assignments: str, fds: Sequence[int] = ()) -> bool:
    """Send ``"READY=1"``, ``"STATUS=…"`` and the like; True if there was somebody to tell.

    Raises HostError when the service manager is there but cannot be reached.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    if path[0] not in "/@":
        message = f"NOTIFY_SOCKET={path}: not a Unix socket"
        raise HostError(
            message, code="service-manager", hint="it is set by the service manager; unset it to run without"
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
        message = f"telling the service manager at {path}: {error.strerror}"
        raise HostError(message, code="service-manager", hint="is the service manager running?") from error
    return True


def watchdog_seconds() -> float | None:
    """How often at least the service manager wants ``WATCHDOG=1``, or None."""
    pid = os.environ.get("WATCHDOG_PID", "")
    interval = os.environ.get("WATCHDOG_USEC", "")
    if not (interval.isascii() and interval.isdigit()) or int(interval) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 1e6


def store_fd(name: str, fd: int) -> bool:
    """Have the service manager keep a duplicate of ``fd`` under ``name`` across our death (``FDSTORE=1``).

    It says nothing of whether it does: ask `keeps_fds`.  It hands descriptors back in no particular order, and keeps one of
    several that are the same open file.  Raises HostError, ValueError.
    """
    _check_name(name)
    # FDPOLL=0: the manager would otherwise drop a descriptor that polls POLLERR or POLLHUP.  A blocking userfaultfd
    # always polls POLLERR, and losing that one loses the guest.
    return notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])


def keeps_fds() -> bool:
    """Whether the service manager keeps what it is given, and has kept all that was stored before this call.

    NOTIFY_SOCKET does not tell: a supervisor may take nothing but READY=1 from it, and systemd drops silently what does not
    fit into FileDescriptorStoreMax=.  FDSTORE in the environment tells from systemd 254 on.  So we store the writing end of
    a pipe that nobody else has: while the reading end sees no hang-up, somebody keeps it.  Raises HostError.
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
    """Wait until the manager has read everything sent so far (sd_notify_barrier(3)); False if it does not say so in time."""
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
    """Have the service manager close what it keeps under ``name``."""
    _check_name(name)
    return notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def take_stored_fds() -> dict[str, list[int]]:
    """Descriptors the service manager hands back, by name, close-on-exec set; they are the caller's from now on.

    Empty on a second call.
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
