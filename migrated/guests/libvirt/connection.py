"""A connection to libvirt whose every call has a limit.

The binding blocks, so each call runs in a thread of its own; asyncio waits for it at most as long as its limit.  A thread cannot
be ended: one that libvirt never answers is left behind with its connection, and does not hold the agent up when it ends.

Events and keep-alives of all connections are handled in one thread by libvirt's own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from migrated.errors import GuestError, GuestRefusedError

T = TypeVar("T")

#: A libvirtd that does not answer keep-alives for so long is given up: three in a row.
_KEEPALIVE_SECONDS: Final = 5
_KEEPALIVES: Final = 3

#: Codes of a libvirtd that has ended, and may be started again.
_AWAY: Final = frozenset({"libvirt-unreachable", "libvirt-lost"})
_RETRY_SECONDS: Final = 0.2

#: Where distributions keep the binding for their own Python.
DISTRIBUTION = [
    "/usr/lib/python3/dist-packages",
    *(f"/usr/{lib}/python{sys.version_info.major}.{sys.version_info.minor}/site-packages" for lib in ("lib64", "lib")),
]


def binding(guest: str) -> tuple[Any, Any]:
    """The modules ``libvirt`` and ``libvirt_qemu``.  GuestRefusedError ``libvirt-missing`` where they are not installed."""
    try:
        _module("libvirtmod")
        _module("libvirtmod_qemu")
        return _module("libvirt"), _module("libvirt_qemu")
    except ImportError as error:
        raise GuestRefusedError(
            f"{_subject(guest)}: the agent's Python has no libvirt binding ({error})",
            code="libvirt-missing",
            hint="install the distribution's python3-libvirt, or `pip install migrated[libvirt]`, which needs libvirt-dev",
        ) from error


def _subject(guest: str) -> str:
    """Begin a message with the guest, or, without one, with what is missing from a list of all domains."""
    return f"guest {guest}" if guest else "libvirt's domains are not known"


def _module(name: str) -> Any:
    """A module of this Python, or the distribution's, which a virtual environment does not see.  Raises ImportError.

    One that was built for another version of Python is not found: its file's name says for which.
    """
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(name)
    spec = importlib.machinery.PathFinder.find_spec(name, DISTRIBUTION)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run_events(libvirt: Any) -> None:
    while True:
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


@functools.cache
def _start_events(libvirt: Any) -> None:
    """Once a process: so many event loops has libvirt."""
    libvirt.registerErrorHandler(_keep_silent, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, args=(libvirt,), name="libvirt events", daemon=True).start()


def _keep_silent(context: Any, error: Any) -> None:
    """Errors are raised; libvirt would print them, too."""


class Connection:
    """Made by `connect`; `close` when done with it.  ``guest`` is empty if it is for no guest in particular."""

    def __init__(self, guest: str, uri: str, libvirt: Any, qemu: Any, handle: Any) -> None:
        self.guest = guest
        self.uri = uri
        self.libvirt = libvirt
        self.qemu = qemu
        self.handle = handle

    @classmethod
    async def connect(cls, guest: str, uri: str, *, limit_seconds: float) -> Connection:
        """Connect.  Raises GuestError ``libvirt-unreachable``, or GuestRefusedError as `binding`."""
        libvirt, qemu = binding(guest)
        _start_events(libvirt)

        def work() -> Any:
            handle = libvirt.open(uri)
            handle.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVES)
            return handle

        try:
            handle = await _within(limit_seconds, work)
        except TimeoutError as error:
            raise _unreachable(guest, uri, f"no answer within {limit_seconds:g} s") from error
        except libvirt.libvirtError as error:
            raise _unreachable(guest, uri, str(error)) from error
        return cls(guest, uri, libvirt, qemu, handle)

    @property
    def alive(self) -> bool:
        """Whether the connection still stands."""
        if self.handle is None:
            return False
        try:
            return bool(self.handle.isAlive())
        except self.libvirt.libvirtError:
            return False

    async def call(self, what: str, function: Callable[..., T], *arguments: Any, limit_seconds: float) -> T:
        """Run a call of the binding.  GuestError ``libvirt-failed``, ``libvirt-lost``, ``libvirt-timeout``."""
        try:
            return await _within(limit_seconds, functools.partial(function, *arguments))
        except TimeoutError as error:
            raise GuestError(
                f"{_subject(self.guest)}: libvirt did not answer within {limit_seconds:g} s: {what}",
                code="libvirt-timeout",
                hint="something else (a backup, another command) may hold the domain: see `virsh domjobinfo`",
            ) from error
        except self.libvirt.libvirtError as error:
            raise self.error(what, error) from error

    def error(self, what: str, error: Any) -> GuestError:
        """What the binding has raised, by name."""
        # The library's own errors of its connection: it may not have noticed yet that this has ended.
        lost = not self.alive or error.get_error_domain() == self.libvirt.VIR_FROM_RPC
        return GuestError(
            f"{_subject(self.guest)}: {what}: {error}",
            code="libvirt-lost" if lost else "libvirt-failed",
            hint="was libvirtd restarted?" if lost else "",
        )

    async def domain(self, name: str, *, limit_seconds: float) -> Any | None:
        """The domain of this name; None if there is none."""
        return await self._find(self.handle.lookupByName, name, limit_seconds)

    async def domain_by_uuid(self, uuid: str, *, limit_seconds: float) -> Any | None:
        """The domain with this UUID; None if there is none."""
        return await self._find(self.handle.lookupByUUIDString, uuid, limit_seconds)

    async def _find(self, look_up: Callable[[str], Any], key: str, limit_seconds: float) -> Any | None:
        def work() -> Any | None:
            try:
                return look_up(key)
            except self.libvirt.libvirtError as error:
                if error.get_error_code() == self.libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

        return await self.call(f"looking for domain {key}", work, limit_seconds=limit_seconds)

    async def close(self) -> None:
        """Close it.  Idempotent.  A call that is under way in another thread ends with an error, sooner or later."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with contextlib.suppress(TimeoutError, self.libvirt.libvirtError):
                await _within(_KEEPALIVE_SECONDS, handle.close)


