"""Run an agent as a process: state directory, control socket, status site, signals, service manager, one event loop.

The order matters.  We lock the state directory first, so that two agents never share one.  Then the sites listen, so
that a port in use is known before any guest is touched.  Then the agent works.  On SIGTERM the agent finishes safely
while the control socket still answers, so that one can see what it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import fcntl
import gc
import os
import signal
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop
from aiohttp import web

from migrated import __version__, config, log
from migrated.agent.record import State
from migrated.errors import ConfigError, HostError, MigratedError, TimeoutExceededError, error_fields
from migrated.http.access import Access, Peer
from migrated.http.control import control_app
from migrated.http.guard import Guard, address_of, http_log
from migrated.http.remote import RemoteControl
from migrated.http.status import status_app
from migrated.recovery import systemd
from migrated.waiting import cancel_and_wait, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from migrated.address import Address
    from migrated.agent.host_agent import HostAgent
    from migrated.config import AgentConfig, Role

ProtocolFactory = Callable[[], asyncio.Protocol]

LOCK_NAME: Final = "agent.lock"
#: How often the service manager gets health and status if its watchdog does not ask for more.
STATUS_SECONDS: Final = 5.0
#: The time that we request from the service manager, repeatedly, while a start or a stop takes long for a good reason.
EXTEND_SECONDS: Final = 60
#: How long sites may finish their current answers; event streams end by themselves.
SITE_SHUTDOWN_SECONDS: Final = 2.0
#: A burst of connections must not use up the kernel's queue, or everybody else connects 1 s late.
BACKLOG: Final = 1024
_READY_POLL_SECONDS: Final = 0.05
#: More than there ever are: a call would rather start one more thread than wait for another call.
_THREADS_MAX: Final = 1 << 16

logger = structlog.get_logger("migrated.daemon")


def run(role: Role, path: str | None, *, log_level: str = "info", log_format: str = "auto") -> int:
    """Run the agent of ``role`` until SIGTERM or SIGINT; return its exit code.

    It is 2 for a wrong configuration and 1 for other failures.  Raises ConfigError for the file itself.  On a terminal
    a later failure is raised too, elsewhere it is logged.
    """
    settings = config.load(path, role)
    for_people = log.configure(level=log_level, fmt=log_format)
    faulthandler.enable()  # the service manager ends a stuck agent with SIGABRT: show where it was stuck
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(settings))
    except MigratedError as error:
        if for_people:
            raise
        logger.error("the agent has failed", **error_fields(error))  # noqa: TRY400 - expected: no traceback
        # This status tells the service manager that another start would end the same way.
        return 2 if isinstance(error, ConfigError) else 1
    except Exception:
        logger.exception("the agent has failed: this is a bug")
        return 1
    return 0


async def _main(settings: AgentConfig) -> None:
    # Install the signal handlers first: a signal that comes while we start must also end us in order.
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, number, stop)
    loop.set_default_executor(blocking_calls())
    agent = build_agent(settings)
    # A collection that scans everything imported takes tens of milliseconds, and may come while a guest is paused.
    gc.collect()
    gc.freeze()
    reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    await serve(settings, agent, stop, reload)


def blocking_calls() -> ThreadPoolExecutor:
    """Return threads for everything that blocks, started on demand and used again: no call ever waits for another.

    asyncio's own pool has 6 threads on a host with 2 processors.  The journal entry before COMMIT, written while a
    guest is paused, would queue behind work that reserves or releases other guests' memory, or behind a disk that hangs.
    """
    return ThreadPoolExecutor(_THREADS_MAX, thread_name_prefix="blocking")


def build_agent(settings: AgentConfig) -> HostAgent[Any]:
    """Make the agent of ``settings.role``; imported here, since a source does not need a target's modules."""
    if settings.role == "source":
        from migrated.source.agent import SourceAgent

        return SourceAgent(settings)
    from migrated.target.agent import TargetAgent

    return TargetAgent(settings)


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        logger.warning("still stopping: bringing every guest to a safe state", signal=number.name)
        return
    logger.info("stopping", signal=number.name)
    stop.set()


