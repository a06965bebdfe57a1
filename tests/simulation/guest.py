"""Models of the guest and of its two drivers.

The guest's processes belong to hosts and outlive agents.  Each page holds the number of the guest's last write to it.  A page
that arrives late or never is therefore detected when the guest touches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any, Final, Self

from migrated.errors import GuestError, GuestRefusedError
from migrated.guests.driver import FaultSource, Outline, SourceGuest, TargetGuest
from migrated.memory.regions import Mapping, Region, SourceMemory
from tests.simulation.loop import current

PAGE_BYTES: Final = 4096
_INODES: Final = itertools.count(1)


class Memory:
    """A memfd, which holds the number of the last write for each page."""

    def __init__(self, region: int, pages: int) -> None:
        self.region = region
        self.pages = [0] * pages
        self.st_size = pages * PAGE_BYTES  # as os.fstat returns it
        self.st_ino = next(_INODES)


class Uffd:
    """A userfaultfd of a guest process."""


class Process:
    """A process of the guest: the original one on the source, or one that was started on a target."""

    def __init__(self, world: Any, host: Any, memory: list[Memory], state: str) -> None:
        self.world = world
        self.host = host
        self.memory = memory
        self.state = state  # running, paused, moved, incoming, loaded, dead
        self.pid, self.started = world.new_pid()
        self.migration = ""  # that brings it here
        self.tracked = False
        self.registered = state == "incoming"  # its faults wait for an agent
        self.holds_uffd = self.registered
        self.mapped: set[tuple[int, int]] = set()
        self.waiting: dict[tuple[int, int], list[asyncio.Future[None]]] = {}
        self.engine: Any = None
        self.watchers: list[asyncio.Future[str]] = []
        self.dirty: set[tuple[int, int]] = set()  # written since the last scan
        host.processes[self.pid] = self

    def __repr__(self) -> str:
        return f"{self.host.name}:{self.pid}({self.state})"

    @property
    def alive(self) -> bool:
        return self.state != "dead"

    def become(self, state: str) -> None:
        """Change the state.  This is the only place where a process starts or stops running."""
        if self.state == "dead":
            return
        self.state = state
        self.world.trace(f"guest {self}")
        if state == "running":
            self.world.check_single()
            if self.registered:
                self.run_here()

    def run_here(self) -> None:
        """Touch a few pages when the guest starts to run here."""
        for where in self.world.choose_pages(self, 2):
            self.touch(where)

    def kill(self) -> None:
        """An agent ends it.  What COMMIT was sent for is not an agent's to end."""
        if self.alive and self.migration in self.world.given - self.world.decided:
            self.world.violation(f"an agent ends {self}, and COMMIT was sent")
        self.die()

    def die(self) -> None:
        if self.state == "dead":
            return
        self.state = "dead"
        self.world.trace(f"guest {self}")
        for watcher in self.watchers:
            if not watcher.done():
                watcher.set_result("was killed")

    # ------------------------------------------------------------ memory

    def write_some(self) -> None:
        """Do the writes that the guest has made since the last scan."""
        if self.state != "running":
            return
        for region, page in self.world.choose_pages(self, self.world.busy):
            self.world.write_number += 1
            self.world.truth[region][page] = self.world.write_number
            self.memory[region].pages[page] = self.world.write_number
            self.dirty.add((region, page))

    def touch(self, where: tuple[int, int]) -> None:
        """Access a page; if it is not mapped, fault and wait until it is."""
        if not self.registered or where in self.mapped:
            return
        self.waiting.setdefault(where, [])
        if self.engine is not None:
            self.engine.fault(where)

    def map(self, where: tuple[int, int], *, poisoned: bool = False) -> None:
        """Map a page, verify its contents, and wake its waiters."""
        if where in self.mapped:
            return
        self.mapped.add(where)
        region, page = where
        if not poisoned and self.memory[region].pages[page] != self.world.truth[region][page]:
            self.world.violation(
                f"page {where} of {self} is {self.memory[region].pages[page]}, not {self.world.truth[region][page]}"
            )
        for future in self.waiting.pop(where, []):
            if not future.done():
                future.set_result(None)

    async def needs(self, where: tuple[int, int]) -> None:
        """Wait for a page, like a guest command that touches memory."""
        if not self.registered or where in self.mapped:
            return
        future = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(where, []).append(future)
        self.touch(where)
        await future

    async def died(self) -> str:
        if self.state == "dead":
            return "was killed"
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.watchers.append(future)
        return await future


