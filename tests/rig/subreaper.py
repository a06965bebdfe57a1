"""What init is to daemons on a host: the parent of what loses its own, which it reaps.

libvirt waits until a QEMU that it has ended is reaped.  Where process 1 does not do that (most containers), every end takes
libvirt ten seconds.  Reads lines ``start`` from its standard input, and answers each with the pid of the daemon it has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """``subreaper.py COMMAND…``; ends with its standard input."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    null = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        if 0 in ready:
            lines = os.read(0, 4096)
            if not lines:
                return
            pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=null, setsid=True)
            os.write(1, f"{pid}\n".encode())


if __name__ == "__main__":
    main()
