"""Keep a guest's log file short: the guest writes it on a tmpfs, which it must not fill.

The guest process writes the file itself, so its output does not depend on the agent.  The file is opened with O_APPEND:
after an agent has cut it, the next line goes to its new end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import structlog

from migrated.waiting import in_thread

#: A longer file is cut to its last `KEPT_BYTES`.
MAX_BYTES: Final = 1 << 20
KEPT_BYTES: Final = 256 << 10
CHECK_SECONDS: Final = 5.0
#: How much an error message quotes.
TAIL_BYTES: Final = 2000

#: QEMU quotes the option that it complains about, such as ``-object secret,id=disk,data=letmein``.
_SECRET: Final = re.compile(r"""(["']?\b(?:data|password|passwd|passphrase|secret)["']?\s*[=:]\s*["']?)[^\s,"'}]+""")

log = structlog.get_logger("migrated.guests")


def tail(path: Path, limit_bytes: int = TAIL_BYTES) -> str:
    """Return the end of the file as text without secrets, or an empty string if it cannot be read.

    The text becomes part of error messages, which the status site shows to whoever can connect.
    """
    try:
        # The directory may be the guest's: follow no link to a file of ours.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
            text = file.read(limit_bytes).decode(errors="replace").strip()
    except OSError:
        return ""
    return _SECRET.sub(r"\1(secret)", text)


def cut(path: Path, *, limit_bytes: int, kept_bytes: int) -> bool:
    """Cut a log that is longer than ``limit_bytes`` to whole lines at its end; return whether it was.  Raises OSError.

    Output that the guest writes between our read and our truncation is lost.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size <= limit_bytes:
            return False
        kept = os.pread(fd, kept_bytes, info.st_size - kept_bytes)
        os.ftruncate(fd, 0)
        os.write(fd, b"[earlier output was cut]\n" + kept.partition(b"\n")[2])
        return True
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def kept_short(directory: Path) -> AsyncIterator[None]:
    """While entered, cut the logs of all guests in the directories below this one."""
    cutting = asyncio.ensure_future(_keep_short(directory))
    try:
        yield
    finally:
        cutting.cancel()
        await asyncio.wait({cutting})


async def _keep_short(directory: Path) -> None:
    while True:
        await in_thread(_cut_all, directory)
        await asyncio.sleep(CHECK_SECONDS)


def _cut_all(directory: Path) -> None:
    for path in directory.glob("*/*.log"):
        with contextlib.suppress(FileNotFoundError):
            try:
                if cut(path, limit_bytes=MAX_BYTES, kept_bytes=KEPT_BYTES):
                    log.info("guest log cut", path=str(path))
            except OSError as error:
                log.warning("cannot cut guest log", path=str(path), error=error.strerror)
