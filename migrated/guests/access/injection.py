"""Make a userfaultfd inside an unmodified process, and close it again without a trace.

A userfaultfd belongs to the memory of the process that *makes* it, so that process must make the call: one of its
threads runs one system call (``mgd_inject_syscall``), and ``pidfd_getfd`` brings a duplicate of the descriptor here.
The process keeps its own descriptor on purpose: the kernel wakes every waiting thread when the last one is closed.  A
guest that waits while our daemon is dead is right, a guest that reads stale memory is not.

A process without the right to call userfaultfd gets it through ``/dev/userfaultfd``.  We open the device and hand its
descriptor over by whatever channel the process offers; the descriptor carries the right, and the process runs the ioctl
on it.

All that needs privileges is in the operations (`migrated.privileged`), which the agents leave to the privileged helper.
Each makes one kind of call, with few arguments: an agent cannot have a process run whatever it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import os
import platform
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from migrated.errors import GuestError, GuestRefusedError, HostError, MigratedError
from migrated.guests.access.pidfd import PidHandle
from migrated.memory.memfd import BASE_PAGE_BYTES, NAME_PREFIX
from migrated.memory.native import inject_syscall, uffd_api, uffd_unregister
from migrated.memory.regions import SourceMemory
from migrated.privileged import Fd, open_files, operation, pid_of
from migrated.waiting import in_thread

_SYS_CLOSE = 3
_SYS_MMAP = 9
_SYS_MUNMAP = 11
_SYS_IOCTL = 16
_SYS_MADVISE = 28
_SYS_RECVMSG = 47
_SYS_SOCKETPAIR = 53
_SYS_KCMP = 312
_SYS_USERFAULTFD = 323
_KCMP_FILE = 0
_PROT_READ_WRITE = 1 | 2
_MAP_SHARED_FIXED = 0x01 | 0x10
_MAP_PRIVATE_ANONYMOUS = 0x02 | 0x20
_MADV_DONTNEED_LOCKED = 24  # Linux 5.18
_USERFAULTFD_IOC_NEW = 0xAA00
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_LINK = "anon_inode:[userfaultfd]"
DEVICE = Path("/dev/userfaultfd")
#: How much memory one call unregisters, as in `native/src/tracker.c`.
_STEP_BYTES = 16 << 20
_STEP_BYTES_HUGE = 1 << 30

_WORD = (1 << 64) - 1

_LIBC = ctypes.CDLL(None, use_errno=True)

#: Hands a descriptor of ours to the process.  Awaiting the returned callable makes the process close its own again.
SendDescriptor = Callable[[int], Awaitable[Callable[[], Awaitable[None]]]]


@dataclasses.dataclass(slots=True)
class InjectedUffd:
    """A userfaultfd made in another process.

    ``fd``: our duplicate; ``remote_fd``: its number in the process; ``stopped_seconds``: how long a thread stood still.
    """

    process: PidHandle
    fd: int
    remote_fd: int
    stopped_seconds: float


def remote_syscall(process: PidHandle, number: int, *arguments: int) -> tuple[int, float]:
    """Run a system call in the process; return its raw result and for how many seconds its main thread stood still.

    Blocks.  Raises GuestRefusedError ``cannot-inject``.
    """
    if platform.machine() != "x86_64":
        raise GuestRefusedError(
            f"reaching into a running process is not implemented on {platform.machine()}", code="cannot-inject"
        )
    try:
        injected = inject_syscall(process.pid, number, arguments)
    except MigratedError as error:
        raise GuestRefusedError(
            f"cannot reach into process {process.pid}: {error.message}",
            code="cannot-inject",
            hint="the agent needs CAP_SYS_PTRACE, and nothing else (a debugger) may trace the process",
        ) from error
    return injected.result, injected.stopped_seconds


# ---------------------------------------------------------------- operations


def _process(pidfd: int) -> PidHandle:
    """Return a handle that does not own its pidfd.  Raises GuestRefusedError ``cannot-inject``."""
    try:
        return PidHandle(pid_of(pidfd), pidfd, child=False)
    except ProcessLookupError as error:
        raise GuestRefusedError("the process has exited", code="cannot-inject") from error


@functools.partial(operation, tries=1)
def make_uffd(pidfd: Fd) -> list[Any]:
    """Have the process make a userfaultfd: its number there, or -errno, and for how many seconds the process stood still."""
    return list(remote_syscall(_process(pidfd), _SYS_USERFAULTFD, _FLAGS))


@functools.partial(operation, tries=1)
def make_uffd_through_device(pidfd: Fd, number: int) -> list[Any]:
    """Have the process make a userfaultfd through its descriptor of the device; see `make_uffd`."""
    process = _process(pidfd)
    if open_files(process.pid).get(number) != str(DEVICE):
        raise GuestError(f"process {process.pid}: descriptor {number} is not {DEVICE}", code="cannot-inject")
    return list(remote_syscall(process, _SYS_IOCTL, number, _USERFAULTFD_IOC_NEW, _FLAGS))


@operation
def take_uffd(pidfd: Fd, number: int) -> Fd:
    """Return a duplicate of a userfaultfd of the process."""
    fd = _process(pidfd).take_fd(number)
    if os.readlink(f"/proc/self/fd/{fd}") != _LINK:  # noqa: PTH115 - the link's text, not a path
        os.close(fd)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), f"pidfd_getfd({number})")
    return Fd(fd)


@operation
def close_given(pidfd: Fd, number: int) -> None:
    """Have the process close a descriptor that it has through us."""
    process = _process(pidfd)
    link = open_files(process.pid).get(number, "")
    if link in {_LINK, str(DEVICE)} or link.startswith(f"/memfd:{NAME_PREFIX}"):
        remote_syscall(process, _SYS_CLOSE, number)


@operation
def map_memory_over(pidfd: Fd, address: int, length_bytes: int, number: int) -> None:
    """Have the process map memory of ours, shared, over whatever is at ``address``."""
    process = _process(pidfd)
    if not open_files(process.pid).get(number, "").startswith(f"/memfd:{NAME_PREFIX}"):
        raise GuestError(f"process {process.pid}: descriptor {number} is no memory of ours", code="cannot-inject")
    arguments = (address, length_bytes, _PROT_READ_WRITE, _MAP_SHARED_FIXED, number, 0)
    result, _ = remote_syscall(process, _SYS_MMAP, *arguments)
    if result != address:
        raise _failed(process, "mmap", address, length_bytes, result)


@operation
def empty_mapping(pidfd: Fd, address: int, length_bytes: int) -> None:
    """Remove a shared mapping's pages, locked ones too, from the process's page tables; the file keeps them."""
    process = _process(pidfd)
    result, _ = remote_syscall(process, _SYS_MADVISE, address, length_bytes, _MADV_DONTNEED_LOCKED)
    if result != 0:
        raise _failed(process, "madvise", address, length_bytes, result)


@functools.partial(operation, tries=1)
def give_descriptors(pidfd: Fd, fds: list[Fd]) -> list[int]:
    """See `give_fds`."""
    return _give_fds(_process(pidfd), fds)


@operation
def is_same_file(pidfd: Fd, number: int, fd: Fd) -> bool:
    """Whether our ``fd`` and the process's descriptor are one open file; without CONFIG_KCMP, assume so."""
    order = int(_LIBC.syscall(_SYS_KCMP, os.getpid(), pid_of(pidfd), _KCMP_FILE, int(fd), number))
    # Without CONFIG_KCMP (ENOSYS) the link's name must do: nothing else in a guest makes userfaultfds meanwhile.
    return order == 0 or (order < 0 and ctypes.get_errno() == errno.ENOSYS)


