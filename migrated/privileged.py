"""What the agents do with other processes and need privileges for: in the privileged helper, or here without one.

An `operation` is a function whose first argument is the pidfd of a process.  If `SOCKET` names the helper's socket, a call
becomes one request to it: one packet with the arguments as JSON and the descriptors attached, on a connection of its own.
The helper runs the same function, and its answer is one packet too.  It keeps nothing between two requests.  Without a
helper (an agent that root started by hand, a demonstration) the function runs here.

The operations here open files of ``/proc/PID`` and list descriptors; those of `guests.access.injection` make system calls
in the process.  A descriptor that is opened with privileges keeps them, so all further work is done by the agent itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar, cast

from migrated import errors
from migrated.errors import HostError, MigratedError

P = ParamSpec("P")
R = TypeVar("R")

#: The environment variable that names the helper's socket.
SOCKET: Final = "MIGRATED_HELPER"
MAX_REQUEST_BYTES: Final = 1 << 16
#: A longer answer is passed in a memfd: the kernel limits a packet to the socket's send buffer.
_MAX_ANSWER_BYTES: Final = 1 << 16
MAX_FDS: Final = 250  # SCM_MAX_FD is 253
_FILES: Final = re.compile(r"maps|smaps|pagemap|mem|map_files/[0-9a-f]{1,16}-[0-9a-f]{1,16}", re.ASCII)

OPERATIONS: Final[dict[str, Callable[..., object]]] = {}


class Fd(int):
    """A descriptor, among arguments and results: the other side gets a duplicate."""


class _HelperEndedError(HostError):
    """The helper ended, or was ended, before it answered."""


def operation(function: Callable[P, R], *, tries: int = 3) -> Callable[P, R]:
    """Make a function an operation.  It takes and returns Fds, numbers, strings and lists of them.

    ``tries``: how often it is asked for if the helper ends without an answer; 1 if it must not be done twice.
    """
    OPERATIONS[function.__name__] = function

    @functools.wraps(function)
    def perform(*args: P.args, **kwargs: P.kwargs) -> R:
        path = helper()
        if not path:
            return function(*args, **kwargs)
        assert not kwargs, "arguments of operations are positional"
        for _ in range(tries - 1):
            with contextlib.suppress(_HelperEndedError):
                return cast("R", _ask(path, function.__name__, args))
        return cast("R", _ask(path, function.__name__, args))

    return perform


def helper() -> str:
    """Return the path of the helper's socket; empty: there is none."""
    return os.environ.get(SOCKET, "")


# ---------------------------------------------------------------- requests


def _packed(value: object, fds: list[int]) -> object:
    if isinstance(value, Fd):
        fds.append(value)
        return {"fd": len(fds) - 1}
    return [_packed(item, fds) for item in value] if isinstance(value, list | tuple) else value


def _unpacked(value: object, fds: Sequence[int]) -> object:
    if isinstance(value, dict):
        return Fd(fds[value["fd"]])
    return [_unpacked(item, fds) for item in value] if isinstance(value, list) else value


def _ask(path: str, name: str, arguments: Sequence[object]) -> object:
    """Have the helper perform an operation.  Raises what the operation raises, and HostError ``privileged-helper``."""
    given: list[int] = []
    request = json.dumps({"operation": name, "arguments": _packed(arguments, given)}).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
            connection.connect(path)
            socket.send_fds(connection, [request], given)
            packet, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    except (ConnectionResetError, BrokenPipeError) as error:
        raise _helper_failed(_HelperEndedError, path, name, "it ended") from error
    except OSError as error:
        raise _helper_failed(HostError, path, name, error.strerror or str(error)) from error
    with _closing_unless_taken(fds) as taken:
        if not packet:
            raise _helper_failed(_HelperEndedError, path, name, "it ended, or does not answer this process")
        answer = json.loads(packet)
        if "long" in answer:
            answer = json.loads(os.pread(fds[0], os.fstat(fds[0]).st_size, 0))
        if "error" in answer:
            raise _error(answer["error"])
        result = _unpacked(answer["result"], fds)
        if "long" not in answer and not isinstance(result, str):
            taken += [fd for fd in (result if isinstance(result, list) else [result]) if isinstance(fd, Fd)]
        return result


@contextlib.contextmanager
def _closing_unless_taken(fds: Sequence[int]) -> Iterator[list[int]]:
    taken: list[int] = []
    try:
        yield taken
    finally:
        for fd in fds:
            if fd not in taken:
                os.close(fd)


def _helper_failed(kind: type[HostError], path: str, name: str, why: str) -> HostError:
    return kind(
        f"the privileged helper at {path} did not perform {name}: {why}",
        code="privileged-helper",
        hint="see `systemctl status migrated-helper.socket migrated-helper.service`",
    )


