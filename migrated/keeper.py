"""Who holds a migration's descriptors when the agent dies: the service manager's store, or a holder process of ours.

What must survive on a target: the guest's userfaultfd, its memfds, and the ledger; on a source: the frozen memory.  (The
guest process holds a userfaultfd of its own too, so that its threads go on waiting in any case.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from migrated import service
from migrated.errors import HostError
from migrated.waiting import in_thread

log = structlog.get_logger("migrated.keeper")

START_SECONDS = 10.0
LISTEN_TRIES = 50


class HolderGoneError(HostError):
    """The holder has ended: it holds nothing, or was killed."""


class Keeper(Protocol):
    """Descriptors by name, across our death."""

    async def taken(self) -> dict[str, list[int]]:
        """What an agent before us left, once, at the start.  The descriptors are the caller's."""
        ...

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """Hold duplicates of these under a name.  HostError."""
        ...

    async def forget(self, name: str) -> None:
        """Close what is held under a name.  Never raises."""
        ...


class ServiceKeeper:
    """The service manager's descriptor store (``FileDescriptorStoreMax=``)."""

    async def taken(self) -> dict[str, list[int]]:
        """See Keeper."""
        return service.take_stored_fds()

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """See Keeper."""
        service.store_fds(name, fds)

    async def forget(self, name: str) -> None:
        """See Keeper."""
        with contextlib.suppress(HostError):
            service.forget_fds(name)


class HolderKeeper:
    """A process of ours (`migrated.holder`), started when first needed, found again by its socket."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "holder.sock"
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()

    def _connect(self) -> bool:
        if self._socket is not None:
            return True
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(START_SECONDS)
        try:
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            return False
        self._socket = sock
        return True

    async def _start(self) -> None:
        """The holder, in a session of its own: it must not die with us."""

        def start() -> subprocess.CompletedProcess[str]:
            # Opened here: subprocess leaves its own /dev/null open when it is out of descriptors for the pipe.
            with Path(os.devnull).open("r+b") as null:
                return subprocess.run(
                    [sys.executable, "-m", "migrated.holder", str(self._path)],
                    check=False,
                    stdin=null,
                    stdout=null,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                    timeout=START_SECONDS,
                )

        try:
            async with asyncio.timeout(START_SECONDS):
                # Not the event loop's subprocess: under uvloop the end of the pipe is not seen while the holder lives.
                done = await in_thread(start)
                if done.returncode:
                    raise HostError(
                        f"no holder of descriptors can be started on {self._path}: status {done.returncode}, "
                        f"{done.stderr.strip().rpartition(chr(10))[2] or 'not a word'}",
                        code="holder",
                        hint="agent.state_dir must be a directory of this user's, with room",
                    )
                while not self._connect():  # noqa: ASYNC110 - a socket tells nobody that it listens
                    await asyncio.sleep(0.01)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise HostError(f"the holder of descriptors does not answer on {self._path}", code="holder") from error
        except OSError as error:
            raise HostError(
                f"no holder of descriptors can be started on {self._path}: {error.strerror}",
                code="holder",
                hint="it keeps what survives a crash of this agent: it needs a few descriptors and a process",
            ) from error

    def _ask(self, request: dict[str, str], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        sock = self._socket
        if sock is None:
            raise HostError("no holder of descriptors is there", code="holder")
        try:
            socket.send_fds(sock, [json.dumps(request).encode()], list(fds))
            data, received, _, _ = socket.recv_fds(sock, 1 << 16, 250)
            if not data:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            for fd in received:
                os.set_inheritable(fd, False)
            answer: dict[str, Any] = json.loads(data)
        except (OSError, ValueError) as error:
            sock.close()
            self._socket = None
            gone = isinstance(error, BrokenPipeError | ConnectionResetError)
            raise (HolderGoneError if gone else HostError)(
                f"the holder of descriptors at {self._path} failed: {error}",
                code="holder",
                hint="it may have been killed; a crash of this agent could not be survived now",
            ) from error
        return answer, received

    async def taken(self) -> dict[str, list[int]]:
        """See Keeper."""
        known = self._socket is not None
        if not self._connect():
            return {}
        try:
            answer, _ = self._ask({"op": "list"})
        except HolderGoneError:
            if known:
                raise
            return {}  # it was just ending: one that holds something does not
        return {name: self._ask({"op": "take", "name": name})[1] for name in answer.get("names", [])}

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """See Keeper."""
        async with self._lock:
            known = self._socket is not None
            if not self._connect():
                await self._start()
            try:
                answer, _ = self._ask({"op": "keep", "name": name}, fds)
            except HolderGoneError:
                if known:  # it held what is others', too
                    raise
                await self._start()  # that one was just ending
                answer, _ = self._ask({"op": "keep", "name": name}, fds)
        if not answer.get("ok"):
            raise HostError(f"the holder of descriptors refused: {answer.get('error')}", code="holder")

    async def forget(self, name: str) -> None:
        """See Keeper.  With nothing left to hold we let go of the holder, and it ends."""
        async with self._lock:
            # Also of a holder that was being started when we gave up, and may not listen yet: nobody else will end it.
            for _ in range(LISTEN_TRIES):
                if self._connect() or not os.path.lexists(self._path):  # noqa: ASYNC240 - a look at a local file
                    break
                await asyncio.sleep(0.01)
            if self._socket is None:
                return
            try:
                self._ask({"op": "forget", "name": name})
                answer, _ = self._ask({"op": "list"})
            except HostError as error:
                log.warning("cannot reach the holder of descriptors", error=str(error))
                return
            if not answer.get("names") and self._socket is not None:
                self._socket.close()
                self._socket = None


def keeper_for(state_dir: Path) -> Keeper:
    """The service manager's store where one started us, a holder of our own elsewhere."""
    return ServiceKeeper() if os.environ.get("NOTIFY_SOCKET") else HolderKeeper(state_dir)
