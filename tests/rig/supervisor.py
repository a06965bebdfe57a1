"""A test run that is killed leaves nothing behind: a process beside it watches, and cleans up when it is gone.

What tests start does not stay below them: agents have sessions of their own, guests outlive agents, holders of descriptors
are nobody's children.  Asking the kernel to end a child with its parent (PR_SET_PDEATHSIG) would reach the first of these at
most.  But all of them inherit a word in their environment that is this run's alone; by it they are found and ended, each by
its pidfd.  What is no process (a namespace, a mount, a directory, pages in the pool) is told beforehand: `undoing`.

The supervisor watches our pidfd, not the end of the pipe: a child that was forked and not executed holds the pipe too.
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
    """From here on everything we start ends with us at the latest."""
    global _pipe  # there is one of it, as there is one of us
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
        setsid=True,  # a Ctrl-C is for us
    )
    os.close(reading)


def _tell(message: dict[str, object]) -> None:
    if _pipe >= 0:
        with contextlib.suppress(OSError):
            os.write(_pipe, json.dumps(message).encode() + b"\n")


@contextlib.contextmanager
def undoing(*command: str) -> Iterator[None]:
    """Should we be killed before this block is left, ``command`` is run; run otherwise it is not."""
    number = next(_numbers)
    _tell({"number": number, "command": command})
    try:
        yield
    finally:
        _tell({"number": number})


@contextlib.contextmanager
def directory(prefix: str, where: str | None = None) -> Iterator[Path]:
    """A temporary directory that goes in any case."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    with undoing("rm", "-rf", "--", str(path)):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- the supervisor


def _watch(pid: int) -> dict[int, list[str]]:
    """Until that process, our parent, has ended; what is to be undone then."""
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
    """End a process if it is of that run; whether it was."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Read with the handle open: the process that is ended is the one that was looked at.
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
    """Until a look at all processes finds none: one that was just being ended may have started another."""
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