class SimPidHandle:
    """Model of `PidHandle` for a simulated process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    def attach(cls, pid: int) -> SimPidHandle:
        process = current().host.processes.get(pid)
        if process is None or not process.alive:
            raise GuestError(f"process {pid} cannot be watched", code="guest-gone")
        return cls(process)

    async def kill(self, limit_seconds: float) -> None:
        del limit_seconds
        await asyncio.sleep(0.001)
        self._process.kill()

    def close(self) -> None: ...


class SourceDriver(SourceGuest):
    """Source driver of the simulated guest."""

    def __init__(self, world: Any, host: Any, name: str) -> None:
        self._world = world
        self._host = host
        self._name = name
        self._process: Process | None = None
        self._fds: list[int] = []
        self._uffd = -1
        self.closed = False

    def _find(self) -> Process:
        living = [process for process in self._host.processes.values() if process.alive]
        if not living:
            raise GuestError(f"{self._name} is not there", code="guest-unreachable")
        return living[-1]  # type: ignore[no-any-return]

    @property
    def _guest(self) -> Process:
        if self._process is None or not self._process.alive:
            raise GuestError(f"{self._name} is gone", code="guest-gone")
        return self._process

    async def open(self) -> SourceMemory:
        await self._host.command("open")
        process = self._find()
        if self._world.style == "qemu" and process.state not in {"running", "paused"}:
            raise GuestRefusedError(f"{self._name} is {process.state}", code="guest-not-movable")
        self._process = process
        for memory in process.memory:
            self._fds.append(current().open(memory))
        regions = tuple(
            Region(f"region{index}", memory.st_size, PAGE_BYTES) for index, memory in enumerate(process.memory)
        )
        mappings = tuple(Mapping(index, 0, 0, region.size_bytes) for index, region in enumerate(regions))
        return SourceMemory(process.pid, regions, mappings, tuple(self._fds), tuple(0 for _ in regions))

    async def outline(self) -> Outline:
        return Outline(self._guest.state, sum(memory.st_size for memory in self._guest.memory))

    @property
    def needs_quiesced_scans(self) -> bool:
        return bool(self._world.quiesced)

    async def tracking_uffd(self) -> int:
        await self._host.command("tracking_uffd")
        self._guest.tracked = True
        self._uffd = current().open(Uffd())
        return self._uffd

    async def release_tracking(self) -> None:
        if self._uffd >= 0:
            fd, self._uffd = self._uffd, -1
            current().close(fd)
        if self._process is not None:
            self._process.tracked = False

    async def quiesce(self) -> None:
        await self._host.command("quiesce")

    async def unquiesce(self) -> None:
        await self._host.command("unquiesce")

    async def pause(self, channel: Any) -> None:
        await self._host.command("pause")
        self._guest.write_some()
        self._guest.become("paused")
        if self._world.early_state:
            await channel.write(b"s" * 10)

    async def send_state(self, channel: Any) -> None:
        await self._host.command("send_state")
        await channel.write(b"s" * 100)
        await channel.close_write()
        while await channel.read():
            pass
        self._guest.become("moved")

    async def resume(self) -> None:
        await self._host.command("resume")
        self._guest.become("running")

    async def release(self) -> None:
        await self._host.command("release")
        if self._process is not None:
            self._process.die()

    def memento(self) -> dict[str, Any]:
        return {"tracked": self._uffd >= 0, "pid": self._process.pid if self._process is not None else 0}

    async def reclaim(self, memento: Any) -> None:
        await self._host.command("reclaim")
        self._process = self._find()
        self._process.tracked = False
        self._process.become("running")

    async def adopt(self, pid: int, memento: Any) -> None:
        await self._host.command("adopt")
        if memento["pid"] != pid:
            self._world.violation(f"the memento of process {pid} says {memento}")
        self._process = self._host.processes.get(pid)

    async def close(self) -> None:
        fds, self._fds = self._fds, []
        if self._uffd >= 0:
            fds.append(self._uffd)
            self._uffd = -1
        for fd in fds:
            current().close(fd)

    async def died(self) -> str:
        if self._process is None:
            raise GuestError(f"{self._name} is not open", code="guest-not-open")
        return await self._process.died()


class TargetDriver(TargetGuest):
    """Target driver of the simulated guest."""

    def __init__(self, world: Any, host: Any, name: str) -> None:
        self._world = world
        self._host = host
        self._name = name
        self._process: Process | None = None
        self._uffd = -1

    @property
    def _guest(self) -> Process:
        if self._process is None or not self._process.alive:
            raise GuestError(f"{self._name} is gone", code="guest-gone")
        return self._process

    async def check(self, regions: Any, description: Any) -> None:
        await self._host.command("check")
        if any(process.alive for process in self._host.processes.values()):
            raise GuestRefusedError(f"{self._name} runs here already", code="guest-exists")

    async def start(self, memory: Any) -> FaultSource:
        await self._host.command("start")
        self._process = Process(
            self._world, self._host, [current().fds[piece.memory_fd] for piece in memory], "incoming"
        )
        self._process.migration = next(m.id for m in self._host.agent._migrations if m._guest is self)
        await self._host.command("started")
        self._uffd = current().open(Uffd())
        mappings = tuple(Mapping(index, 0, 0, piece.region.size_bytes) for index, piece in enumerate(memory))
        return FaultSource(self._process.pid, self._uffd, mappings)

    async def load_state(self, channel: Any) -> None:
        size = 0
        while piece := await channel.read():
            size += len(piece)
        await self._host.command("load_state")
        if self._world.loading_touches:
            await self._guest.needs((0, 0))
        self._guest.become("loaded")
        await channel.close_write()

    async def resume(self) -> None:
        await self._host.command("resume")
        if self._world.resuming_touches:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._world.timeouts.guest_command):
                    await self._guest.needs((0, 1))
        if (0, 1) not in self._guest.mapped and self._world.resuming_touches:
            raise GuestError("it does not answer", code="guest-timeout")
        self._guest.become("running")

    async def release(self) -> None:
        await self._host.command("release")
        self._guest.holds_uffd = False

    async def kill(self) -> None:
        if self._process is not None:
            await asyncio.sleep(self._world.command_seconds())
            self._process.kill()

    def memento(self) -> dict[str, Any]:
        return {}

    async def adopt(self, pid: int, uffd: int, memory: Any, memento: Any) -> FaultSource:
        await self._host.command("adopt")
        self._process = self._host.processes.get(pid)
        if self._process is None or not self._process.alive:
            raise GuestError("it has ended", code="guest-gone")
        self._uffd = uffd
        mappings = tuple(Mapping(index, 0, 0, piece.region.size_bytes) for index, piece in enumerate(memory))
        return FaultSource(pid, uffd, mappings)

    async def close(self) -> None:
        fd, self._uffd = self._uffd, -1
        if fd >= 0:
            current().close(fd)

    async def died(self) -> str:
        if self._process is None:
            raise GuestError(f"{self._name} is not open", code="guest-not-open")
        return await self._process.died()


class SimGuestRegistry:
    """Model of `GuestRegistry`: every name refers to the one simulated guest."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._host = current().host

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def source_guest(self, name: str, requested: Any = None) -> SourceDriver:
        return SourceDriver(self._host.world, self._host, name)

    def target_guest(self, name: str) -> TargetDriver:
        return TargetDriver(self._host.world, self._host, name)

    def remove_run_dir(self, name: str) -> None: ...


def users_of(inodes: tuple[int, ...]) -> list[int]:
    """Model of `target.memory.users_of`."""
    return [
        process.pid
        for process in current().host.processes.values()
        if process.alive and any(memory.st_ino in inodes for memory in process.memory)
    ]