# ---------------------------------------------------------------- for the drivers


def map_over(process: PidHandle, address: int, length_bytes: int, remote_fd: int) -> None:
    """Have the process map its descriptor ``remote_fd``, shared, over whatever is at ``address``.  Blocks.

    Raises GuestRefusedError ``cannot-inject``.
    """
    map_memory_over(process.pidfd, address, length_bytes, remote_fd)


def empty_page_tables(process: PidHandle, address: int, length_bytes: int) -> None:
    """Remove a shared mapping's pages, locked ones too, from the process's page tables; the file keeps them.  Blocks.

    Raises GuestRefusedError ``cannot-inject``.
    """
    empty_mapping(process.pidfd, address, length_bytes)


#: Size of the area in a page of the process where `give_fds` puts recvmsg's arguments.
_SCRATCH_BYTES = 4096
_IOVEC, _BYTE, _CONTROL = 64, 96, 128
_MSGHDR = struct.Struct("QI4xQQQQi4x")
_CMSGHDR = struct.Struct("Qii")


def give_fds(process: PidHandle, fds: Sequence[int]) -> list[int]:
    """Give duplicates of our ``fds`` to the process, close-on-exec; return their numbers there.  Blocks.

    For a process that has no channel to us.  It makes a pair of sockets; we take one (``pidfd_getfd``) and send through
    it.  Nothing of that remains.  Raises GuestRefusedError ``cannot-inject``.
    """
    return give_descriptors(process.pidfd, [Fd(fd) for fd in fds])


