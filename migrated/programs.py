"""Run a program of the operator's: input and output in memory, an environment without ours, and a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Sequence
from typing import Final

_ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended, and what it wrote."""

    status: int
    output: bytes
    complaint: bytes  # what it wrote on standard error


async def run(command: Sequence[str], given: bytes, *, limit_seconds: float, output_bytes: int) -> Ended:
    """Run it; ``output_bytes``: how much of each output is read.  Raises TimeoutError, OSError.

    One that takes too long is killed, with what it has started.  What one that ends in time leaves running stays.
    """
    with contextlib.ExitStack() as stack:
        fds = [_file(stack) for _ in range(3)]
        os.pwrite(fds[0], given, 0)
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=fds[0],
            stdout=fds[1],
            stderr=fds[2],
            cwd="/",
            env=_ENVIRONMENT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(limit_seconds):
                status = await process.wait()
        finally:
            if process.returncode is None:  # else its number may belong to another process group by now
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return Ended(status, os.pread(fds[1], output_bytes, 0), os.pread(fds[2], output_bytes, 0))


def _file(stack: contextlib.ExitStack) -> int:
    """A file in memory: what the program leaves behind can hold it open, and not us up."""
    fd = os.memfd_create("migrated-program", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