async def serve(
    settings: AgentConfig, agent: HostAgent[Any], stop: asyncio.Event, reload: asyncio.Event | None = None
) -> None:
    """Serve ``agent`` on its sites and run it until ``stop``; each time ``reload`` is set, read the configuration again.

    Raises HostError and whatever the agent's run raises.
    """
    access = Access.of(settings.control, settings.path)
    about = {"name": settings.agent.name, "version": __version__, "pid": os.getpid()}
    _make_state_dir(settings.state_dir)
    with _locked(settings.state_dir):
        async with _sites(settings, agent, about, access):
            logger.info(
                "agent up",
                role=settings.role,
                version=__version__,
                control=str(settings.control_socket),
                status=str(settings.status_address or "off"),
                guests=sorted(settings.guests),
            )
            _warn_of_openness(settings)
            work = asyncio.create_task(agent.run(stop), name="agent")
            beside = [
                asyncio.create_task(_tell_service_manager(agent, stop, work), name="service-manager"),
                asyncio.create_task(_reload_on(reload or asyncio.Event(), agent), name="reload"),
            ]
            if agent.credentials is not None:
                beside.append(asyncio.create_task(agent.credentials.watch(), name="credentials"))
            try:
                await _finish(settings, agent, stop, work)
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.wait(beside)
    logger.info("agent down", role=settings.role)


async def _reload_on(event: asyncio.Event, agent: HostAgent[Any]) -> None:
    """Each time ``event`` is set, read the configuration again.  One that is wrong changes nothing and is logged."""
    while True:
        await event.wait()
        event.clear()
        if agent.credentials is not None:
            agent.credentials.current()
        path, role = agent.config.path, agent.config.role
        try:
            waiting = await agent.reload(await in_thread(config.load, path, role))
        except MigratedError as error:
            logger.warning("the configuration was not reloaded", **error_fields(error))
            continue
        except Exception:
            logger.exception("the configuration was not reloaded: this is a bug")
            continue
        logger.info("configuration reloaded", path=path, guests=agent.guests())
        if waiting:
            logger.warning("some of the configuration has to wait for the agent's next start", tables=waiting)


async def _finish(settings: AgentConfig, agent: HostAgent[Any], stop: asyncio.Event, work: asyncio.Task[None]) -> None:
    """Wait until the agent's run has finished, because of ``stop`` or because of an error of its own.

    After ``stop`` it may take as long as guests need this process.  Without such guests the agent keeps
    timeouts.shutdown in each of its waits; after twice as long it is stuck.
    """
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        await _notify("STOPPING=1", "STATUS=stopping: bringing every guest to a safe state")
    while stop.is_set() and not work.done():
        limit = 2 * settings.timeouts.shutdown
        await asyncio.wait({work}, timeout=limit)
        if not work.done() and not _is_needed(agent):
            work.cancel()
            await asyncio.wait({work}, timeout=settings.timeouts.shutdown)
            message = f"the agent did not stop within {limit:g} s"
            raise TimeoutExceededError(
                message, hint="guests wait or run on; raise timeouts.shutdown if it was only slow"
            )
    work.result()
    if not stop.is_set():
        message = "the agent stopped without being asked to"
        raise MigratedError(message, hint="this is a bug: please report it")


def _is_needed(agent: HostAgent[Any]) -> bool:
    """Whether a guest in post-copy is being served: without this process it would stall at its next missing page."""
    return any(record.state is State.POSTCOPY for record in agent.records(ended=False))


# ---------------------------------------------------------------- state directory


