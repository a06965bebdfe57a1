"""Decide who may use the control socket, by the credentials that the kernel reports, and log every command.

Root, the agent's user and the owner of the socket may do everything.  So may the members of ``control.group``.  The
members of ``control.read_group`` may only read.  The mode of the socket keeps out most of the others; the check of the
credentials names the group to those who come in anyway.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import grp
import os
import pwd
import socket
import struct
from typing import TYPE_CHECKING, Final, Protocol, Self

import structlog
from aiohttp import web

from migrated.errors import ConfigError, HostError, UsageError

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from aiohttp.typedefs import Handler, Middleware

    from migrated.config import ControlSection

_CREDENTIALS: Final = struct.Struct("iII")
#: include/uapi/asm-generic/socket.h; Python has no name for it.
_SO_PEERGROUPS: Final = 59
#: The most that Python's getsockopt takes: 256 groups.
_GROUPS_BYTES: Final = 1024
_READING: Final = frozenset({"GET", "HEAD"})
#: Requests under way, event streams above all, of one user who may only read.
MAX_OF_A_READER: Final = 32

log = structlog.get_logger("migrated.control")


class ForbiddenError(UsageError):
    """Whoever asks may not do this."""

    default_code = "forbidden"


class Right(enum.IntEnum):
    """What a client may do; each right includes those before it."""

    NONE = 0
    READ = 1
    CONTROL = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Client:
    """Who asks: ``name`` for records and messages, ``fields`` for the log."""

    name: str
    right: Right
    fields: dict[str, int | str]


class Judge(Protocol):
    """Says of a request who makes it."""

    @property
    def hint(self) -> str:
        """What to tell those who may not control this agent."""

    def client(self, request: web.Request) -> Client:
        """Return who asks, and what they may do.  Raises ConnectionResetError if the client is gone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of the socket, as it was when it connected."""

    pid: int
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, transport: asyncio.BaseTransport | None) -> Self:
        """Ask the kernel.  Raises ConnectionResetError if the client is gone."""
        if transport is None:
            raise ConnectionResetError
        end: socket.socket = transport.get_extra_info("socket")
        pid, uid, gid = _CREDENTIALS.unpack(
            end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size),
        )
        try:
            found = end.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        except OSError:  # Linux before 4.13, or more groups than fit: the process's own group must do
            found = b""
        return cls(pid, uid, frozenset({gid, *(group for (group,) in struct.iter_unpack("I", found))}))


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """Who may use the control socket.  Ids are -1 where the configuration names nobody."""

    owner: int = -1
    group: int = -1
    read_group: int = -1
    group_name: str = ""

    @classmethod
    def of(cls, table: ControlSection, path: str) -> Self:
        """Look the names up.  Raises ConfigError with the key of a name that this host does not know."""
        return cls(
            owner=_id_of(table.owner, "owner", path),
            group=_id_of(table.group, "group", path),
            read_group=_id_of(table.read_group, "read_group", path),
            group_name=table.group,
        )

    def client(self, request: web.Request) -> Client:
        """See `Judge`."""
        peer = Peer.of(request.transport)
        return Client(f"uid {peer.uid}", self.right(peer), {"uid": peer.uid, "pid": peer.pid})

    def right(self, peer: Peer) -> Right:
        """Return what a client may do."""
        if peer.uid in {0, os.geteuid(), self.owner} or self.group in peer.gids:
            return Right.CONTROL
        return Right.READ if self.read_group in peer.gids else Right.NONE

    @property
    def hint(self) -> str:
        """What to tell those who may not control this agent."""
        if self.group_name:
            return f"use sudo, or become a member of the group {self.group_name} (control.group of the configuration)"
        return "use sudo, or name a group in control.group of the configuration and become a member of it"

    def apply(self, path: Path) -> None:
        """Give the socket, which only its owner may open yet, its owner, group and mode.  Raises HostError.

        Whom it is for gets the right to pass through the directory, but not to list it.
        """
        try:
            if self.group != -1:
                _let_through(path.parent, self.group, 0o010)
            if self.read_group != -1 or self.owner not in (-1, os.geteuid()):
                _let_through(path.parent, -1, 0o001)
            if (self.owner, self.group) != (-1, -1):
                os.chown(path, self.owner, self.group, follow_symlinks=False)
            if self.group != -1:
                path.chmod(0o660)
            if self.read_group != -1:  # a file has one group only: for two, the credentials decide
                path.chmod(0o666)
        except OSError as error:
            message = f"control socket {path}: cannot set its owner, group and mode: {error.strerror}"
            hint = "run the agent as root with CAP_CHOWN, or as a member of the group that [control] names"
            raise HostError(message, code="control-access", hint=hint) from error


def only_for(judge: Judge) -> Middleware:
    """Refuse what the client may not do, and log every command with who gave it."""
    under_way: collections.Counter[str] = collections.Counter()  # by name, of readers

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        client = judge.client(request)
        reading = request.method in _READING
        what = log.bind(method=request.method, path=request.path, **client.fields)
        if client.right < (Right.READ if reading else Right.CONTROL):
            what.warning("command refused")
            may = "may only read" if client.right is Right.READ else "may not use the control API"
            raise ForbiddenError(f"{request.method} {request.path}: {client.name} {may}", hint=judge.hint)
        if client.right is Right.READ:
            if under_way[client.name] >= MAX_OF_A_READER:
                raise web.HTTPTooManyRequests
            under_way[client.name] += 1
            try:
                return await handler(request)
            finally:
                under_way[client.name] -= 1
        if not reading:
            what.info("command")  # before it is carried out: it may be the last thing this agent does
        answer = await handler(request)
        if not reading and answer.status >= 400:
            what.info("command failed", status=answer.status)
        return answer

    return check


def _id_of(name: str, key: str, path: str) -> int:
    """Return the id of a user or group, by name or number; -1 for no name."""
    if not name:
        return -1
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if key == "owner" else grp.getgrnam(name).gr_gid
    except KeyError as error:
        kind, command = ("user", "useradd --system") if key == "owner" else ("group", "groupadd --system")
        message = f"{path}: control.{key}: this host has no {kind} {name!r}"
        raise ConfigError(message, hint=f"make it (`{command} {name}`) or name another") from error


def _let_through(directory: Path, group: int, bit: int) -> None:
    now = directory.stat()
    if group not in (-1, now.st_gid):
        os.chown(directory, -1, group)
    if not now.st_mode & bit:
        directory.chmod((now.st_mode | bit) & 0o7777)
