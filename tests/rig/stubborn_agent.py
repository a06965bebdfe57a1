"""An agent whose interpreter can be brought to a standstill: ``python -m tests.rig.stubborn_agent SOCKET target --config …``.

Whoever connects to SOCKET and sends a number gets ``held``; then for so many seconds no Python in this process runs, since
a C function sleeps without giving the interpreter lock away.  Then ``free``.  The rest is the agent as it is.
"""

from __future__ import annotations

import ctypes
import socket
import sys
import threading

from migrated.cli import main


def _stand_still(listener: socket.socket) -> None:
    libc = ctypes.PyDLL(None)  # unlike CDLL keeps the lock during a call
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
