"""The privileged helper, ``migrated helper``: it performs single operations on processes for agents without privileges.

systemd starts it at the first connection to its socket (migrated-helper.socket).  It has no network, no configuration and
no state: each connection brings one request, and any may be its last.  If it is killed while it makes a system call in a
guest, the process that traces the guest finishes on its own (native/src/inject.c); so its unit must not end that one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog

from migrated import privileged
from migrated.errors import ConfigError
from migrated.guests.access import injection  # for its operations

__all__ = ["injection", "serve", "take_listener"]

#: A system call in a guest may take seconds, and no other guest waits for it.
THREADS: Final = 64
REQUEST_SECONDS: Final = 10.0
_UCRED: Final = struct.Struct("3i")
_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START

log = structlog.get_logger("migrated.helper")


def take_listener() -> socket.socket:
    """Return the socket that the service manager listens on for us.  Raises ConfigError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise ConfigError(
            "the helper needs a socket from the service manager",
            hint="systemctl start migrated-helper.socket; agents that run as root by hand need no helper",
        )
    os.set_inheritable(_FIRST_FD, False)
    return socket.socket(fileno=_FIRST_FD)


def serve(listener: socket.socket) -> None:
    """Answer requests until the process is ended, of root and of the owner of the socket."""
    allowed = {0, os.geteuid()}
    path = listener.getsockname()
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(Path(path).stat().st_mode):
            allowed.add(Path(path).stat().st_uid)
    with ThreadPoolExecutor(THREADS) as threads:
        while True:
            connection, _ = listener.accept()
            threads.submit(_serve, connection, allowed)


def _serve(connection: socket.socket, allowed: set[int]) -> None:
    with connection:
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in allowed:
            log.warning("refused", pid=pid, uid=uid)
            return
        connection.settimeout(REQUEST_SECONDS)
        fds: list[int] = []
        given: list[int] = []
        try:
            flags = socket.MSG_CMSG_CLOEXEC
            request, fds, received, _ = socket.recv_fds(
                connection, privileged.MAX_REQUEST_BYTES, privileged.MAX_FDS, flags
            )
            if received & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("it is too long")
            answer, given = privileged.answer(request, fds)
            socket.send_fds(connection, [answer], given)
        except (OSError, ValueError) as error:
            log.warning("no answer to a request", pid=pid, error=str(error))
        except Exception:
            log.exception("a request failed: this is a bug", pid=pid)
        finally:
            for fd in {*fds, *given}:
                os.close(fd)