def _make_state_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _state_dir_error(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _state_dir_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _state_dir_error(path: Path, error: OSError) -> HostError:
    hint = "create it for this user, run as root, or set agent.state_dir to a directory of this user's"
    return HostError(f"state directory {path}: {error.strerror}", code="state-dir", hint=hint)


@contextlib.contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Hold the directory against another agent.  The kernel releases the lock when the process exits."""
    path = state_dir / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _state_dir_error(path, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            message = f"state directory {state_dir}: another agent runs on it, process {pid}"
            hint = "stop that one, or give this one another agent.state_dir"
            raise HostError(message, code="already-running", hint=hint) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


# ---------------------------------------------------------------- sites


@contextlib.asynccontextmanager
async def _sites(
    settings: AgentConfig, agent: HostAgent[Any], about: dict[str, Any], access: Access
) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        guard = Guard(lambda transport: Peer.of(transport).uid)
        factory = await _runner(stack, control_app(agent, about, access), guard)
        stack.callback((await _listen_control(factory, settings.control_socket)).close)
        stack.callback(settings.control_socket.unlink, missing_ok=True)
        access.apply(settings.control_socket)
        if settings.control.listen is not None and (files := settings.control_tls_files) is not None:
            remote = RemoteControl(settings.control.listen, files, settings.control.peers)
            factory = await _runner(stack, control_app(agent, about, remote), Guard(address_of))
            await remote.open()
            stack.callback(remote.close)
            stack.push_async_callback(cancel_and_wait, asyncio.create_task(remote.serve(factory), name="remote"))
        if (address := settings.status_address) is not None:
            hosts = {address.host, settings.agent.name, socket.gethostname()}
            factory = await _runner(stack, status_app(agent, about, hosts=hosts), Guard(address_of))
            stack.callback((await _listen_status(settings, factory, address)).close)
        yield


async def _runner(stack: contextlib.AsyncExitStack, app: web.Application, guard: Guard) -> ProtocolFactory:
    """Start an application; return the factory of its connections."""
    app.middlewares.insert(0, guard.busy)
    runner = web.AppRunner(
        app, handle_signals=False, access_log=None, logger=http_log, shutdown_timeout=SITE_SHUTDOWN_SECONDS
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    return guard.protocol(runner.server)


def _remove_stale_socket(path: Path) -> None:
    """Remove a dead agent's socket: we hold the lock, so nobody uses it.  Leave any other kind of file alone."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            message = f"control socket {path}: there is a file of another kind in its place"
            raise HostError(message, code="state-dir", hint="move it away, or set another agent.state_dir")
        path.unlink()


async def _listen_control(factory: ProtocolFactory, path: Path) -> asyncio.AbstractServer:
    _remove_stale_socket(path)
    # Nobody else may connect, not even between bind and chmod.
    former = os.umask(0o177)
    try:
        return await asyncio.get_running_loop().create_unix_server(factory, str(path), backlog=BACKLOG)
    except OSError as error:
        message = f"control socket {path}: {error.strerror}"
        raise HostError(message, code="state-dir", hint="set agent.state_dir to a directory of this user's") from error
    finally:
        os.umask(former)


async def _listen_status(settings: AgentConfig, factory: ProtocolFactory, address: Address) -> asyncio.AbstractServer:
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_server(factory, address.host, address.port, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"status site: {address} is in use by another program"
            hint = 'set http.status to a free port, or to "" for no status site'
            raise HostError(message, code="address", hint=hint) from error
        message = f"{settings.path}: http.status: cannot listen on {address}: {error.strerror or error}"
        raise ConfigError(message, code="address", hint="allowed: an address of this host") from error


def _warn_of_openness(settings: AgentConfig) -> None:
    if settings.role == "target" and settings.tls.trusted_network:
        logger.warning(
            "guest memory is accepted unencrypted and from anybody who can connect",
            listen=str(settings.listen_address),
            hint="give both agents certificates: `migrated certificates --help`",
        )
    if settings.status_address is not None and not settings.status_address.is_loopback:
        logger.warning(
            "the status site shows guests and peers to anybody who can connect",
            status=str(settings.status_address),
            hint="let it listen on loopback, and put a proxy with authentication in front of it",
        )


# ---------------------------------------------------------------- service manager


async def _tell_service_manager(agent: HostAgent[Any], stop: asyncio.Event, work: asyncio.Task[None]) -> None:
    """Send READY once the agent can work, and STATUS; while it is healthy also WATCHDOG and requests for more time."""
    watchdog = systemd.watchdog_seconds()
    pause = min(STATUS_SECONDS, watchdog / 3) if watchdog else STATUS_SECONDS
    ready = False
    healthy_before = True
    while not work.done():
        health = agent.health()
        if health.ready and not ready:
            ready = True
            await _notify("READY=1")
        if not stop.is_set():
            await _notify(f"STATUS={status_line(agent)}")
        elif _is_needed(agent):
            await _notify(
                f"STATUS=serving guests in post-copy until all their memory has arrived: {status_line(agent)}"
            )
        if health.healthy and (not ready or (stop.is_set() and _is_needed(agent))):
            await _notify(f"EXTEND_TIMEOUT_USEC={EXTEND_SECONDS * 1_000_000}")
        if health.healthy and watchdog:
            await _notify("WATCHDOG=1")
        if health.healthy != healthy_before:
            logger.log(20 if health.healthy else 40, "health", healthy=health.healthy, reasons=health.reasons)
            healthy_before = health.healthy
        # Poll: health has no event, and an agent is ready within moments of its start.
        await asyncio.sleep(pause if ready else _READY_POLL_SECONDS)


def status_line(agent: HostAgent[Any]) -> str:
    """Return one line for ``systemctl status``."""
    health = agent.health()
    if not health.healthy:
        return "unhealthy: " + "; ".join(health.reasons)
    live = agent.records(ended=False)
    if not live:
        return "ready" if health.ready else "not ready: " + "; ".join(health.reasons)
    return f"{len(live)} under way: " + ", ".join(f"{one.guest} ({one.state.value})" for one in live)


async def _notify(*assignments: str) -> None:
    """Notify the service manager, which may be slow to read.  A failure is no reason to exit."""
    try:
        await in_thread(systemd.notify, *assignments)
    except HostError as error:
        logger.warning("cannot notify the service manager", **error_fields(error))
