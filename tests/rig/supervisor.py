"""Clean up after a test run that is killed: a separate process watches the run, and removes what it leaves behind.

Processes that tests start do not stay below them: agents have their own sessions, guests outlive agents, and descriptor
holders are nobody's children.  PR_SET_PDEATHSIG would reach only the direct children.  But all of them inherit an environment
variable whose value is unique to this run.  The supervisor finds them by it, and kills each through its pidfd.  The run
announces everything else (a namespace, a mount, a directory, pages in the pool) in advance with `undoing`.

The supervisor watches the pidfd of the run instead of the end of the pipe, because a child that was forked but has not called
exec holds the pipe too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

WORD = "MIGRATED_TEST_RUN"
ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 30.0

_numbers = itertools.count()
_pipe = -1


# ---------------------------------------------------------------- in the test run


def start() -> None:
    """Start the supervisor.  Everything started after this call is killed when this process exits."""
    global _pipe  # one supervisor for each process
    if _pipe >= 0:
        return
    reading, _pipe = os.pipe()
    environment = {name: value for name, value in os.environ.items() if name != WORD}
    os.environ[WORD] = token = uuid.uuid4().hex
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    os.posix_spawn(
        sys.executable,
        [sys.executable, __file__, str(os.getpid()), token],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), *null],
        setsid=True,  # Ctrl-C must not reach the supervisor
    )
    os.close(reading)


def _tell(message: dict[str, object]) -> None:
    if _pipe >= 0:
        with contextlib.suppress(OSError):
            os.write(_pipe, json.dumps(message).encode() + b"\n")


@contextlib.contextmanager
def undoing(*command: str) -> Iterator[None]:
    """Have the supervisor run ``command`` if this process is killed inside the block, and only then."""
    number = next(_numbers)
    _tell({"number": number, "command": command})
    try:
        yield
    finally:
        _tell({"number": number})


@contextlib.contextmanager
def directory(prefix: str, where: str | None = None) -> Iterator[Path]:
    """Create a temporary directory that is removed even if this process is killed."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    with undoing("rm", "-rf", "--", str(path)):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- the supervisor


def _watch(pid: int) -> dict[int, list[str]]:
    """Wait until the given process, our parent, has exited, and return the commands that undo what it left."""
    told = b""
    with contextlib.suppress(ProcessLookupError):
        watched = os.pidfd_open(pid)
        if os.getppid() == pid:
            poller = select.poll()
            poller.register(watched, select.POLLIN)
            poller.register(0, select.POLLIN)
            while all(fd != watched for fd, _ in poller.poll()):
                data = os.read(0, 1 << 16)
                told += data
                if not data:
                    poller.unregister(0)
    os.set_blocking(0, False)
    with contextlib.suppress(BlockingIOError):
        while data := os.read(0, 1 << 16):
            told += data
    commands: dict[int, list[str]] = {}
    for line in told.splitlines():
        message = json.loads(line)
        if "command" in message:
            commands[message["number"]] = message["command"]
        else:
            commands.pop(message["number"], None)
    return commands


def _end_one(pid: int, mark: bytes) -> bool:
    """Kill a process if it belongs to that run, and return whether it did."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Read the environment while holding the pidfd, so that the process checked is the process killed.
        if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], 5)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _end_all(token: str) -> None:
    """Kill processes of the run until a scan finds none: one that was just being killed may have started another."""
    mark = f"{WORD}={token}".encode()
    until = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < until:
        ended = [_end_one(int(entry), mark) for entry in os.listdir("/proc") if entry.isdigit()]
        if not any(ended):
            return


def main() -> None:
    """``supervisor.py PID WORD``."""
    commands = _watch(int(sys.argv[1]))
    _end_all(sys.argv[2])
    for _, command in sorted(commands.items(), reverse=True):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, check=False, cwd=ROOT, timeout=LIMIT_SECONDS)


if __name__ == "__main__":
    main()
