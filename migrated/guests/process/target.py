"""Drive a co-operative guest that is to run here.

The driver starts it on our memory, takes over its faults, restores its state and runs it.  The process outlives the
agent: it has a session of its own and writes to a log file.  It keeps a userfaultfd of its own open until the agent
tells it to forget it, so that its threads keep waiting when the agent dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from pathlib import Path

import structlog

from migrated.errors import GuestError, GuestRefusedError, MigratedError, TimeoutExceededError
from migrated.guests import guest_log
from migrated.guests.access.pidfd import PidHandle, process_started
from migrated.guests.driver import Description, FaultSource, Memento, StateChannel, TargetGuest
from migrated.guests.process import connection as process
from migrated.guests.process.config import ProcessTargetConfig
from migrated.guests.process.wire import (
    MAX_PAYLOAD_BYTES,
    Hello,
    Kind,
)
from migrated.guests.start.process import admit, start, user_of
from migrated.memory.maps import find_mappings
from migrated.memory.native import uffd_register
from migrated.memory.regions import Mapping, Region, TargetMemory
from migrated.settings import Timeouts
from migrated.waiting import within

_log = structlog.get_logger(__name__)


class ProcessTarget(TargetGuest):
    """The target side of a `process` guest; see `TargetGuest`."""

    def __init__(self, name: str, config: ProcessTargetConfig, run_dir: Path, timeouts: Timeouts) -> None:
        self.name = name
        self._config = config
        self._timeouts = timeouts
        self._socket = run_dir / "guest.sock"
        self._log = run_dir / "guest.log"
        self._process: PidHandle | None = None
        self._connection: process.GuestConnection | None = None
        self._regions = 0
        self._uffd = -1
        self._return: asyncio.Task[process.GuestConnection] | None = None  # waits for a guest that connects again

    async def check(self, regions: tuple[Region, ...], description: Description) -> None:
        del regions, description  # the guest itself says what it wants, when it is started
        if shutil.which(self._config.command[0]) is None:
            raise GuestError(
                f"guest {self.name}: {self._config.command[0]} does not exist or is not a program",
                code="guest-start",
                hint="check the command of this guest in the target's configuration",
            )
        user_of(self.name, self._config)

    async def start(self, memory: tuple[TargetMemory, ...]) -> FaultSource:
        self._regions = len(memory)
        connection, hello = await self._launch()
        self._refuse_differences(hello, memory)
        given = {item.region.name: (index, item) for index, item in enumerate(memory)}
        ordered = [given[region.name] for region in hello.regions]
        limit = self._timeouts.guest_command
        addresses = await connection.map_memory(
            tuple(item.region.page_bytes for _, item in ordered),
            tuple(item.memory_fd for _, item in ordered),
            incoming=True,
            limit_seconds=limit,
        )
        mappings = tuple(
            Mapping(index, address, 0, item.region.size_bytes)
            for (index, item), address in zip(ordered, addresses, strict=True)
        )
        self._uffd = await connection.userfaultfd(faults=True, limit_seconds=limit)
        for mapping in mappings:
            uffd_register(self._uffd, mapping.address, mapping.length_bytes, missing=True, minor=True, tracking=False)
        for item in memory:
            # It is registered now: what the guest touched before is populated, what it touches from here on waits for
            # us.
            if os.fstat(item.memory_fd).st_blocks:
                raise GuestRefusedError(
                    f"guest {self.name} touched region {item.region.name} before its memory had arrived",
                    code="memory-preallocated",
                    hint="an incoming guest waits for run before it touches its memory",
                )
        return FaultSource(pid=connection.pid, uffd=self._uffd, mappings=mappings)

    async def _launch(self) -> tuple[process.GuestConnection, Hello]:
        """Start the program and wait until it has connected, or fail when it exits."""
        listener = self._listen()
        try:
            limit = self._timeouts.guest_start
            self._process = await start(
                self.name,
                self._config.command,
                self._config,
                pass_fds=(),
                output=self._log,
                limit_seconds=limit,
                environment={"MIGRATED_SOCKET": str(self._socket)},
            )
            accept = asyncio.ensure_future(self._accept(listener, self._process.pid))
            died = asyncio.ensure_future(self._process.died())
            try:
                await asyncio.wait({accept, died}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if not accept.done():
                    self._fail_start(died, limit)
            finally:
                for task in (accept, died):
                    task.cancel()
                await asyncio.gather(accept, died, return_exceptions=True)
                if not accept.cancelled():
                    self._connection = accept.result()  # also when we were cancelled: `close` closes it
            connection = accept.result()
        finally:
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                self._socket.unlink()
        hello, fds = await connection.hello(self._timeouts.guest_command)
        process.close_all(fds)
        return connection, hello

    def _listen(self) -> socket.socket:
        listener = process.listen(str(self._socket))
        try:
            admit(self._socket, user_of(self.name, self._config))
        except BaseException:
            listener.close()
            raise
        return listener

    async def _accept(self, listener: socket.socket, pid: int) -> process.GuestConnection:
        """Accept our process's connection: a process left by an earlier agent may still connect to the same socket."""
        while True:
            connection = process.GuestConnection(self.name, await process.accept(listener, self.name))
            if connection.pid == pid:
                return connection
            _log.warning(
                "a stranger connected to the guest's socket", guest=self.name, pid=connection.pid, expected=pid
            )
            connection.close()

    def _fail_start(self, died: asyncio.Future[str], limit: float) -> None:
        tail = guest_log.tail(self._log, 500)
        if died.done():
            raise GuestError(
                f"guest {self.name}: its program {died.result()} before it connected: {tail or 'it said nothing'}",
                code="guest-start",
                hint=f"its output is in {self._log}",
            )
        raise TimeoutExceededError(
            f"guest {self.name}: waited {limit:g} s for it to connect to {self._socket}"
            + (tail and f"; it said: {tail}"),
            hint=f"does it use MIGRATED_SOCKET, in the very process that was started?  Its output is in {self._log}",
        )

    def _refuse_differences(self, hello: Hello, memory: tuple[TargetMemory, ...]) -> None:
        process.require_version(self.name, hello)
        ours = {region.name: region.size_bytes for region in hello.regions}
        theirs = {item.region.name: item.region.size_bytes for item in memory}
        if ours.keys() != theirs.keys():
            raise GuestRefusedError(
                f"guest {self.name} has regions {', '.join(sorted(ours))} here, {', '.join(sorted(theirs))} on the source",
                code="regions-differ",
                hint="start the same program on both hosts",
            )
        for name, size in ours.items():
            if theirs[name] != size:
                raise GuestRefusedError(
                    f"guest {self.name}: region {name} has {size} bytes here, {theirs[name]} on the source",
                    code="sizes-differ",
                    hint="start the guest with the same size on both hosts",
                )

    async def _guest(self) -> process.GuestConnection:
        """Return the connection.  After `adopt`, or if it broke, wait for it: the guest connects again by itself."""
        if self._process is None:
            raise GuestError(f"guest {self.name} is not started", code="guest-not-open")
        if self._connection is not None and self._connection.alive:
            return self._connection
        if (end := self._process.poll()) is not None:
            raise GuestError(f"guest {self.name}: its process {self._process.pid} {end}", code="guest-gone")
        if self._return is None or self._return.done():
            self._return = self._wait_for_return(self._process.pid)
        async with within(self._timeouts.guest_command, "it to connect again", who=f"guest {self.name}"):
            return await asyncio.shield(self._return)

    def _wait_for_return(self, pid: int) -> asyncio.Task[process.GuestConnection]:
        task = asyncio.ensure_future(self._take_back(self._listen(), pid))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def load_state(self, channel: StateChannel) -> None:
        state = bytearray()
        while piece := await channel.read():
            state += piece
            if len(state) > MAX_PAYLOAD_BYTES:
                raise GuestError(f"guest {self.name}: its state has more than {MAX_PAYLOAD_BYTES} bytes")
        await (await self._guest()).request(
            Kind.RESTORE, bytes(state), limit_seconds=self._timeouts.guest_state, what="it to take its state"
        )
        await channel.close_write()

    async def resume(self) -> None:
        await (await self._guest()).request(Kind.RUN, limit_seconds=self._timeouts.guest_command, what="it to run")

    async def release(self) -> None:
        connection = await self._guest()
        await connection.request(
            Kind.FORGET, limit_seconds=self._timeouts.guest_command, what="it to close its userfaultfd"
        )
        await connection.send(Kind.LEAVE, self._config.next_socket.encode())

    async def kill(self) -> None:
        if self._process is not None:
            await self._process.kill(self._timeouts.abort)
        if self._connection is not None:
            self._connection.close()

    def memento(self) -> Memento:
        pid = self._process.pid if self._process is not None else 0
        return {"started": process_started(pid)}

    async def adopt(self, pid: int, uffd: int, memory: tuple[TargetMemory, ...], memento: Memento) -> FaultSource:
        self._process = PidHandle.attach(pid, started=int(memento.get("started", 0)))
        found = tuple(find_mappings(pid, item.memory_fd, region=index) for index, item in enumerate(memory))
        if not all(found):
            raise GuestError(f"guest {self.name}: process {pid} does not map its memory", code="guest-gone")
        self._uffd = uffd
        self._regions = len(memory)
        self._return = self._wait_for_return(pid)
        return FaultSource(pid=pid, uffd=uffd, mappings=tuple(mapping for part in found for mapping in part))

    async def _take_back(self, listener: socket.socket, pid: int) -> process.GuestConnection:
        """Wait for the guest to connect again, once no page that it needs is missing.  Try again after a failure."""
        try:
            while True:
                connection = await self._accept(listener, pid)
                try:
                    await self._greet(connection)
                except MigratedError as error:
                    _log.warning("a guest that connected again was lost", guest=self.name, reason=error.message)
                    connection.close()
                except BaseException:
                    connection.close()
                    raise
                else:
                    self._connection = connection
                    return connection
        finally:
            listener.close()
            self._socket.unlink(missing_ok=True)

    async def _greet(self, connection: process.GuestConnection) -> None:
        limit = self._timeouts.guest_command
        _, fds = await connection.hello(limit)
        process.close_all(fds)
        await connection.map_memory((0,) * self._regions, incoming=True, limit_seconds=limit)

    async def close(self) -> None:
        if self._return is not None:
            self._return.cancel()
            await asyncio.gather(self._return, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
        uffd, self._uffd = self._uffd, -1
        if uffd >= 0:
            os.close(uffd)
        if self._process is not None:
            self._process.close()

    async def died(self) -> str:
        if self._process is None:
            raise GuestError(f"guest {self.name} is not started", code="guest-not-open")
        return await self._process.died()
