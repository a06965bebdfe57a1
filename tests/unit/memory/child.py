"""A process that maps shared memory and writes it where it is told to."""

from __future__ import annotations

import subprocess
import sys

_CHILD = """
import mmap, os, sys
fd, size = int(sys.argv[1]), int(sys.argv[2])
memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
print("ready", flush=True)
for line in sys.stdin:
    for word in line.split():
        memory[int(word)] = (memory[int(word)] + 1) % 256
    print("done", flush=True)
"""


class Child:
    """Maps ``fd``; `write` makes it write bytes at these offsets."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _CHILD, str(fd), str(size_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            text=True,
        )
        self.pid = self.process.pid
        self._expect("ready")

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def write(self, *offsets: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, offsets)) + "\n")
        self.process.stdin.flush()
        self._expect("done")

    def end(self) -> int:
        self.process.communicate()
        return self.process.returncode
