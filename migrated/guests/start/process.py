"""Start the process of an incoming guest, so that it depends on the agent for nothing and inherits nothing.

If systemd runs the agent, the guest becomes a transient service of its own: process 1 starts it, in a cgroup of its own,
with a fresh environment, and under none of the restrictions of the agent's unit.  Stopping, restarting or killing the
agent's unit therefore never touches it.  The descriptors of the guest's memory reach it through `launcher`.

Otherwise (in a container, in a demonstration) the guest is a child of the agent, in a session of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import grp
import json
import os
import pwd
import secrets
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from migrated.errors import GuestError, GuestRefusedError
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.start import launcher
from migrated.guests.start.config import StartedTable, nodes
from migrated.waiting import in_thread, within

log = structlog.get_logger("migrated.guests")

_UCRED = struct.Struct("3i")
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
#: The environment of a guest that is a child of the agent and has a user of its own.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LAUNCHER = Path(launcher.__file__)


@dataclasses.dataclass(frozen=True, slots=True)
class User:
    """As whom a guest runs."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def user_of(guest: str, table: StartedTable) -> User | None:
    """Look up the user of a guest; None: the agent's own.  Raises GuestRefusedError ``guest-user``."""
    if not table.user:
        if table.group or table.groups:
            raise _no_user(guest, "a group is given, but no user")
        return None
    try:
        entry = pwd.getpwnam(table.user)
    except KeyError as error:
        raise _no_user(guest, f"this host has no user {table.user}") from error
    found = {}
    for name in (table.group, *table.groups):
        try:
            found[name] = grp.getgrnam(name).gr_gid if name else entry.pw_gid
        except KeyError as error:
            raise _no_user(guest, f"this host has no group {name}") from error
    if os.geteuid() not in {0, entry.pw_uid}:
        raise _no_user(guest, f"the agent may not start a process as {table.user}: it is not root")
    gid = found[table.group]
    groups = tuple(sorted({*os.getgrouplist(table.user, gid), *found.values()}))
    return User(table.user, entry.pw_uid, gid, groups, entry.pw_dir)


def _no_user(guest: str, why: str) -> GuestRefusedError:
    return GuestRefusedError(
        f"guest {guest}: {why}",
        code="guest-user",
        hint="correct user, group and groups in the guest's table, or create them on this host",
    )


def under_systemd() -> bool:
    """Whether the system's service manager has started this very process, and can start others."""
    return (
        os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())
        and "MANAGERPID" not in os.environ  # that of a user has no slices for guests
        and shutil.which("systemd-run") is not None
    )


def admit(path: Path, user: User | None) -> None:
    """Give a file or directory that we have made for a guest to its user.  Raises GuestError ``guest-start``."""
    if user is None:
        return
    try:
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
    except OSError as error:
        raise GuestError(f"cannot give {path} to {user.name}: {error.strerror}", code="guest-start") from error


def _admit_to_directory(path: Path, user: User | None) -> None:
    """Give the guest's user its directory, and the way there: below the agent's, which others cannot list."""
    if user is None:
        return
    try:
        path.chmod(0o700)
        for parent in (path.parent, path.parent.parent):
            parent.chmod(parent.stat().st_mode & 0o7777 | 0o011)
    except OSError as error:
        raise GuestError(f"cannot let {user.name} enter {path}: {error.strerror}", code="guest-start") from error
    admit(path, user)


def is_process_of(pid: int, user: User | None) -> bool:
    """Whether a process runs as the guest's user: what answers in a directory of that user's may be anybody."""
    if user is None:
        return True
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        return {*status.partition("\nUid:")[2].partition("\n")[0].split()} == {str(user.uid)}
    return False


