"""The descriptor store: it keeps a migration's descriptors when the agent dies, in the service manager or in a holder.

On a target the guest's userfaultfd, its memfds and the ledger must survive; on a source, the frozen memory.  (The guest
process also holds the userfaultfd, so that its threads keep waiting in any case.)
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
    """The holder has exited: it held nothing, or was killed."""


class DescriptorStore(Protocol):
    """Descriptors by name, kept across the agent's death."""

    async def taken(self) -> dict[str, list[int]]:
        """Return what the previous agent left; call it once, at the start.  The caller owns the descriptors."""
        ...

    async def keep(self, name: str, fds: Sequence[int]) -> None:
        """Keep duplicates of these under a name.  Raises HostError."""
        ...

    async def forget(self, name: str) -> None:
        """Close the descriptors kept under a name.  Never raises."""
        ...


class SystemdStore:
    """The service manager's descriptor store (``FileDescriptorStoreMax=``).

    The manager returns descriptors in random order, so each has its own name: the migration's, and its position.
    """

    def __init__(self) -> None:
        self._stored: dict[str, list[str]] = {}  # names in the manager's store, by our name
        self.held: dict[str, list[int]] = {}  # duplicates of what is stored, by our name

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
            else:  # from an agent of an earlier version, which used one name for all
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
    """Store descriptors; return whether the service manager keeps them all.  HostError.  Blocks until it reads."""
    with contextlib.ExitStack() as opened:
        for name, fd in zip(names, _distinct(fds, opened), strict=True):
            systemd.store_fd(name, fd)
    return systemd.keeps_fds()


def _forget_stored(stored: str) -> None:
    with contextlib.suppress(HostError):
        systemd.forget_fds(stored)


def _distinct(fds: Sequence[int], opened: contextlib.ExitStack) -> list[int]:
    """Return descriptors of the same files, each its own open file: the manager keeps one of several duplicates."""
    seen: set[tuple[int, int]] = set()
    result = []
    for fd in fds:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        own = fd
        if key in seen:
            with contextlib.suppress(OSError):  # an anonymous inode (a userfaultfd) shares its number with all others
                own = os.open(f"/proc/self/fd/{fd}", fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_CLOEXEC)
                opened.callback(os.close, own)
        seen.add(key)
        result.append(own)
    return result


class HolderStore:
    """The holder process (`migrated.recovery.holder`), started when first needed, and found again by its socket."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "holder.sock"
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()

    async def _connected(self) -> bool:
        """Connect to the holder; return whether there is one.  Raises HostError if that cannot be found out.

        In a thread, as in `_asked`: a slow holder must not block others.
        """
        return await in_thread(self._connect)

    async def _asked(self, request: dict[str, str], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        def undo(answer: tuple[dict[str, Any], list[int]]) -> None:
            for fd in answer[1]:
                os.close(fd)

        return await in_thread(self._ask, request, fds, undo=undo)

    def _connect(self) -> bool:
        if self._socket is not None:
            return True
        with contextlib.ExitStack() as undo:
            try:
                sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.settimeout(START_SECONDS)
                sock.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            except OSError as error:  # there may be one, which holds something
                raise HostError(
                    f"cannot reach the holder of descriptors at {self._path}: {error.strerror or error}", code="holder"
                ) from error
            undo.pop_all()
        self._socket = sock
        return True

    async def _start(self) -> None:
        """Start the holder in its own session, so that it does not die with us."""

        def start() -> subprocess.CompletedProcess[str]:
            # Opened here: subprocess leaves its own /dev/null open when it is out of descriptors for the pipe.
            with Path(os.devnull).open("r+b") as null:
                return subprocess.run(
                    # -P and cwd: never run code from the directory we were started in.
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
                # Not the event loop's subprocess: uvloop does not see the end of the pipe while the holder lives.
                done = await in_thread(start)
                if done.returncode:
                    raise HostError(
                        f"no holder of descriptors can be started on {self._path}: status {done.returncode}, "
                        f"{done.stderr.strip().rpartition(chr(10))[2] or 'no output'}",
                        code="holder",
                        hint="agent.state_dir must be this user's directory, with free space",
                    )
                while not await self._connected():  # noqa: ASYNC110 - a socket tells nobody that it listens
                    await asyncio.sleep(0.01)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise HostError(f"the holder of descriptors does not answer on {self._path}", code="holder") from error
        except OSError as error:
            raise HostError(
                f"no holder of descriptors can be started on {self._path}: {error.strerror}",
                code="holder",
                hint="it keeps what must survive a crash of this agent; it needs a process and a few descriptors",
            ) from error

    def _ask(self, request: dict[str, str], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        sock = self._socket
        if sock is None:
            raise HostError("there is no holder of descriptors", code="holder")
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
                hint="it may have been killed; a crash of this agent cannot be recovered now",
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
                return {}  # it was just exiting: a holder that holds something does not
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
                if known:  # it also held descriptors of other migrations
                    raise
                await self._start()  # that one was just exiting
                answer, _ = await self._asked({"op": "keep", "name": name}, fds)
        if not answer.get("ok"):
            raise HostError(f"the holder of descriptors refused: {answer.get('error')}", code="holder")

    async def forget(self, name: str) -> None:
        """See DescriptorStore.  When nothing is left, disconnect from the holder, which then exits."""
        async with self._lock:
            try:
                # This includes a holder whose start we gave up on, and which may not listen yet: nobody else ends it.
                for _ in range(LISTEN_TRIES):
                    if await self._connected() or not os.path.lexists(self._path):  # noqa: ASYNC240 - a look at a local file
                        break
                    await asyncio.sleep(0.01)
                if self._socket is None:
                    return
                await self._asked({"op": "forget", "name": name})
                answer, _ = await self._asked({"op": "list"})
            except HostError as error:
                log.warning("cannot reach the holder of descriptors", error=str(error))
                return
            if not answer.get("names") and self._socket is not None:
                self._socket.close()
                self._socket = None


class CombinedStore:
    """Keep in ``chosen``; take and forget in both, since the previous agent may have chosen the other."""

    def __init__(self, chosen: DescriptorStore, other: DescriptorStore) -> None:
        self.chosen = chosen
        self._other = other

    async def copy_to_holder(self) -> None:
        """Copy the store's contents to a holder: systemd before 254 empties the store when a service has stopped."""
        if isinstance(self.chosen, SystemdStore):
            for name, fds in self.chosen.held.items():
                try:
                    await self._other.keep(name, fds)
                except HostError as error:
                    log.warning("the kept descriptors may not survive this stop", name=name, error=str(error))

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
    """Return the service manager's store if it has one, else a holder of our own."""
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
        "the service manager keeps no descriptors: using a holder process",
        problem=problem,
        hint="set FileDescriptorStoreMax= in this agent's unit, as the shipped unit does",
    )
    return CombinedStore(holder, systemd_store)
