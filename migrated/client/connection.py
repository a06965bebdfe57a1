"""One agent as a client sees it: where it is, requests and their answers, and what has gone wrong.

`migrated.client.client` knows the requests, this module only how to make one.
"""

from __future__ import annotations

import grp
import os
import pwd
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import aiohttp
import msgspec

from migrated.agent.answers import ErrorAnswer
from migrated.client.errors import NoAgentError, RemoteError
from migrated.errors import ConfigError, ConnectionLostError
from migrated.paths import CONTROL_SOCKET_NAME, STATE_DIRECTORY, TLS_DIRECTORY
from migrated.settings import Table, TlsFiles

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection

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


class Connection:
    """Requests to one agent.  `open` it in the event loop that makes them, and `close` it.  Raises ConfigError."""

    def __init__(self, agent: str, tls: ssl.SSLContext | None) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._tls = tls
        self._socket: Path | None = None
        self._base = "http://agent"
        if "://" in agent:
            if not agent.startswith(("http://", "https://")):
                message = f"{agent}: not a URL of an agent"
                hint = "give http://HOST:PORT of its status site, https://HOST:PORT of its remote control, or the path of its socket"
                raise ConfigError(message, hint=hint)
            self._base = agent.rstrip("/")
        else:
            path = Path(agent)
            self._socket = path / CONTROL_SOCKET_NAME if _is_directory(path) else path

    def open(self) -> None:
        """Make requests possible; the first one connects.  Raises ConfigError for certificates that cannot be used."""
        connector: aiohttp.BaseConnector
        if self._socket is not None:
            connector = aiohttp.UnixConnector(str(self._socket), limit=0)  # each stream of events holds a connection
        elif self._base.startswith("https://"):
            connector = aiohttp.TCPConnector(ssl=self._tls or _our_certificate(), limit=0)
        else:
            connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS, sock_connect=_CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_MAX_EVENT_BYTES)

    async def close(self) -> None:
        """End what is under way."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use the client within `async with Client(...)`")
        return self._session

    async def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: Table | None = None,
        *,
        statuses: Collection[int] = (200, 202),
    ) -> T:
        """Make a request; return its answer, which has one of these statuses.

        Raises RemoteError, NoAgentError, ConnectionLostError.
        """
        data = None if body is None else body.model_dump_json(exclude_unset=True).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._opened().request(method, self._base + path, data=data, headers=headers) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._lost(error) from error
        if answer.status not in statuses:
            raise _refusal(answer.status, content)
        return decode(content, kind)

    async def stream(self, path: str) -> AsyncGenerator[tuple[str, bytes], None]:
        """Yield the kind and the data of each server-sent event.  Raises as `call` does."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_EVENT_SECONDS)
        try:
            async with self._opened().get(self._base + path, timeout=timeout) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, await answer.read())
                kind = ""
                async for line in answer.content:
                    field, _, value = line.rstrip(b"\n").partition(b": ")
                    if field == b"event":
                        kind = value.decode("utf-8", "replace")
                    elif field == b"data" and kind == "error":
                        raise _refusal(500, value)
                    elif field == b"data":
                        yield kind, value
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> NoAgentError | ConnectionLostError:
        where = self._socket or self._base
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError):
            hint = "start one with `migrated source` or `migrated target`, or name one with --agent"
            return NoAgentError(f"no agent answers at {where}", hint=hint)
        if isinstance(cause, PermissionError) and self._socket is not None:
            missing, hint = _missing_permission(self._socket)
            return NoAgentError(f"{where}: permission denied: {missing}", hint=hint)
        reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause) or "timeout"
        message = f"the connection to the agent at {where} was lost: {reason}"
        return ConnectionLostError(
            message, hint="guests do not depend on it; see the agent's log and `migrated status`"
        )


def decode(content: bytes, kind: type[T]) -> T:
    """Decode what an agent has sent.  Raises ConnectionLostError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        message = f"the agent's answer is not understood: {error}"
        raise ConnectionLostError(
            message, code="bad-answer", hint="do command and agent have the same version?"
        ) from error


def _refusal(status: int, content: bytes) -> RemoteError:
    try:
        info = msgspec.json.decode(content, type=ErrorAnswer).error
    except (msgspec.ValidationError, msgspec.DecodeError):
        message = f"the agent answered with HTTP status {status}"
        return RemoteError(message, code="bad-answer", hint="is there something else at this address?", status=status)
    state = "" if info.state is msgspec.UNSET else info.state
    return RemoteError(info.message, code=info.code, hint=info.hint, status=status, state=state)


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
