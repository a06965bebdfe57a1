"""A process that maps memory and writes it where it is told to."""

from __future__ import annotations

import subprocess
import sys

_CHILD = """
import ctypes, mmap, os, sys
MADV_PAGEOUT = 21
fd, size = int(sys.argv[1]), int(sys.argv[2])
memory = mmap.mmap(fd, size, mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    for word in line.split():
        if word == "out":
            memory.madvise(MADV_PAGEOUT)
        else:
            memory[int(word)] = (memory[int(word)] + 1) % 256
    print("done", flush=True)
"""


class Child:
    """Maps ``fd`` shared, or with -1 memory of its own; `write` makes it write bytes at these offsets.

    ``address``: where it is mapped.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _CHILD, str(fd), str(size_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,) if fd >= 0 else (),
            text=True,
        )
        self.pid = self.process.pid
        self.address = int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _order(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        assert self._answer() == "done"

    def write(self, *offsets: int) -> None:
        self._order(" ".join(map(str, offsets)))

    def page_out(self) -> None:
        """Have the kernel take all of it away, to swap if there is any."""
        self._order("out")

    def end(self) -> int:
        self.process.communicate()
        return self.process.returncode
