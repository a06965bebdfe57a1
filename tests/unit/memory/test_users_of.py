"""Who holds the memory of a guest whose process no journal names."""

from __future__ import annotations

import os
import subprocess
import sys

from migrated.memory import memfd
from migrated.target.memory import users_of


def test_only_a_process_that_holds_an_agents_memfd_is_found() -> None:
    ours = memfd.allocate(4096, 4096, "ram")
    strange = os.memfd_create("ram", os.MFD_CLOEXEC)  # a stranger's, whatever its number is
    try:
        inodes = [os.fstat(fd).st_ino for fd in (ours, strange)]
        code = "import sys; print('up', flush=True); sys.stdin.read()"
        for held, found in ((ours, True), (strange, False)):
            with subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"up\n"
                assert users_of(inodes) == ([process.pid] if found else [])
                process.communicate()
        assert users_of(inodes) == []
    finally:
        os.close(ours)
        os.close(strange)
