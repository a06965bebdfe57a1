"""The saved domain that libvirt restores: a FIFO that we write to for as long as the migration lasts.

An image begins with 92 bytes: ``LibvirtQemudSave``, then 32-bit numbers, little-endian: version 2, the length of what follows,
was-running, compression, the cookie's offset, 14 zeros.  The domain's XML follows, with its NUL, then QEMU's migration stream.

We hold both ends of the FIFO: libvirt finds a writer whenever it opens it, and what is written waits there.  libvirt up to 11.2
opens it once and hands it to QEMU.  Later ones read the XML first, close it, and open it again: the head is written again
then.  A reader that is not to go on gets bytes that are no migration stream; an end of file would not end QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from migrated.errors import HostError
from migrated.privileged import open_inodes

_MAGIC = b"LibvirtQemudSave"
_HEAD = struct.Struct("<16sIIIII56x")
_VERSION = 2
_PIPE_BYTES = 1 << 20
_IN_CLOSE_NOWRITE = 0x10
#: What no reader takes for an image or for a migration stream, as long as any head of them.
_JUNK = b"abandoned by migrated\n" * 64

_LIBC = ctypes.CDLL(None, use_errno=True)


def head(xml: str) -> bytes:
    """The image up to QEMU's stream."""
    body = xml.encode() + b"\0"
    return _HEAD.pack(_MAGIC, _VERSION, len(body), 0, 0, 0) + body


class SaveImage:
    """Make it with `create`; `close` or `abandon` when done."""

    def __init__(self, path: Path, fd: int, watch: int, beginning: bytes) -> None:
        self.path = path
        self._fd = fd
        self._watch = watch
        self._head = beginning

    @classmethod
    def create(cls, path: Path, xml: str) -> SaveImage:
        """A FIFO with the image's head in it.  Raises HostError."""
        beginning = head(xml)
        path.unlink(missing_ok=True)
        fd = watch = -1
        try:
            os.mkfifo(path, 0o600)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            with contextlib.suppress(PermissionError):  # only a very long XML needs it
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            watch = _closings(path)
            if os.write(fd, beginning) != len(beginning):
                raise OSError(errno.ENOSPC, "the pipe is too small for the domain's XML")
        except OSError as error:
            for number in (fd, watch):
                if number >= 0:
                    os.close(number)
            path.unlink(missing_ok=True)
            raise HostError(
                f"cannot make {path} for libvirt: {error.strerror}",
                code="no-fifo",
                hint="agent.state_dir must be on a file system that has FIFOs",
            ) from error
        return cls(path, fd, watch, beginning)

    def write_head_again(self) -> bool:
        """If a reader has closed the FIFO since the last call, write the head for the next one; whether it has."""
        try:
            os.read(self._watch, 4096)
        except BlockingIOError:
            return False
        os.write(self._fd, self._head)
        return True

    async def write(self, data: bytes) -> None:
        """Write all of it; waits while the FIFO is full."""
        loop = asyncio.get_running_loop()
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                room = asyncio.Event()
                loop.add_writer(self._fd, room.set)
                try:
                    await room.wait()
                finally:
                    loop.remove_writer(self._fd)

    def open_in(self, pid: int) -> bool:
        """Whether a process has it open."""
        ours = os.fstat(self._fd)
        return (ours.st_dev, ours.st_ino) in open_inodes(pid, "/").values()

    def abandon(self) -> None:
        """Have whoever reads give up."""
        if self._fd >= 0:
            with contextlib.suppress(BlockingIOError):  # full: there is enough to choke on
                os.write(self._fd, _JUNK)

    def close(self) -> None:
        """Close it: the stream's end.  Idempotent."""
        for number in (self._fd, self._watch):
            if number >= 0:
                os.close(number)
        self._fd = self._watch = -1
        self.path.unlink(missing_ok=True)


def abandon_left_over(path: Path) -> None:
    """An agent that died left this FIFO: have whoever waits there give up."""
    with contextlib.suppress(OSError):  # nobody reads, or there is none
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, _JUNK)
        finally:
            os.close(fd)
    path.unlink(missing_ok=True)


def _closings(path: Path) -> int:
    """An inotify descriptor that is readable when a reader has closed the FIFO."""
    watch = int(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if watch < 0 or _LIBC.inotify_add_watch(watch, os.fsencode(path), _IN_CLOSE_NOWRITE) < 0:
        code = ctypes.get_errno()
        if watch >= 0:
            os.close(watch)
        raise OSError(code, os.strerror(code), "inotify")
    return watch