def _unreachable(guest: str, uri: str, why: str) -> GuestError:
    return GuestError(
        f"{_subject(guest)}: cannot connect to libvirt ({uri}): {why}",
        code="libvirt-unreachable",
        hint="is libvirtd (or virtqemud) running, and may the agent's user connect? Try `virsh -c URI list`",
    )


async def insist(work: Callable[[], Awaitable[T]], *, limit_seconds: float) -> T:
    """Do ``work``, again and again while libvirtd is away: a domain runs, and stands still, without it.

    Raises what ``work`` raises for another reason, or last within the limit.
    """
    deadline = time.monotonic() + limit_seconds
    while True:
        try:
            return await work()
        except GuestError as error:
            if error.code not in _AWAY or time.monotonic() > deadline:
                raise
        await asyncio.sleep(_RETRY_SECONDS)


def begin(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run it in a thread that holds nobody up; what becomes of it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # somebody may have stopped waiting

    def work() -> None:
        try:
            finish = functools.partial(_finish, future, function())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            finish = functools.partial(_fail, future, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish)

    threading.Thread(target=work, name="libvirt call", daemon=True).start()
    return future


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


async def _within(limit_seconds: float, function: Callable[[], T]) -> T:
    """`begin` and wait.  Cancelled, it is waited for all the same, within its limit: what comes next must not overtake it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_seconds
    future = begin(function)
    try:
        await asyncio.wait({future}, timeout=limit_seconds)
    except asyncio.CancelledError:
        while not future.done() and (left := deadline - loop.time()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future}, timeout=left)
        raise
    if not future.done():
        raise TimeoutError
    return future.result()
