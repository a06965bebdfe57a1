"""The holder: a process that does nothing but keep descriptors, for agents without a service manager.

    python -m migrated.recovery.holder SOCKET

When an agent is killed, its guests' userfaultfds, memfds and ledgers stay here, under one name per migration, and the
next agent fetches them.  The holder exits when it holds nothing and nobody is connected, or when nobody ever connects.

The process that is started exits with status 0 as soon as the socket listens.  The holder is its orphaned child, so
nobody needs to wait for it.

Each packet (SOCK_SEQPACKET) carries one JSON request, with the descriptors attached:
``{"op": "keep", "name": …}`` + descriptors, ``{"op": "forget", "name": …}``, ``{"op": "list"}``, ``{"op": "take", "name": …}``.
The answer is ``{"ok": true, …}``, for ``take`` with the descriptors attached; the holder keeps its own copies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys

MAX_PACKET_BYTES = 1 << 16
MAX_FDS = 250  # SCM_MAX_FD is 253
#: If nobody has connected after this time, the agent that started us has died.
FIRST_SECONDS = 60.0


class Holder:
    """Keep descriptors by name and serve the requests of agents."""

    def __init__(self, path: str) -> None:
        self._held: dict[str, list[int]] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - pathlib would double this process's size
        former = os.umask(0o177)
        self._listener.bind(path)
        os.umask(former)
        self._listener.listen(8)  # before the started process exits: whoever waits for that may connect at once
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._path = path
        self._connections = 0

    def run(self) -> None:
        """Serve until nothing is held and nobody is connected."""
        served = False
        while not served or self._held or self._connections:
            ready = self._selector.select(None if served else FIRST_SECONDS)
            if not ready:
                break
            for key, _ in ready:
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    self._selector.register(connection, selectors.EVENT_READ)
                    self._connections += 1
                    served = True
                elif isinstance(key.fileobj, socket.socket):
                    self._serve(key.fileobj)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108 - as above

    def _serve(self, connection: socket.socket) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(connection, MAX_PACKET_BYTES, MAX_FDS)
        except OSError:
            data, fds = b"", []
        if not data:
            self._selector.unregister(connection)
            connection.close()
            self._connections -= 1
            return
        answer, given = self._answer(data, fds)
        with contextlib.suppress(OSError):
            socket.send_fds(connection, [json.dumps(answer).encode()], given)

    def _answer(self, data: bytes, fds: list[int]) -> tuple[dict[str, object], list[int]]:
        try:
            request = json.loads(data)
            name = str(request.get("name", ""))
            match request["op"]:
                case "keep":
                    self._forget(name)
                    self._held[name] = list(fds)
                    fds = []
                    return {"ok": True}, []
                case "forget":
                    self._forget(name)
                    return {"ok": True}, []
                case "list":
                    return {"ok": True, "names": sorted(self._held)}, []
                case "take":
                    return {"ok": name in self._held}, self._held.get(name, [])
                case other:
                    raise ValueError(f"unknown request {other!r}")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return {"ok": False, "error": str(error)}, []
        finally:
            for fd in fds:  # descriptors that are not kept
                os.close(fd)

    def _forget(self, name: str) -> None:
        for fd in self._held.pop(name, []):
            os.close(fd)


if __name__ == "__main__":
    holder = Holder(sys.argv[1])
    if os.fork():
        os._exit(0)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)  # the process that started us reads these pipes until they are closed
    os.dup2(null, 2)
    holder.run()
