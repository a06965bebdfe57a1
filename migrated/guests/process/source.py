"""Drive a co-operative guest that runs here.

`ProcessHub` is the socket where it connects, and `ProcessSource` is one migration away.  The guest connects when it
starts, long before any migration, and gets its memory from us.  The memory belongs to the guest as much as to us: when
the agent restarts, the guest connects again and presents the descriptors it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog

from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests.access.pidfd import PidHandle, process_started
from migrated.guests.driver import Memento, Outline, SourceGuest, StateChannel
from migrated.guests.process import connection as process
from migrated.guests.process.config import ProcessSourceConfig
from migrated.guests.process.wire import (
    HELLO_DIRECT_IO,
    HELLO_PAUSED,
    HELLO_PRESENTS,
    Hello,
    Kind,
)
from migrated.memory import memfd
from migrated.memory.maps import areas, file_key, mapped_elsewhere
from migrated.memory.regions import Mapping, Region, SourceMemory
from migrated.settings import Timeouts

#: Wait this long after listening has failed.
LISTEN_AGAIN_SECONDS = 5.0
#: A guest needs one connection, and a second one for a moment when it is started again.
MAX_CONNECTIONS = 8

_log = structlog.get_logger(__name__)


@dataclasses.dataclass(slots=True)
class ConnectedGuest:
    """A guest that is connected and has its memory.

    ``paused``: somebody stopped it and nobody has run it since; `ask` keeps this up to date.
    """

    connection: process.GuestConnection
    regions: tuple[Region, ...]
    memory_fds: tuple[int, ...]
    addresses: tuple[int, ...]
    direct_io: bool
    paused: bool = False

    async def ask(self, kind: Kind, *, limit_seconds: float, what: str) -> bytes:
        """Send a request as `process.GuestConnection.request` does, and keep ``paused`` up to date."""
        if kind is Kind.PAUSE:
            self.paused = True  # perhaps, even if its answer never comes
        answer = await self.connection.request(kind, limit_seconds=limit_seconds, what=what)
        if kind is Kind.RUN:
            self.paused = False
        return answer


class ProcessHub:
    """Listens for one configured guest while entered; ``guest`` is the guest once it has connected."""

    def __init__(self, name: str, config: ProcessSourceConfig, timeouts: Timeouts) -> None:
        self.name = name
        self.timeouts = timeouts
        self.guest: ConnectedGuest | None = None
        self._config = config
        if config.page_size is not None:
            memfd.require_page_size(config.page_size)
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._settling = asyncio.Lock()
        self._listening = False
        self._problem = ""  # why nobody can connect

    async def __aenter__(self) -> Self:
        listener = self._listen()
        self._spawn(self._accept(listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listening:
            await asyncio.to_thread(Path(self._config.socket).unlink, missing_ok=True)

    async def wait_connected(self, limit_seconds: float, *, pid: int | None = None) -> ConnectedGuest:
        """Wait until the guest (the one with this pid, if given) is connected.  Raises TimeoutExceededError."""

        def here() -> bool:
            return self.guest is not None and pid in (None, self.guest.connection.pid)

        try:
            async with asyncio.timeout(limit_seconds), self._changed:
                await self._changed.wait_for(here)
        except TimeoutError:
            raise TimeoutExceededError(
                f"guest {self.name}: waited {limit_seconds:g} s for it to connect to {self._config.socket}"
            ) from None
        if self.guest is None:
            raise AssertionError
        return self.guest

    def require(self) -> ConnectedGuest:
        """Return the guest.  Raises GuestError ``guest-not-connected``."""
        if self.guest is None or not self.guest.connection.alive:
            raise GuestError(
                f"guest {self.name} is not connected" + (f": {self._problem}" if self._problem else ""),
                code="guest-not-connected",
                hint=f"start it with MIGRATED_SOCKET={self._config.socket} in its environment",
            )
        return self.guest

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _listen(self) -> socket.socket | None:
        """Listen, or return None if that fails: then this guest cannot connect, but the other guests are served."""
        try:
            listener = process.listen(self._config.socket)
        except GuestError as error:
            if self._problem != error.message:
                _log.error("guests cannot connect", guest=self.name, reason=error.message, hint=error.hint)
            self._problem = error.message
            return None
        self._problem = ""
        self._listening = True
        return listener

    async def _accept(self, listener: socket.socket | None) -> None:
        while listener is None:
            await asyncio.sleep(LISTEN_AGAIN_SECONDS)
            listener = self._listen()
        with listener:
            while True:
                sock = await process.accept(listener, self.name)
                if len(self._tasks) > MAX_CONNECTIONS:  # this one is among them
                    _log.warning("too many connections", guest=self.name)
                    sock.close()
                    continue
                self._spawn(self._serve(process.GuestConnection(self.name, sock)))

    async def _serve(self, connection: process.GuestConnection) -> None:
        """Serve one connection from its HELLO to its end."""
        fds: tuple[int, ...] = ()
        try:
            hello, fds = await connection.hello(self.timeouts.guest_command)
            async with self._settling:  # two that connect at the same time must not both find the place free
                await self._forget_former()
                if self.guest is not None:
                    raise GuestRefusedError(f"guest {self.name} is already connected", code="guest-connected")
                self.guest = guest = await self._settle(connection, hello, fds)
            fds = guest.memory_fds
            async with self._changed:
                self._changed.notify_all()
            _log.info("guest connected", guest=self.name, pid=connection.pid)
            _log.info("guest disconnected", guest=self.name, reason=await asyncio.shield(connection.closed))
        except MigratedError as error:
            _log.warning("guest refused", guest=self.name, reason=error.message, code=error.code)
            with contextlib.suppress(GuestError):
                await connection.send(Kind.REFUSE, error.message.encode())
        finally:
            if self.guest is not None and self.guest.connection is connection:
                self.guest = None
            connection.close()
            for fd in fds:
                os.close(fd)

    async def _forget_former(self) -> None:
        """Forget a guest whose connection has ended: the end may still be unread, so read it first."""
        former = self.guest
        if former is None or not former.connection.hung_up:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.timeouts.guest_command):
                await asyncio.shield(former.connection.closed)
            if self.guest is former:
                self.guest = None

    async def _settle(
        self, connection: process.GuestConnection, hello: Hello, presented: tuple[int, ...]
    ) -> ConnectedGuest:
        """Give the guest its memory, or take over the memory that it presents."""
        process.require_version(self.name, hello)
        fds: list[int] = []
        pages: list[int] = []
        try:
            if hello.flags & HELLO_PRESENTS:
                if len(presented) != len(hello.regions):
                    raise GuestRefusedError(
                        f"guest {self.name} shows {len(presented)} pieces of memory for its regions"
                    )
                for region, fd in zip(hello.regions, presented, strict=True):
                    pages.append(_shown_page_bytes(self.name, region.name, fd, region.size_bytes))
            else:
                for region in hello.regions:
                    fd, page = await asyncio.to_thread(
                        memfd.reserve,
                        region.size_bytes,
                        self._config.page_size,
                        name=region.name,
                        reserved=self._config.reserve,
                    )
                    fds.append(fd)
                    pages.append(page)
            addresses = await connection.map_memory(
                tuple(pages), tuple(fds), incoming=False, limit_seconds=self.timeouts.guest_command
            )
        except BaseException:
            process.close_all(fds)
            raise
        return ConnectedGuest(
            connection,
            tuple(Region(r.name, r.size_bytes, page) for r, page in zip(hello.regions, pages, strict=True)),
            tuple(fds) if fds else presented,
            addresses,
            direct_io=bool(hello.flags & HELLO_DIRECT_IO),
            paused=bool(hello.flags & HELLO_PAUSED),
        )


def _shown_page_bytes(guest: str, name: str, fd: int, size_bytes: int) -> int:
    """Return the page size of a memory file that a guest presents.

    Raises GuestRefusedError if the file differs from the guest's claim.
    """
    try:
        info = os.fstat(fd)
        page = os.fstatvfs(fd).f_bsize
    except OSError as error:
        raise GuestRefusedError(f"guest {guest}: region {name}: {error.strerror}") from error
    if info.st_size < size_bytes or page not in memfd.page_sizes():
        raise GuestRefusedError(
            f"guest {guest}: the memory shown for region {name} has {info.st_size} bytes, not {size_bytes}",
            code="memory-not-shared",
        )
    return page


class ProcessSource(SourceGuest):
    """The source side of a `process` guest; see `SourceGuest`."""

    def __init__(self, name: str, hub: ProcessHub) -> None:
        self.name = name
        self.paused_at = None
        self._hub = hub
        self._timeouts = hub.timeouts
        self._guest: ConnectedGuest | None = None
        self._process: PidHandle | None = None
        self._fds: list[int] = []
        self._uffd = -1

    async def open(self) -> SourceMemory:
        guest = self._hub.require()
        if guest.paused:
            raise GuestRefusedError(
                f"guest {self.name} is paused: an earlier migration stopped it, and it may run elsewhere",
                code="guest-not-movable",
                hint="if it runs nowhere else, restart the source agent: it resumes a guest that was not handed over",
            )
        self._guest = guest  # not earlier: rolling back must not run a guest that this migration never stopped
        pid = guest.connection.pid
        self._process = PidHandle.attach(pid)
        keys = frozenset(file_key(fd) for fd in guest.memory_fds)
        mapped = {area.start for area in areas(pid) if area.key in keys}
        if not mapped.issuperset(guest.addresses):
            raise GuestRefusedError(f"guest {self.name} does not map its memory where it said", code="guest-protocol")
        for other in await asyncio.to_thread(mapped_elsewhere, keys, (pid, os.getpid())):
            raise GuestRefusedError(
                f"guest {self.name}: its memory is also mapped by {other}, whose writes cannot be seen",
                code="memory-mapped-elsewhere",
                hint="end that process, or have it unmap the memory",
            )
        self._fds = [os.dup(fd) for fd in guest.memory_fds]
        return SourceMemory(
            pid=pid,
            regions=guest.regions,
            mappings=tuple(
                Mapping(index, address, 0, region.size_bytes)
                for index, (address, region) in enumerate(zip(guest.addresses, guest.regions, strict=True))
            ),
            memory_fds=tuple(self._fds),
            file_offsets=tuple(0 for _ in self._fds),
        )

    async def outline(self) -> Outline:
        guest = self._hub.require()
        return Outline("paused" if guest.paused else "running", sum(region.size_bytes for region in guest.regions))

    @property
    def needs_quiesced_scans(self) -> bool:
        return self._guest is not None and self._guest.direct_io

    def _opened(self) -> ConnectedGuest:
        if self._guest is None:
            raise GuestError(f"guest {self.name} is not open", code="guest-not-open")
        return self._guest

    async def _ask(self, kind: Kind, what: str, limit_seconds: float | None = None) -> bytes:
        limit = self._timeouts.guest_command if limit_seconds is None else limit_seconds
        return await self._opened().ask(kind, limit_seconds=limit, what=what)

    async def tracking_uffd(self) -> int:
        if self._uffd < 0:
            connection = self._opened().connection
            self._uffd = await connection.userfaultfd(faults=False, limit_seconds=self._timeouts.guest_command)
        return self._uffd

    async def release_tracking(self) -> None:
        uffd, self._uffd = self._uffd, -1
        if uffd < 0:
            return
        os.close(uffd)
        if self._guest is not None and self._guest.connection.alive:
            with contextlib.suppress(GuestError):  # it exited in between, and its descriptor with it
                await self._ask(Kind.FORGET, "it to close its userfaultfd")

    async def quiesce(self) -> None:
        await self._ask(Kind.PAUSE, "it to reach a safe point", self._timeouts.guest_pause)

    async def unquiesce(self) -> None:
        await self._ask(Kind.RUN, "it to run on")

    async def pause(self, channel: StateChannel) -> None:
        del channel
        self.paused_at = time.monotonic()
        await self._ask(Kind.PAUSE, "it to reach a safe point", self._timeouts.guest_pause)

    async def send_state(self, channel: StateChannel) -> None:
        await channel.write(await self._ask(Kind.STATE, "its state", self._timeouts.guest_state))
        await channel.close_write()

    async def resume(self) -> None:
        await self._ask(Kind.RUN, "it to run on here")

    def memento(self) -> Memento:
        pid = self._process.pid if self._process is not None else 0
        return {"started": process_started(pid)}

    async def reclaim(self, memento: Memento) -> None:
        del memento
        self._guest = await self._hub.wait_connected(self._timeouts.guest_start)
        # The guest closed its userfaultfd if the agent before us died, but not if this agent gave the guest away and
        # takes it back.
        await self._ask(Kind.FORGET, "it to close its userfaultfd")
        await self.resume()

    async def adopt(self, pid: int, memento: Memento) -> None:
        with contextlib.suppress(GuestError):  # it has exited
            self._process = PidHandle.attach(pid, started=int(memento.get("started", 0)))

    async def release(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(GuestError, TimeoutExceededError):
            # After a restart of the agent the guest connects by itself, some time after `adopt`.
            self._guest = await self._hub.wait_connected(self._timeouts.guest_command, pid=self._process.pid)
            await self._ask(Kind.END, "it to end")
        try:
            await self._process.wait(self._timeouts.release)
        except TimeoutExceededError:
            # The guest runs elsewhere: the process left here must not run.
            await self._process.kill(self._timeouts.release)

    async def close(self) -> None:
        uffd, self._uffd = self._uffd, -1
        if uffd >= 0:
            os.close(uffd)
        while self._fds:
            os.close(self._fds.pop())
        if self._process is not None:
            self._process.close()

    async def died(self) -> str:
        return "ended while no agent watched it" if self._process is None else await self._process.died()