def _give_fds(process: PidHandle, fds: Sequence[int]) -> list[int]:
    scratch = _must(
        process, "mmap", _SYS_MMAP, 0, _SCRATCH_BYTES, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1 & _WORD, 0
    )
    try:
        with Path(f"/proc/{process.pid}/mem").open("r+b", buffering=0) as memory:
            kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
            _must(process, "socketpair", _SYS_SOCKETPAIR, socket.AF_UNIX, kind, 0, scratch)
            near, far = struct.unpack("ii", os.pread(memory.fileno(), 8, scratch))
            try:
                with socket.socket(fileno=process.take_fd(near)) as ours:
                    socket.send_fds(ours, [b"\0"], fds)
                return _receive_fds(process, memory.fileno(), scratch, far, len(fds))
            finally:
                for number in (near, far):
                    remote_syscall(process, _SYS_CLOSE, number)
    except OSError as error:
        raise GuestRefusedError(
            f"cannot give descriptors to process {process.pid}: {error.strerror}", code="cannot-inject"
        ) from error
    finally:
        with contextlib.suppress(GuestRefusedError):  # of a process that has just exited
            remote_syscall(process, _SYS_MUNMAP, scratch, _SCRATCH_BYTES)


def _receive_fds(process: PidHandle, memory_fd: int, scratch: int, far: int, count: int) -> list[int]:
    space = socket.CMSG_SPACE(4 * count)
    head = _MSGHDR.pack(0, 0, scratch + _IOVEC, 1, scratch + _CONTROL, space, 0)
    os.pwrite(memory_fd, head, scratch)
    os.pwrite(memory_fd, struct.pack("QQ", scratch + _BYTE, 1), scratch + _IOVEC)
    _must(process, "recvmsg", _SYS_RECVMSG, far, scratch, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    control = os.pread(memory_fd, space, scratch + _CONTROL)
    length, level, kind = _CMSGHDR.unpack_from(control)
    numbers = struct.unpack_from(f"{(length - _CMSGHDR.size) // 4}i", control, _CMSGHDR.size)
    if (level, kind, len(numbers)) != (socket.SOL_SOCKET, socket.SCM_RIGHTS, count):
        raise GuestRefusedError(
            f"process {process.pid} received {len(numbers)} of {count} descriptors",
            code="cannot-inject",
            hint="raise the limit of open files of that process, and see whether a security module denies it",
        )
    return list(numbers)


def _must(process: PidHandle, name: str, number: int, *arguments: int) -> int:
    """Run `remote_syscall` and raise if the call failed."""
    result, _ = remote_syscall(process, number, *arguments)
    if result < 0:
        raise GuestRefusedError(f"process {process.pid}: {name}: {os.strerror(-result)}", code="cannot-inject")
    return result


def _failed(process: PidHandle, call: str, address: int, length_bytes: int, result: int) -> GuestRefusedError:
    return GuestRefusedError(
        f"process {process.pid}: {call} of {length_bytes} bytes at {address:#x}: {os.strerror(-result)}",
        code="cannot-inject",
    )


def userfaultfds(pid: int) -> list[int]:
    """Return the numbers of the process's userfaultfds."""
    return _numbers(pid, _LINK)


def _numbers(pid: int, link: str) -> list[int]:
    return sorted(number for number, target in open_files(pid).items() if target == link)


def same_file(pid: int, remote_fd: int, fd: int) -> bool:
    """Whether our ``fd`` and the process's ``remote_fd`` are one open userfaultfd."""
    if remote_fd not in userfaultfds(pid):
        return False
    process = PidHandle.attach(pid)
    try:
        return is_same_file(process.pidfd, remote_fd, Fd(fd))
    except ProcessLookupError:
        return False
    finally:
        process.close()


def find_remote(pid: int, fd: int) -> int | None:
    """Return the number under which the process holds our ``fd``."""
    return next((number for number in userfaultfds(pid) if same_file(pid, number, fd)), None)


async def open_uffd(
    process: PidHandle, *, faults: bool, tracking: bool, send_descriptor: SendDescriptor | None
) -> InjectedUffd:
    """Make a userfaultfd in the process and do UFFDIO_API on it.

    ``send_descriptor`` is used when the process lacks the right.  Raises GuestRefusedError (``cannot-inject``,
    ``no-userfaultfd``), or UFFDIO_API's error on a kernel that lacks a feature.
    """

    def undo(made: list[Any]) -> None:
        if made[0] >= 0:
            with contextlib.suppress(MigratedError, OSError):
                close_given(process.pidfd, made[0])

    remote, stopped = await in_thread(make_uffd, process.pidfd, undo=undo)
    if remote == -errno.EPERM and send_descriptor is not None:
        remote, stopped = await _through_device(process, send_descriptor, undo)
    if remote < 0:
        raise GuestRefusedError(
            f"process {process.pid} cannot make a userfaultfd: {os.strerror(-remote)}",
            code="no-userfaultfd",
            hint="set vm.unprivileged_userfaultfd=1, or run a kernel with /dev/userfaultfd (6.1)",
        )
    fd = -1
    try:
        fd = take_uffd(process.pidfd, remote)
        uffd_api(fd, faults=faults, tracking=tracking)
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(MigratedError, OSError):
            await in_thread(close_given, process.pidfd, remote)
        if isinstance(error, OSError):
            raise GuestRefusedError(
                f"cannot take the userfaultfd of process {process.pid}: {error.strerror}", code="cannot-inject"
            ) from error
        raise
    return InjectedUffd(process, fd, remote, stopped)


def by_injection(process: PidHandle) -> SendDescriptor:
    """Return how to give a descriptor to a process that offers no channel for it."""

    async def give(fd: int) -> Callable[[], Awaitable[None]]:
        (number,) = await in_thread(give_fds, process, [fd])

        async def take_back() -> None:
            await in_thread(close_given, process.pidfd, number)

        return take_back

    return give


async def _through_device(
    process: PidHandle, send_descriptor: SendDescriptor, undo: Callable[[list[Any]], None]
) -> list[Any]:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise GuestRefusedError(
            f"process {process.pid} may not call userfaultfd, and {DEVICE} cannot be opened: {error.strerror}",
            code="no-userfaultfd",
            hint="set vm.unprivileged_userfaultfd=1, or run a kernel with /dev/userfaultfd (6.1)",
        ) from error
    try:
        before = set(_numbers(process.pid, str(DEVICE)))
        take_back = await send_descriptor(device)
        try:
            handed = set(_numbers(process.pid, str(DEVICE))) - before
            if len(handed) != 1:
                raise GuestError(f"process {process.pid} did not receive {DEVICE}", code="cannot-inject")
            return await in_thread(make_uffd_through_device, process.pidfd, handed.pop(), undo=undo)
        finally:
            await take_back()
    finally:
        os.close(device)


async def close_uffd(uffd: InjectedUffd) -> None:
    """Close the descriptor in the process and here.  Works on a dead process.

    Raises GuestRefusedError ``cannot-inject`` if the process cannot be reached; ours is closed all the same.
    """
    try:
        if uffd.process.poll() is None and same_file(uffd.process.pid, uffd.remote_fd, uffd.fd):
            await in_thread(close_given, uffd.process.pidfd, uffd.remote_fd)
    except (GuestError, HostError):
        if uffd.process.poll() is None:
            raise
    finally:
        os.close(uffd.fd)


async def close_remote(process: PidHandle, number: int, memory: SourceMemory) -> None:
    """Close a userfaultfd that only the process still holds (left by an agent that died).

    Closing would lift the write-protection of all memory in one hold of the process's mmap_lock, taken by the closing
    thread. So we first unregister the memory from here, in steps of about a millisecond.
    """
    if number not in userfaultfds(process.pid):
        return
    with contextlib.suppress(OSError):  # or the descriptor is already closed
        ours = take_uffd(process.pidfd, number)
        try:
            await in_thread(_unregister, ours, memory)
        finally:
            os.close(ours)
    await in_thread(close_given, process.pidfd, number)


def _unregister(uffd: int, memory: SourceMemory) -> None:
    for mapping in memory.mappings:
        step = _STEP_BYTES if memory.regions[mapping.region].page_bytes == BASE_PAGE_BYTES else _STEP_BYTES_HUGE
        for offset in range(0, mapping.length_bytes, step):
            with contextlib.suppress(MigratedError):  # closing lifts whatever this leaves
                uffd_unregister(uffd, mapping.address + offset, min(step, mapping.length_bytes - offset))
