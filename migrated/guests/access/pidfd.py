"""Hold a guest process by its pidfd, so that it is never confused with a later process of the same pid.

The process was started here or found running; the handle watches it and ends it.  A guest must outlive the agent.  So a
process that we start gets a session of its own, a log file instead of pipes, and no tie to our death.  When a driver
releases it while it runs, its exit status is collected when it exits (`_detach`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from migrated import privileged
from migrated.errors import GuestError, TimeoutExceededError

_SYS_PIDFD_GETFD = 438  # the same number on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)

#: Variables that systemd sets for the agent and that no guest may use in its name (systemd.exec(5), sd_notify(3),
#: sd_listen_fds(3)).
_OF_THE_AGENT = (
    "NOTIFY_SOCKET",
    "WATCHDOG_",
    "LISTEN_",
    "FDSTORE",
    "MAINPID",
    "MANAGERPID",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "SYSTEMD_EXEC_PID",
    "CREDENTIALS_DIRECTORY",
    "MEMORY_PRESSURE_",
)

#: Children that still ran when their driver was closed.  Their pidfds are kept only to collect their exit status, with
#: the event loop that waits for their exit, if one ran.
_detached: dict[int, asyncio.AbstractEventLoop | None] = {}


def _detach(pidfd: int) -> None:
    """Collect the exit status of a child whose driver is closed as soon as it exits, so that none stays a zombie."""
    try:
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, _reap, pidfd)
    except (RuntimeError, OSError):  # no loop, or it can watch no more: when the next child is started
        loop = None
    _detached[pidfd] = loop


def _reap(pidfd: int) -> None:
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:
        ended = True
    if ended:
        loop = _detached.pop(pidfd)
        if loop is not None and not loop.is_closed():
            loop.remove_reader(pidfd)
        os.close(pidfd)


def process_started(pid: int) -> int:
    """Return when the process was started, in clock ticks since boot; 0 if there is none, or only a zombie.

    With the pid, this is the identity of a process: a later one with the same pid has another start time.
    """
    try:
        # The name is in parentheses and may contain anything; the fields after the last parenthesis are plain.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in b"ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def process_lives(pid: int, started: int) -> bool:
    """Whether the process that had this pid and start time still runs (and is neither a later one nor a zombie)."""
    return pid > 0 and started > 0 and process_started(pid) == started


def _status_text(result: os.waitid_result) -> str:
    if result.si_code == os.CLD_EXITED:
        return f"exited with status {result.si_status}"
    try:
        name = signal.Signals(result.si_status).name
    except ValueError:
        name = f"signal {result.si_status}"
    return f"killed by {name}"


class PidHandle:
    """One process; every method is safe after its exit.  Call `close` when done with it."""

    def __init__(self, pid: int, pidfd: int, *, child: bool) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._child = child
        self._end: str | None = None

    @classmethod
    def attach(cls, pid: int, *, started: int | None = None) -> PidHandle:
        """Watch a process that already runs.  Raises GuestError (``guest-gone``).

        ``started``: its `process_started` when it was known to be ours.  Without it, any process with this pid is
        taken.
        """
        try:
            handle = cls(pid, os.pidfd_open(pid), child=False)
        except OSError as error:
            raise GuestError(f"cannot watch process {pid}: {error.strerror}", code="guest-gone") from error
        # Check after opening the pidfd: from then on the pidfd determines which process is meant.
        if started is not None and not process_lives(pid, started):
            handle.close()
            raise GuestError(f"process {pid} has exited, or its pid now belongs to another process", code="guest-gone")
        return handle

    @classmethod
    def spawn(
        cls, command: Sequence[str], *, pass_fds: Sequence[int], log: Path, environment: Mapping[str, str] | None = None
    ) -> PidHandle:
        """Start ``command`` in a session of its own, with no standard input and its output to ``log``.

        It inherits ``pass_fds`` under the same numbers, and our environment unless one is given, without what systemd
        tells the agent there.  Raises GuestError (``guest-start``).
        """
        for pidfd in list(_detached):  # those that no loop waits for any more
            _reap(pidfd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
        actions: list[tuple[object, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            # glibc clears close-on-exec when both numbers are the same (2.29).  Nothing else is inherited, so no
            # process started beside us gets the memory by accident.
            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds),
        ]
        try:
            pid = os.posix_spawnp(
                command[0],
                list(command),
                {
                    name: value
                    for name, value in (os.environ if environment is None else environment).items()
                    if not name.startswith(_OF_THE_AGENT)
                },
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
            )
        except OSError as error:
            raise GuestError(
                f"cannot start {command[0]}: {error.strerror}",
                code="guest-start",
                hint="check the command of this guest in the target's configuration",
            ) from error
        return cls(pid, os.pidfd_open(pid), child=True)

    def poll(self) -> str | None:
        """Return how the process ended, as text for people; None while it runs."""
        if self._end is not None:
            return self._end
        if self._pidfd < 0:
            return "no longer watched"
        if self._child:
            with contextlib.suppress(ChildProcessError):
                result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
                if result is None:
                    return None
                self._end = _status_text(result)
                return self._end
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if poller.poll(0):
            self._end = "ended"
        return self._end

    async def died(self) -> str:
        """Wait until the process has ended; return how, as text for people."""
        loop = asyncio.get_running_loop()
        while (end := self.poll()) is None:
            # Use a duplicate, so that several waiters do not share one place in the selector.
            watched = os.dup(self._pidfd)
            ended = asyncio.Event()
            try:
                loop.add_reader(watched, ended.set)
                await ended.wait()
            finally:
                loop.remove_reader(watched)
                os.close(watched)
        return end

    def signal(self, number: int) -> None:
        """Send a signal if the process still runs."""
        if self._pidfd >= 0 and self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self, limit_seconds: float) -> None:
        """Send SIGKILL and wait for the exit.  Raises TimeoutExceededError (a process stuck in the kernel)."""
        self.signal(signal.SIGKILL)
        await self.wait(limit_seconds)

    async def wait(self, limit_seconds: float) -> str:
        """Wait like `died`, with a time limit.  Raises TimeoutExceededError."""
        try:
            async with asyncio.timeout(limit_seconds):
                return await self.died()
        except TimeoutError as error:
            raise TimeoutExceededError(
                f"process {self.pid} has not ended within {limit_seconds:g} s",
                hint=f"see /proc/{self.pid}/stack for what it waits in",
            ) from error

    @property
    def pidfd(self) -> privileged.Fd:
        """The pidfd, which this handle keeps."""
        return privileged.Fd(self._pidfd)

    def take_fd(self, number: int) -> int:
        """Return a duplicate of the process's descriptor ``number`` (pidfd_getfd, close-on-exec).  Raises OSError."""
        fd = int(_LIBC.syscall(_SYS_PIDFD_GETFD, self._pidfd, number, 0))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"pidfd_getfd({self.pid}, {number})")
        return fd

    def close(self) -> None:
        """Close the handle.  The process runs on.  Idempotent."""
        if self._pidfd < 0:
            return
        if self._child and self.poll() is None:
            _detach(self._pidfd)
        else:
            os.close(self._pidfd)
        self._pidfd = -1
