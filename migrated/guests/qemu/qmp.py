"""Talk to the monitor of one QEMU process over QMP: every wait has a limit, and every failure has a code.

The codes are ``qmp-unreachable`` (nobody listens), ``qmp-busy`` (no greeting: another client holds the monitor),
``qmp-lost`` (an established connection was lost), ``qmp-timeout``, and ``qmp-failed`` (QEMU refused; the message quotes
it).
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate, StateError

from migrated.errors import GuestError
from migrated.privileged import open_files

#: For callers without a configuration: the default of timeouts.guest_command.
COMMAND_SECONDS = 10.0
#: We wait for events, but query the status at least this often: an event sent before we listened is not lost for us.
POLL_SECONDS = 0.25
#: The size of sockaddr_un.sun_path without its NUL.
SOCKET_PATH_BYTES = 107

_UCRED = struct.Struct("iII")
#: Marks the descriptors that `MonitorCommands.add_fd` gave to QEMU.
FDS_OF_OURS = "migrated"


class MonitorCommands(abc.ABC):
    """Commands to QEMU, whoever carries them: a QMP session of ours, or libvirt.

    Every wait has a limit; failures are GuestErrors: ``qmp-failed``, ``qmp-lost``, ``qmp-timeout``.
    """

    guest: str
    #: Whether commands that are given together reach QEMU in the order in which they were given.
    keeps_order = False

    @property
    @abc.abstractmethod
    def alive(self) -> bool:
        """Whether the session is still connected."""

    @abc.abstractmethod
    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, limit: float | None = None
    ) -> Any:
        """Run one command.  Raises GuestError ``qmp-failed``, ``qmp-lost`` or ``qmp-timeout``."""

    @abc.abstractmethod
    async def add_fd(self, fd: int) -> int:
        """Give QEMU a descriptor in a descriptor set of its own (add-fd); return the set's number."""

    async def share(self, fd: int) -> str:
        """Give QEMU a descriptor, and return the file name by which its commands write to it."""
        return f"/dev/fdset/{await self.add_fd(fd)}"

    @abc.abstractmethod
    async def event(self, seconds: float) -> None:
        """Wait for the next event, at most ``seconds``."""

    @abc.abstractmethod
    def saw(self, name: str) -> bool:
        """Whether this event has come since `forget_events`; forgets all events that have."""

    @abc.abstractmethod
    def forget_events(self) -> None:
        """Forget all events.  Call before a command whose events matter."""

    @abc.abstractmethod
    async def close(self) -> None:
        """End the session; QEMU then accepts the next client.  Idempotent."""

    async def hmp(self, line: str) -> str:
        """Run a human monitor command, for what QMP lacks."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def remove_fds(self) -> None:
        """Have QEMU close what `share` gave it, in any session.  It does so only while the guest runs."""
        for fdset in await self.execute("query-fdsets"):
            if any(entry.get("opaque") == FDS_OF_OURS for entry in fdset["fds"]):
                await self.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})

    async def status(self) -> str:
        """Return QEMU's run state (``running``, ``paused``, ``postmigrate`` …)."""
        return str((await self.execute("query-status"))["status"])

    async def migration(self) -> dict[str, Any]:
        """Return ``query-migrate``; it has no ``status`` if there was no migration yet."""
        result: dict[str, Any] = await self.execute("query-migrate")
        return result

    async def wait_status(self, unwanted: frozenset[str], *, limit: float) -> str:
        """Wait until the run state is none of ``unwanted``; return it.  Raises GuestError ``qmp-timeout``."""
        deadline = time.monotonic() + limit
        while (status := await self.status()) in unwanted:
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(
                    f"guest {self.guest}: QEMU stayed in run state {status} for {limit:g} s", code="qmp-timeout"
                )
            await self.event(min(left, POLL_SECONDS))
        return status