def _error(told: dict[str, Any]) -> Exception:
    if "errno" in told:
        return OSError(told["errno"], told["message"], told["file"])
    kind = getattr(errors, told["class"], MigratedError)
    return cast("Exception", kind(told["message"], code=told["code"], hint=told["hint"]))


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        return {"errno": error.errno, "message": error.strerror, "file": error.filename and str(error.filename)}
    name = type(error).__name__
    known = isinstance(error, errors.GuestError | HostError)  # others have fields of their own
    return {"class": name if known else "MigratedError", **errors.error_fields(error)}


def answer(request: bytes, fds: Sequence[int]) -> tuple[bytes, list[int]]:
    """Perform the operation of a request; return the packet that answers it, and the descriptors to attach.

    The caller closes all descriptors.  Raises ValueError for anything that is not a request.
    """
    try:
        asked = json.loads(request)
        function = OPERATIONS[asked["operation"]]
        arguments = cast("list[object]", _unpacked(asked["arguments"], fds))
        if not arguments or not isinstance(arguments[0], Fd):
            raise ValueError("the first argument is no pidfd")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a request: {error}") from error
    given: list[int] = []
    try:
        told: dict[str, object] = {"result": _packed(function(*arguments), given)}
    except (OSError, MigratedError) as error:
        told = {"error": _told(error)}
    except (TypeError, ValueError, OverflowError) as error:  # arguments that do not fit the operation
        raise ValueError(f"not a request: {error}") from error
    data = json.dumps(told).encode()
    if len(data) <= _MAX_ANSWER_BYTES or given:
        return data, given
    long = os.memfd_create("migrated-answer", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(long), "wb") as file:
        file.write(data)
    return b'{"long": true}', [long]


# ---------------------------------------------------------------- /proc


def pid_of(pidfd: int) -> int:
    """Return the process of a pidfd.  Raises ProcessLookupError if it has exited, TypeError if it is no pidfd."""
    for line in Path(f"/proc/self/fdinfo/{int(pidfd)}").read_text(encoding="ascii").splitlines():
        if line.startswith("Pid:"):
            pid = int(line.split()[1])
            if pid <= 0:
                raise ProcessLookupError(3, "the process has exited")
            return pid
    raise TypeError("not a pidfd")


@contextlib.contextmanager
def _process(pid: int) -> Iterator[Fd]:
    pidfd = os.pidfd_open(pid)
    try:
        yield Fd(pidfd)
    finally:
        os.close(pidfd)


@operation
def open_proc(pidfd: Fd, name: str, writable: bool) -> Fd:
    """Open a file of ``/proc/PID``; only the memory behind a mapping can be opened for writing."""
    if _FILES.fullmatch(name) is None or (writable and not name.startswith("map_files/")):
        raise ValueError(f"{name!r} is not opened")
    pid = pid_of(pidfd)
    fd = os.open(f"/proc/{pid}/{name}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        pid_of(pidfd)  # it still lives: the file is not a later process's
    except BaseException:
        os.close(fd)
        raise
    return Fd(fd)


@operation
def list_descriptors(pidfd: Fd, prefix: str) -> list[list[Any]]:
    """Return ``[number, link, device, inode]`` of each descriptor; without a file's status unless ``prefix`` fits."""
    folder = f"/proc/{pid_of(pidfd)}/fd"
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # closed meanwhile
                link = os.readlink(entry.path)  # noqa: PTH115 - of many descriptors
                status = entry.stat() if prefix and link.startswith(prefix) else None
                found.append([int(entry.name), link, *((status.st_dev, status.st_ino) if status else (0, 0))])
    return found


def open_file(pid: int, name: str, *, writable: bool = False) -> int:
    """Open ``/proc/PID/NAME``: maps, smaps, pagemap, mem, or a file in map_files.  Raises OSError, HostError."""
    with _process(pid) as pidfd:
        return int(open_proc(pidfd, name, writable))


def read_file(pid: int, name: str) -> str:
    """Read such a file.  Raises OSError, HostError."""
    with os.fdopen(open_file(pid, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def open_files(pid: int) -> dict[int, str]:
    """Return the process's descriptors and what `/proc` links them to; empty if it has exited or is hidden from us."""
    with contextlib.suppress(OSError), _process(pid) as pidfd:
        return {number: link for number, link, _, _ in list_descriptors(pidfd, "")}
    return {}


def open_inodes(pid: int, prefix: str) -> dict[int, tuple[int, int]]:
    """Return device and inode of the process's descriptors whose link begins with ``prefix``, like `open_files`."""
    with contextlib.suppress(OSError), _process(pid) as pidfd:
        listed = list_descriptors(pidfd, prefix)
        return {number: (device, inode) for number, link, device, inode in listed if link.startswith(prefix) and inode}
    return {}
