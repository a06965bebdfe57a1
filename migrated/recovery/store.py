"""Who holds a migration's descriptors when the agent dies: the service manager's store, or a holder process of ours.

What must survive on a target: the guest's userfaultfd, its memfds, and the ledger; on a source: the frozen memory.  (The
guest process holds a userfaultfd of its own too, so that its threads go on waiting in any case.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from migrated.errors import HostError
from migrated.recovery import systemd
from migrated.waiting import in_thread

log = structlog.get_logger("migrated.recovery.store")

START_SECONDS = 10.0
LISTEN_TRIES = 50


class HolderGoneError(HostError):
    """The holder has ended: it holds nothing, or was killed."""


class DescriptorStore(Protocol):
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


class SystemdStore:
    """The service manager's descriptor store (``FileDescriptorStoreMax=``).

    It returns descriptors in random order, so each has a name of its own: the migration's, and its place.
    """

    def __init__(self) -> None:
        self._stored: dict[str, list[str]] = {}  # what is in the store for a name
        self.held: dict[str, list[int]] = {}  # duplicates of it

    async def taken(self) -> dict[str, list[int]]:
        """See DescriptorStore."""
        places: dict[str, dict[int, int]] = {}
        for stored, fds in systemd.take_stored_fds().items():
            name, _, place = stored.rpartition(".")
            if stored == systemd.PROBE_NAME:
                await in_thread(_forget_stored, stored)
            elif place.isdecimal():
                self._stored.setdefault(name, []).append(stored)
                places.setdefault(name, {})[int(place)] = fds.pop()
            else:  # of an agent of an earlier version, which gave all of them one name
                self._stored[stored] = [stored]
                places[stored] = dict(enumerate(fds))
                fds.clear()
            for fd in fds:
                os.close(fd)
        taken = {name: [fd for _, fd in sorted(fds.items())] for name, fds in places.items()}
        self.held = {name: [os.dup(fd) for fd in fds] for name, fds in taken.items()}
        return taken

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """See DescriptorStore."""
        await self.forget(name)
        self._stored[name] = [f"{name}.{place}" for place in range(len(fds))]
        self.held[name] = [os.dup(fd) for fd in fds]
        if not await in_thread(_store, self._stored[name], fds):
            raise HostError(
                "the service manager does not keep the descriptors that must survive this agent",
                code="descriptor-store",
                hint="raise FileDescriptorStoreMax= of this agent's unit",
            )

    async def forget(self, name: str) -> None:
        """See DescriptorStore."""
        for stored in self._stored.pop(name, []):
            await in_thread(_forget_stored, stored)
        for fd in self.held.pop(name, []):
            os.close(fd)


def _store(names: Sequence[str], fds: Sequence[int]) -> bool:
    """Whether the service manager keeps all of them.  HostError.  Blocks while it does not read."""
    with contextlib.ExitStack() as opened:
        for name, fd in zip(names, _distinct(fds, opened), strict=True):
            systemd.store_fd(name, fd)
    return systemd.keeps_fds()


def _forget_stored(stored: str) -> None:
    with contextlib.suppress(HostError):
        systemd.forget_fds(stored)


def _distinct(fds: Sequence[int], opened: contextlib.ExitStack) -> list[int]:
    """Descriptors of the same files, each an open file of its own: the manager takes duplicates of one for the same."""
    seen: set[tuple[int, int]] = set()
    result = []
    for fd in fds:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        own = fd
        if key in seen:
            with contextlib.suppress(OSError):  # one without a file (a userfaultfd) shares its number with all of these
                own = os.open(f"/proc/self/fd/{fd}", fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_CLOEXEC)
                opened.callback(os.close, own)
        seen.add(key)
        result.append(own)
    return result


class HolderStore:
    """A process of ours (`migrated.recovery.holder`), started when first needed, found again by its socket."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "holder.sock"
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()

    async def _connected(self) -> bool:
        """Whether there is a holder.  It may be slow to answer, here and in `_asked`: that must stop nothing else."""
        return await in_thread(self._connect)

    async def _asked(self, request: dict[str, str], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        def undo(answer: tuple[dict[str, Any], list[int]]) -> None:
            for fd in answer[1]:
                os.close(fd)

        return await in_thread(self._ask, request, fds, undo=undo)

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
                    # -P and cwd: what lies in the directory we were started in must not be run.
                    [sys.executable, "-P", "-m", "migrated.recovery.holder", str(self._path)],
                    check=False,
                    cwd="/",
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
                while not await self._connected():  # noqa: ASYNC110 - a socket tells nobody that it listens
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
        """See DescriptorStore."""
        async with self._lock:
            known = self._socket is not None
            if not await self._connected():
                return {}
            try:
                answer, _ = await self._asked({"op": "list"})
            except HolderGoneError:
                if known:
                    raise
                return {}  # it was just ending: one that holds something does not
            return {name: (await self._asked({"op": "take", "name": name}))[1] for name in answer.get("names", [])}

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """See DescriptorStore."""
        async with self._lock:
            known = self._socket is not None
            if not await self._connected():
                await self._start()
            try:
                answer, _ = await self._asked({"op": "keep", "name": name}, fds)
            except HolderGoneError:
                if known:  # it held what is others', too
                    raise
                await self._start()  # that one was just ending
                answer, _ = await self._asked({"op": "keep", "name": name}, fds)
        if not answer.get("ok"):
            raise HostError(f"the holder of descriptors refused: {answer.get('error')}", code="holder")

    async def forget(self, name: str) -> None:
        """See DescriptorStore.  With nothing left to hold we let go of the holder, and it ends."""
        async with self._lock:
            # Also of a holder that was being started when we gave up, and may not listen yet: nobody else will end it.
            for _ in range(LISTEN_TRIES):
                if await self._connected() or not os.path.lexists(self._path):  # noqa: ASYNC240 - a look at a local file
                    break
                await asyncio.sleep(0.01)
            if self._socket is None:
                return
            try:
                await self._asked({"op": "forget", "name": name})
                answer, _ = await self._asked({"op": "list"})
            except HostError as error:
                log.warning("cannot reach the holder of descriptors", error=str(error))
                return
            if not answer.get("names") and self._socket is not None:
                self._socket.close()
                self._socket = None


class CombinedStore:
    """Keeps in ``chosen``; takes back and forgets in both, since an agent before us may have chosen otherwise."""

    def __init__(self, chosen: DescriptorStore, other: DescriptorStore) -> None:
        self.chosen = chosen
        self._other = other

    async def copy_to_holder(self) -> None:
        """Have a holder keep what the store does, too: systemd before 254 empties it when a service has stopped."""
        if isinstance(self.chosen, SystemdStore):
            for name, fds in self.chosen.held.items():
                try:
                    await self._other.keep(name, fds)
                except HostError as error:
                    log.warning("what is kept may not outlive this stop", name=name, error=str(error))

    async def taken(self) -> dict[str, list[int]]:
        """See DescriptorStore."""
        found = await self._other.taken()
        for name, fds in (await self.chosen.taken()).items():
            for fd in found.get(name, []):
                os.close(fd)
            found[name] = fds
        return found

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """See DescriptorStore."""
        await self.chosen.keep(name, fds)

    async def forget(self, name: str) -> None:
        """See DescriptorStore."""
        await self.chosen.forget(name)
        await self._other.forget(name)


def store_for(state_dir: Path) -> DescriptorStore:
    """The service manager's store where there is one, a holder of our own elsewhere."""
    holder = HolderStore(state_dir)
    if not os.environ.get("NOTIFY_SOCKET"):
        return holder
    systemd_store = SystemdStore()
    try:
        problem = "" if systemd.keeps_fds() else "it has no descriptor store"
    except HostError as error:
        problem = error.message
    if not problem:
        return CombinedStore(systemd_store, holder)
    log.warning(
        "the service manager keeps no descriptors: a process of ours does",
        problem=problem,
        hint="FileDescriptorStoreMax= in this agent's unit, as in ours",
    )
    return CombinedStore(holder, systemd_store)