async def start(
    guest: str,
    command: Sequence[str],
    table: StartedTable,
    *,
    pass_fds: Sequence[int],
    output: Path,
    limit_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> PidHandle:
    """Start a guest's process, which inherits ``pass_fds`` under the same numbers and writes to the file ``output``.

    ``environment`` is added to its own.  Raises GuestError ``guest-start``, GuestRefusedError ``guest-user``,
    TimeoutExceededError.
    """
    user = user_of(guest, table)
    program = shutil.which(command[0])
    if program is None:
        raise GuestError(f"guest {guest}: there is no program {command[0]}", code="guest-start")
    _admit_to_directory(output.parent, user)
    added = dict(environment or {})
    plan = {"program": program, "command": list(command), "environment": added, "fds": list(pass_fds)}
    if under_systemd():
        async with within(limit_seconds, "systemd to start it", who=f"guest {guest}"):
            return await _as_service(guest, table, user, plan, pass_fds, output)
    if user is None and not (table.nice or table.numa_policy):
        command = ["/usr/bin/env", *(f"{name}={value}" for name, value in added.items()), *command]
        return PidHandle.spawn(command, pass_fds=pass_fds, log=output)
    plan |= _own_steps(table, user)
    return PidHandle.spawn(_launcher(plan), pass_fds=pass_fds, log=output, environment=_environment(user))


def _launcher(plan: dict[str, Any]) -> list[str]:
    python = os.path.realpath(sys.executable)  # a virtual environment may be closed to the guest's user
    return [python, "-I", "-S", "-c", _LAUNCHER.read_text(encoding="utf-8"), json.dumps(plan)]


def _own_steps(table: StartedTable, user: User | None) -> dict[str, Any]:
    """Return what the launcher does where no service manager does it."""
    mode = table.numa_policy.partition(":")[0]
    return {
        "nice": table.nice,
        "numa": [mode, nodes(table.numa_policy)] if mode else None,
        "ids": [user.uid, user.gid, user.groups] if user is not None else None,
    }


def _environment(user: User | None) -> dict[str, str] | None:
    if user is None:
        return None
    kept = {name: os.environ[name] for name in ("LANG", "TZ") if name in os.environ}
    return {**kept, "PATH": _PATH, "HOME": user.home, "USER": user.name, "LOGNAME": user.name}


# ---------------------------------------------------------------- as a transient service


def _service(unit: str, guest: str, table: StartedTable, user: User | None) -> list[str]:
    """Return the command that has systemd start a launcher, all but the launcher itself."""
    properties = {
        "OOMPolicy": "continue",
        "LimitMEMLOCK": "infinity",
        "LimitNOFILE": "65536",
        "LimitCORE": "0",
        "TasksMax": "infinity",
        "UMask": "0077",
        "Nice": str(table.nice),
    }
    if table.numa_policy:
        mode, _, mask = table.numa_policy.partition(":")
        properties["NUMAPolicy"] = mode
        if mask:
            properties["NUMAMask"] = mask
    if user is not None:
        properties |= {
            "User": str(user.uid),
            "Group": str(user.gid),
            "SupplementaryGroups": " ".join(map(str, user.groups)),
            "NoNewPrivileges": "yes",
            "CapabilityBoundingSet": "",
        }
    return [
        *("systemd-run", "--quiet", "--no-ask-password", "--collect", "--service-type=exec"),
        *(f"--unit={unit}", f"--slice={table.slice}", f"--description=Guest {guest}, started by migrated"),
        *(f"--property={name}={value}" for name, value in properties.items()),
        "--",
    ]


async def _as_service(
    guest: str, table: StartedTable, user: User | None, plan: dict[str, Any], pass_fds: Sequence[int], output: Path
) -> PidHandle:
    unit = f"migrated-guest-{guest}-{secrets.token_hex(4)}.service"
    name = f"migrated/{secrets.token_hex(16)}"
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(_listen(name))
        log_fd = _open_log(output)
        opened.callback(os.close, log_fd)
        await in_thread(_run, guest, [*_service(unit, guest, table, user), *_launcher({"socket": name})])
        process, connection = await _accept(listener, unit)
        opened.enter_context(connection)
        try:
            await _hand_over(guest, connection, plan, [(log_fd, 1), (log_fd, 2), *((fd, fd) for fd in pass_fds)])
        except BaseException:
            process.close()
            raise
    log.info("guest started", guest=guest, unit=unit, pid=process.pid)
    return process


def _listen(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.bind(f"\0{name}")
    listener.listen(8)
    return listener


def _open_log(path: Path) -> int:
    """Make the log anew.  The directory may be the guest's user's: follow nothing that was put there."""
    try:
        path.unlink(missing_ok=True)
        return os.open(path, _LOG_FLAGS, 0o600)
    except OSError as error:
        raise GuestError(f"cannot make the guest's log {path}: {error.strerror}", code="guest-start") from error


def _run(guest: str, command: Sequence[str]) -> None:
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise GuestError(
            f"guest {guest}: systemd did not start it: {done.stdout.strip()[-500:]}",
            code="guest-start",
            hint="the journal of this host has systemd's reason",
        )


async def _accept(listener: socket.socket, unit: str) -> tuple[PidHandle, socket.socket]:
    """Accept the launcher's connection: that of the process in the unit's own cgroup, which only systemd puts there."""
    loop = asyncio.get_running_loop()
    while True:
        connection, _ = await loop.sock_accept(listener)
        try:
            pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            process = PidHandle.attach(pid)
            if _in_unit(pid, unit):
                return process, connection
            log.warning("a stranger connected to a guest's launcher", unit=unit, pid=pid)
            process.close()
        except GuestError:  # a stranger that has exited already
            pass
        except BaseException:
            connection.close()
            raise
        connection.close()


def _in_unit(pid: int, unit: str) -> bool:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        return any(line.endswith(f"/{unit}") for line in lines)
    return False


async def _hand_over(
    guest: str, connection: socket.socket, plan: dict[str, Any], fds: Sequence[tuple[int, int]]
) -> None:
    """Send the launcher the plan and the descriptors, each with its number there; wait until it executes the guest."""
    packet = json.dumps({**plan, "fds": [number for _, number in fds]}).encode()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * launcher.MAX_PACKET_BYTES)
    try:
        await in_thread(functools.partial(socket.send_fds, connection, [packet], [fd for fd, _ in fds]))
        said = await asyncio.get_running_loop().sock_recv(connection, 4096)
    except OSError as error:
        raise GuestError(f"guest {guest}: its launcher was lost: {error.strerror}", code="guest-start") from error
    if said:
        raise GuestError(f"guest {guest}: {said.decode(errors='replace')}", code="guest-start")
