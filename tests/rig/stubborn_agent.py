"""An agent whose interpreter can be stopped: ``python -m tests.rig.stubborn_agent SOCKET target --config …``.

A client connects to SOCKET and sends a number of seconds.  It receives ``held``; for that time no Python code in this
process runs, because a C function sleeps while holding the interpreter lock.  Then the client receives ``free``.
Everything else is the unmodified agent.
"""

from __future__ import annotations

import ctypes
import socket
import sys
import threading

from migrated.cli import main


def _stand_still(listener: socket.socket) -> None:
    libc = ctypes.PyDLL(None)  # unlike CDLL, holds the lock during a call
    while True:
        connection, _ = listener.accept()
        with connection:
            seconds = int(connection.recv(16))
            connection.sendall(b"held\n")
            libc.sleep(seconds)
            connection.sendall(b"free\n")


if __name__ == "__main__":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv.pop(1))
    listener.listen(1)
    threading.Thread(target=_stand_still, args=(listener,), daemon=True).start()
    sys.exit(main())