class Monitor(MonitorCommands):
    """One QMP session.  Make it with `connect`."""

    keeps_order = True

    def __init__(
        self,
        guest: str,
        path: Path,
        client: QMPClient,
        sock: socket.socket,
        *,
        command_seconds: float = COMMAND_SECONDS,
    ) -> None:
        self.guest = guest
        self.path = path
        self._command_seconds = command_seconds
        self._client = client
        self._socket = sock
        self._events: EventListener = EventListener(("MIGRATION", "STOP", "RESUME", "SHUTDOWN"))
        client.register_listener(self._events)

    @classmethod
    async def connect(
        cls,
        guest: str,
        path: Path,
        *,
        command_seconds: float = COMMAND_SECONDS,
        greeting_seconds: float | None = None,
    ) -> Monitor:
        """Connect and negotiate.  Raises GuestError ``qmp-unreachable`` or ``qmp-busy``.

        ``command_seconds``: limit of the greeting, and of every command that has no limit of its own.
        """
        if greeting_seconds is None:
            greeting_seconds = command_seconds
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            raise GuestError(
                f"guest {guest}: the QMP socket's path {path} is longer than {SOCKET_PATH_BYTES} bytes",
                code="qmp-unreachable",
                hint="use a shorter path (state_dir)",
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        client = QMPClient(guest)
        try:
            async with asyncio.timeout(greeting_seconds):
                await asyncio.get_running_loop().sock_connect(sock, str(path))
            async with asyncio.timeout(greeting_seconds):
                await client.connect(sock)
        except (TimeoutError, BlockingIOError) as error:
            # BlockingIOError: the listener's queue is full, so somebody else is being served (or nobody is).
            sock.close()
            raise GuestError(
                f"guest {guest}: QEMU did not answer on {path} within {greeting_seconds:g} s: another client holds this monitor, or QEMU is stuck",
                code="qmp-busy",
                hint="give QEMU a second QMP socket (-qmp unix:…,server=on,wait=off) for migrated alone",
            ) from error
        except (OSError, ConnectError) as error:
            sock.close()
            raise GuestError(
                f"guest {guest}: no QEMU answers on the QMP socket {path}: {_reason(error)}",
                code="qmp-unreachable",
                hint="is the guest running, and is `qmp` in its configuration the path of its QMP socket?",
            ) from error
        except BaseException:
            sock.close()
            raise
        return cls(guest, path, client, sock, command_seconds=command_seconds)

    @property
    def alive(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, limit: float | None = None
    ) -> Any:
        limit = self._command_seconds if limit is None else limit
        try:
            # Never use asyncio.wait_for: up to Python 3.11 it loses a cancellation that comes together with the answer,
            # and a migration that was aborted at that moment would go on
            # (https://github.com/python/cpython/issues/86296).
            async with asyncio.timeout(limit):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise GuestError(
                f"guest {self.guest}: QEMU did not answer {command} within {limit:g} s", code="qmp-timeout"
            ) from error
        except ExecuteError as error:
            raise GuestError(f"guest {self.guest}: QEMU refused {command}: {error}", code="qmp-failed") from error
        except (ExecInterruptedError, StateError, QMPError, OSError) as error:
            raise GuestError(
                f"guest {self.guest}: the QMP connection was lost during {command}",
                code="qmp-lost",
                hint="QEMU exited or closed its monitor: look at its log",
            ) from error

    async def give_fd(self, name: str, fd: int) -> None:
        """Give QEMU a descriptor as ``name`` (getfd); it belongs to the session until used or closed (`closefd`)."""
        self._pass_fd(fd)
        await self.execute("getfd", {"fdname": name})

    async def add_fd(self, fd: int) -> int:
        self._pass_fd(fd)
        return int((await self.execute("add-fd", {"opaque": FDS_OF_OURS}))["fdset-id"])

    def _pass_fd(self, fd: int) -> None:
        try:
            # Send beside the client's transport, which does not support ancillary data (and hides the socket under
            # uvloop).  The blank is white space between two JSON texts.  Nothing of ours is ever queued here: commands
            # are short and we wait for each reply.
            self._socket.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])
        except OSError as error:
            raise GuestError(
                f"guest {self.guest}: cannot hand a descriptor to QEMU: {error.strerror}", code="qmp-lost"
            ) from error

    async def wait_loaded(self, *, limit: float) -> str:
        """Wait until an incoming QEMU has loaded its migration stream; return its run state at that moment.

        Raises GuestError: ``migration-failed`` with QEMU's message when loading fails or is cancelled, ``qmp-timeout``.
        """
        deadline = time.monotonic() + limit
        resumed = False
        while True:
            event = await self._next_event(max(min(deadline - time.monotonic(), POLL_SECONDS), 0.0))
            match event:
                case {"event": "RESUME"}:
                    resumed = True
                    continue
                case {"event": "MIGRATION", "data": {"status": "setup" | "active"}}:
                    continue
                case {"event": "MIGRATION", "data": {"status": "completed"}} if not resumed:
                    return "paused"  # QEMU was started with -S; a query would cost downtime
            # The query gets the whole limit too: a QEMU that loads state does not answer while it waits for a page.
            left = max(deadline - time.monotonic(), POLL_SECONDS)
            report, run_state = await asyncio.gather(
                self.execute("query-migrate", limit=left), self.execute("query-status", limit=left)
            )
            status = str(report.get("status", "none"))
            if status == "completed":
                return str(run_state["status"])
            if status in {"failed", "cancelled"}:
                raise GuestError(
                    f"guest {self.guest}: QEMU's migration {status} while loading the device state"
                    f"{': ' + report['error-desc'] if report.get('error-desc') else ''}",
                    code="migration-failed",
                    hint="QEMU's own log says more; source and target must run the same machine type and devices",
                )
            if time.monotonic() >= deadline:
                raise GuestError(
                    f"guest {self.guest}: QEMU did not load the device state within {limit:g} s (its migration is {status})",
                    code="qmp-timeout",
                )

    async def _next_event(self, seconds: float) -> Message | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._events.get()
        return None

    async def event(self, seconds: float) -> None:
        await self._next_event(seconds)

    def saw(self, name: str) -> bool:
        return any(event["event"] == name for event in self._events.clear())

    def forget_events(self) -> None:
        self._events.clear()

    def peer_pid(self) -> int:
        """Return the process behind the socket.

        The kernel remembers who *listened*.  When a manager opened the socket and passed it on (as libvirt does), that
        is not QEMU.  So look for the process that holds an accepted end of this path.
        """
        listener, _, _ = _UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        accepted = _accepted_inodes(self.path)
        if not accepted or not accepted.isdisjoint(open_files(listener).values()):
            return int(listener)
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        holders = [pid for pid in pids if pid != os.getpid() and not accepted.isdisjoint(open_files(pid).values())]
        return holders[0] if len(holders) == 1 else int(listener)

    async def close(self) -> None:
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(self._command_seconds):
                await self._client.disconnect()
        self._socket.close()


def _reason(error: BaseException) -> str:
    inner = error.exc if isinstance(error, ConnectError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__


def _accepted_inodes(path: Path) -> frozenset[str]:
    """Return the ``socket:[…]`` names of connected sockets bound to ``path``: the server's ends."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            # Num RefCount Protocol Flags Type St Inode Path; St 03: connected
            if len(fields) == 8 and fields[5] == "03" and fields[7] == str(path):
                found.add(f"socket:[{fields[6]}]")
    return frozenset(found)
