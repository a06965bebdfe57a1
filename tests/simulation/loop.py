"""An event loop with virtual time, and simulated processes that can be killed between any two of its callbacks.

The loop never waits.  When no callback is ready, the clock jumps to the next timer.  A callback belongs to the `Life` in
whose context it was scheduled.  When that life has ended, its callbacks are dropped: a killed process executes nothing more,
not even a ``finally``.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import heapq
import os
from collections.abc import Callable
from typing import Any


class KilledError(BaseException):
    """Raised in a thread whose life ends while the thread runs."""


class Life:
    """One simulated process from start to exit: its descriptors, and the context that its tasks inherit."""

    def __init__(self, name: str, host: Any) -> None:
        self.name = name
        self.host = host
        self.alive = True
        self.doomed = False  # is killed at the next disk operation
        self.fds: dict[int, Any] = {}
        self.next_fd = 3
        self.versions: tuple[int, int] = host.versions  # of the protocol and of the journal
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)

    def open(self, thing: Any) -> int:
        """Return a new descriptor of ``thing``.  Raises OSError EMFILE while the host is out of descriptors."""
        if self.host.out_of_descriptors():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self.install(thing)

    def install(self, thing: Any) -> int:
        """Return a new descriptor of ``thing``, regardless of the limit."""
        number, self.next_fd = self.next_fd, self.next_fd + 1
        self.fds[number] = thing
        return number

    def close(self, number: int) -> None:
        """Close a descriptor.  Closing a number that is not open is a bug in the code under test."""
        if number not in self.fds:
            self.host.world.violation(f"{self.name} closes descriptor {number}, which is not open")
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        thing = self.fds.pop(number)
        closing = getattr(thing, "descriptor_closed", None)
        if closing is not None:
            closing()


LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


def current() -> Life:
    """Return the life that is executing."""
    life = LIFE.get()
    if life is None:
        raise RuntimeError("no simulated process executes this")
    return life


class Loop(asyncio.BaseEventLoop):
    """See the module.  ``delay`` returns the seconds that a step of a thread takes."""

    def __init__(self, delay: Callable[[], float]) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0
        self.in_thread = False
        self.ended: Callable[[Life], None] = lambda life: None
        self.versions: tuple[int, int] | None = None
        self.speak: Callable[[tuple[int, int]], None] = lambda versions: None
        self.sockets: Any = None
        self._delay = delay
        self._ready: Any
        self._scheduled: Any
        self._timer_cancelled_count = 0

    def time(self) -> float:
        return self.now

    def step(self) -> bool:
        """Execute one callback.  Returns False if nothing is left to execute, ever."""
        ready = self._ready
        if not ready:
            scheduled = self._scheduled
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)
            if not scheduled:
                return False
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            self.now = max(self.now, timer._when)
            ready.append(timer)
        handle = ready.popleft()
        if handle._cancelled:
            return True
        life = handle._context.get(LIFE)
        if life is None or life.alive:
            self.steps += 1
            if life is not None and life.versions != self.versions:
                self.versions = life.versions
                self.speak(life.versions)
            handle._run()
        return True

    def next_time(self) -> float:
        """Return the time at which the next callback is due."""
        if self._ready:
            return self.now
        while self._scheduled and self._scheduled[0]._cancelled:
            heapq.heappop(self._scheduled)
        return float(self._scheduled[0]._when) if self._scheduled else float("inf")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Ignore it: nothing reads these reports."""

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Run a function as a thread: it starts after a short delay, and its result arrives after another."""
        del executor
        future = self.create_future()

        def execute() -> None:
            self.in_thread = True
            try:
                result, error = func(*args), None
            except KilledError:
                self.ended(current())
                return
            except Exception as problem:  # noqa: BLE001 - passed to the waiter
                result, error = None, problem
            finally:
                self.in_thread = False
            self.call_later(self._delay(), tell, result, error)

        def tell(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self._delay(), execute)
        return future

    # ------------------------------------------------------------ sockets: network.py

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        return [(0, 0, 0, "", (host, port))]

    async def sock_connect(self, sock: Any, address: Any) -> None:
        await self.sockets.connect(sock, address)

    async def sock_accept(self, sock: Any) -> Any:
        return await self.sockets.accept(sock)

    async def sock_recv(self, sock: Any, n: int) -> bytes:
        return bytes(await sock.endpoint.read(n))

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        sock.endpoint.send(bytes(data))

    async def create_connection(self, protocol_factory: Any, *_: Any, sock: Any = None, **__: Any) -> Any:
        protocol = protocol_factory()
        return self.sockets.transport(sock, protocol), protocol
