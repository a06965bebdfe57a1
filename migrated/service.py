"""What we tell the service manager, and the descriptors it keeps for us: sd_notify(3), in our own few lines.

All functions do nothing, and say so by returning False or nothing, when no service manager started us.
"""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Final

from migrated.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
# A descriptor's name goes into a colon-separated list in the environment (sd_pid_notify_with_fds(3)).
_FD_NAME: Final = re.compile(r"[!-9;-~]{1,255}", re.ASCII)
_MAX_FDS_A_MESSAGE: Final = 253  # SCM_MAX_FD


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


def store_fds(name: str, fds: Sequence[int]) -> bool:
    """Have the service manager keep duplicates of ``fds`` under ``name`` across our death (``FDSTORE=1``).

    They come back in `take_stored_fds` in this order, as long as one call stored them.  Raises HostError, ValueError.
    """
    _check_name(name)
    for start in range(0, len(fds), _MAX_FDS_A_MESSAGE):
        # FDPOLL=0: the manager would otherwise drop a descriptor that polls POLLERR or POLLHUP.  A blocking userfaultfd
        # always polls POLLERR, and losing that one loses the guest.
        if not notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=fds[start : start + _MAX_FDS_A_MESSAGE]):
            return False
    return True


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
