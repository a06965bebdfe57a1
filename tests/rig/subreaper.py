"""What init is to daemons on a host: the parent of what loses its own, which it reaps.

libvirt waits until a QEMU that it has ended is reaped.  Where process 1 does not do that (most containers), every end takes
libvirt ten seconds.  Reads lines ``start`` from its standard input, and answers each with the pid of the daemon it has started.
At the end of its input it ends what is left: a libvirtd that is killed leaves the QEMUs that it was asking what they can do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterator

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
                break
            pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=null, setsid=True)
            os.write(1, f"{pid}\n".encode())
    while left := list(_children()):
        for pid in left:
            os.kill(pid, signal.SIGKILL)  # nobody else reaps it: the pid is still its own
            os.waitpid(pid, 0)


def _children() -> Iterator[int]:
    """Every child of ours.  What a child leaves becomes one."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid():
                    yield int(name)


if __name__ == "__main__":
    main()
