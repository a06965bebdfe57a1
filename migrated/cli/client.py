"""The command line's client of the control API.

`Client` talks to one agent, over its control socket or its status site.
"""

from __future__ import annotations

import grp
import os
import pwd
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import aiohttp
import msgspec

from migrated.agent.evacuation import Evacuation, EvacuationList
from migrated.agent.record import Record
from migrated.agent.requests import GuestList
from migrated.agent.series import Series
from migrated.cli.failure import RemoteError
from migrated.config import CONTROL_SOCKET_NAME, STATE_DIRECTORY, TLS_DIRECTORY
from migrated.errors import ConfigError, ConnectionLostError, HostError
from migrated.log import Line
from migrated.memory.page_map import PageMap
from migrated.settings import TlsFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

T = TypeVar("T")

_CONNECT_SECONDS: Final = 5.0
# A verb answers when the agent has done it; the agents' own limits are well below this.
_ANSWER_SECONDS: Final = 120.0
# Events are silent while nothing changes, but a comment comes every 15 s.
_EVENT_SECONDS: Final = 60.0
_MAX_EVENT_BYTES: Final = 1 << 20
#: Names a directory with ca-cert.pem, client-cert.pem and client-key.pem.
_TLS_VARIABLE: Final = "MIGRATED_TLS_DIR"
_ASK_FOR_A_GROUP: Final = (
    "use sudo, or name a group of yours in control.group of the agent's configuration and restart it"
)


class MigrationList(msgspec.Struct):
    """Answer of ``GET /v1/migrations``."""

    migrations: list[Record]


class PageMapAnswer(msgspec.Struct):
    """Answer of ``GET /v1/migrations/ID/map``."""

    map: PageMap | None


class LogAnswer(msgspec.Struct):
    """Answer of ``GET /v1/migrations/ID/log``."""

    log: list[Line]


def default_agent() -> str:
    """Find the control socket of the source on this host if there is one, else of the target."""
    source, target = (STATE_DIRECTORY / role / CONTROL_SOCKET_NAME for role in ("source", "target"))
    return str(source if _may_exist(source) or not _may_exist(target) else target)


def _may_exist(path: Path) -> bool:
    """Whether it exists or is hidden from this user: connecting then reports that, with a hint."""
    try:
        return path.exists()
    except PermissionError:
        return True


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return False


class Client:
    """One agent, by the path of its control socket (or its state directory) or the URL of its status site.

    Use as an asynchronous context manager.  Methods raise RemoteError (the agent refused), HostError (no agent there),
    ConnectionLostError.
    """

    def __init__(self, agent: str | None = None) -> None:
        self.agent = agent or default_agent()
        self._session: aiohttp.ClientSession
        if "://" in self.agent:
            if not self.agent.startswith(("http://", "https://")):
                message = f"--agent {self.agent}: not a URL of an agent"
                hint = "give http://HOST:PORT of its status site, https://HOST:PORT of its remote control, or the path of its socket"
                raise ConfigError(message, hint=hint)
            self._base = self.agent.rstrip("/")
            self._socket = None
        else:
            path = Path(self.agent)
            self._socket = path / CONTROL_SOCKET_NAME if _is_directory(path) else path
            self._base = "http://agent"

    async def __aenter__(self) -> Self:
        socket = self._socket
        connector: aiohttp.BaseConnector
        if socket is not None:
            connector = aiohttp.UnixConnector(str(socket))
        elif self._base.startswith("https://"):
            connector = aiohttp.TCPConnector(ssl=_our_certificate())
        else:
            connector = aiohttp.TCPConnector()
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS, sock_connect=_CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_MAX_EVENT_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def about(self) -> dict[str, Any]:
        """Return who the agent is, with its active migrations."""
        return await self._call("GET", "/v1/agent", dict[str, Any])

    async def guests(self) -> GuestList:
        """Which guests can be migrated from the agent's host, and why the others cannot."""
        return await self._call("GET", "/v1/guests", GuestList)

    async def migrations(self, *, ended: bool = True) -> list[Record]:
        """Return all migrations, oldest first; ``ended=False``: only active ones."""
        path = f"/v1/migrations?ended={'true' if ended else 'false'}"
        return (await self._call("GET", path, MigrationList)).migrations

    async def migration(self, migration: str) -> Record:
        """Return a migration by id, unique prefix or guest."""
        return await self._call("GET", _path(migration), Record)

    async def series(self, migration: str) -> Series:
        """Return a migration's figures over time."""
        return await self._call("GET", f"{_path(migration)}/series", Series)

    async def page_map(self, migration: str) -> PageMap | None:
        """Return a migration's page map, if there is one."""
        return (await self._call("GET", f"{_path(migration)}/map", PageMapAnswer)).map

    async def log(self, migration: str) -> list[Line]:
        """Return the lines of the agent's log that name the migration."""
        return (await self._call("GET", f"{_path(migration)}/log", LogAnswer)).log

    async def start(self, body: dict[str, Any]) -> Record:
        """Start a migration."""
        return await self._call("POST", "/v1/migrations", Record, body)

    async def evacuate(self, body: dict[str, Any]) -> Evacuation:
        """Begin an evacuation; a dry run returns the plan."""
        return await self._call("POST", "/v1/evacuations", Evacuation, body)

    async def evacuations(self) -> list[Evacuation]:
        """Return the evacuations that the agent remembers, oldest first."""
        return (await self._call("GET", "/v1/evacuations", EvacuationList)).evacuations

    async def evacuation(self, evacuation: str) -> Evacuation:
        """Return one by its id."""
        return await self._call("GET", f"/v1/evacuations/{evacuation}", Evacuation)

    async def abort_evacuation(self, evacuation: str) -> Evacuation:
        """Start nothing further, and abort what can be aborted."""
        return await self._call("POST", f"/v1/evacuations/{evacuation}/abort", Evacuation, {})

    async def verb(self, migration: str, verb: str, body: dict[str, Any] | None = None) -> Record:
        """Run a verb: ``abort``, ``switchover``, ``resume``, ``set``, ``abandon``."""
        return await self._call("POST", f"{_path(migration)}/{verb}", Record, body or {})

    async def events(self, migration: str) -> AsyncIterator[Record]:
        """Yield the record, now and at each change, until the migration has ended."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_EVENT_SECONDS)
        url = f"{self._base}{_path(migration)}/events"
        try:
            async with self._session.get(url, timeout=timeout) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, await answer.read())
                kind = ""
                async for raw in answer.content:
                    line = raw.decode("utf-8", "replace").rstrip("\n")
                    if line.startswith("event: "):
                        kind = line.removeprefix("event: ")
                    elif line.startswith("data: ") and kind == "error":
                        raise _refusal(500, line.removeprefix("data: ").encode())
                    elif line.startswith("data: "):
                        yield _decoded(line.removeprefix("data: ").encode(), Record)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._lost(error) from error

    async def _call(self, method: str, path: str, kind: type[T], body: dict[str, Any] | None = None) -> T:
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._session.request(method, self._base + path, data=data, headers=headers) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._lost(error) from error
        if answer.status >= 300:
            raise _refusal(answer.status, content)
        return _decoded(content, kind)

    def _lost(self, error: Exception) -> HostError | ConnectionLostError:
        where = self._socket or self._base
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError):
            hint = "start one with `migrated source` or `migrated target`, or name one with --agent"
            return HostError(f"no agent answers at {where}", code="no-agent", hint=hint)
        if isinstance(cause, PermissionError) and self._socket is not None:
            missing, hint = _missing_permission(self._socket)
            return HostError(f"{where}: permission denied: {missing}", code="no-agent", hint=hint)
        reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause) or "timeout"
        message = f"the connection to the agent at {where} was lost: {reason}"
        return ConnectionLostError(
            message, hint="guests do not depend on it; see the agent's log and `migrated status`"
        )


def _our_certificate() -> ssl.SSLContext:
    """Return what remote control takes: TLS 1.3, and a client's certificate.  Raises ConfigError."""
    files = TlsFiles.conventional("source", Path(os.environ.get(_TLS_VARIABLE) or TLS_DIRECTORY))
    try:
        context = ssl.create_default_context(cafile=str(files.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(files.cert, files.key)
    except OSError as error:  # SSLError is one
        message = f"{files.ca}, {files.cert} or {files.key}: {error}"
        hint = f"remote control needs the certificate of a client; {_TLS_VARIABLE} names another directory"
        raise ConfigError(message, code="tls-files", hint=hint) from error
    return context


def _missing_permission(path: Path) -> tuple[str, str]:
    """Return what keeps this user from the control socket, and what to do."""
    blocked = next((one for one in reversed(path.parents) if not os.access(one, os.X_OK, effective_ids=True)), path)
    try:
        found = blocked.stat()
        mode, group = stat.filemode(found.st_mode), _name_of_group(found.st_gid)
    except OSError as error:
        return f"{blocked}: {error.strerror}", _ASK_FOR_A_GROUP
    right = "w" if blocked == path else "x"
    missing = f"user {os.geteuid()} lacks {right!r} on {blocked} ({mode} {_name_of_user(found.st_uid)}:{group})"
    if found.st_gid != 0 and right in mode[4:7]:
        return missing, f"use sudo, or become a member of the group {group} and log in again"
    return missing, _ASK_FOR_A_GROUP


def _name_of_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _name_of_group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _path(migration: str) -> str:
    if not migration or any(not (sign.isascii() and (sign.isalnum() or sign in "._-")) for sign in migration):
        message = f"{migration!r} is neither an id nor a guest's name"
        raise ConfigError(message, hint="`migrated list` shows both")
    return f"/v1/migrations/{migration}"


def _decoded(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        message = f"the agent's answer is not understood: {error}"
        raise ConnectionLostError(
            message, code="bad-answer", hint="do command and agent have the same version?"
        ) from error


def _refusal(status: int, content: bytes) -> RemoteError:
    try:
        info = msgspec.json.decode(content, type=dict[str, dict[str, Any]])["error"]
    except (msgspec.ValidationError, msgspec.DecodeError, KeyError):
        info = {"code": f"http-{status}", "message": f"the agent answered with HTTP status {status}"}
    return RemoteError(info, status=status)
