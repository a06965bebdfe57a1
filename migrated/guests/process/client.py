"""The client of a co-operative guest: a Python program whose memory `migrated` moves to another host while it works.

    client = GuestClient({"heap": 256 << 20}, workers=1)
    client.connect()                      # to MIGRATED_SOCKET; the memory is mapped when it returns
    heap = client.memory["heap"]          # an mmap: use it as bytes, or through a memoryview
    client.start(save=save, restore=restore)
    client.safe_point()
    if not client.incoming:
        ...                               # first start: fill the heap
    while True:
        client.safe_point()               # the worker waits in here while the guest is paused
        ...                               # work on the heap

In a process that was started to take over a guest, `incoming` is true: the client calls ``restore`` with what ``save``
returned on the other host, and `safe_point` returns when the guest is to run.  Until then only ``restore`` may touch
the memory.  When the guest has moved away, `safe_point` raises `MovedAwayError`: let the process exit.

A thread of the client's own answers requests.  A Python thread that waits for a page holds the interpreter's lock, so
that thread may have to wait with it.  This does no harm: the agent, another process, brings the pages and needs no
answer from us.  A guest on the source that loses its agent runs on, connects again and presents the memory it has.

This module uses the standard library only.  docs/process-guests.md describes the messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

from migrated.guests.process.wire import (
    HEADER,
    HELLO_DIRECT_IO,
    HELLO_PAUSED,
    HELLO_PRESENTS,
    MAX_REGIONS,
    Header,
    Hello,
    HelloRegion,
    Kind,
    WireError,
    decode_memory,
    message,
)

ENVIRONMENT = "MIGRATED_SOCKET"
_RETRY_SECONDS = 0.2
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # defined since Python 3.13
_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_USERFAULTFD_IOC_NEW = 0xAA00


class MovedAwayError(Exception):
    """The guest runs on another host: this process has nothing left to do."""


class RefusedError(Exception):
    """The agent refuses this guest; the text says why."""


class GuestClient:
    """One guest.

    ``regions``: names and sizes in bytes, multiples of the page size that the agent is configured for.
    ``workers``: how many threads call `safe_point`; the guest counts as paused when all of them are in it.
    ``direct_io``: whether anything reads into the memory with O_DIRECT.
    """

    def __init__(
        self,
        regions: Mapping[str, int],
        *,
        path: str | None = None,
        workers: int = 1,
        direct_io: bool = False,
    ) -> None:
        self.memory: dict[str, mmap.mmap] = {}
        self.incoming = False
        self._sizes = dict(regions)
        self._path = path if path is not None else os.environ[ENVIRONMENT]
        self._workers = workers
        self._save: Callable[[], bytes] | None = None
        self._restore: Callable[[bytes], None] | None = None
        self._direct_io = direct_io
        self._sock: socket.socket | None = None
        self._fds: list[int] = []
        self._pages: tuple[int, ...] = ()
        self._uffd = -1
        self._uffd_incoming = False
        self._turn = threading.Condition()
        self._paused = False
        self._ended = False
        self._parked = 0
        self._received = bytearray()
        self._received_fds: list[int] = []

    def connect(self, limit_seconds: float = 30) -> None:
        """Connect to the agent and map the memory; call `start` next.

        Raises RefusedError, WireError, TimeoutError, OSError.
        """
        deadline = time.monotonic() + limit_seconds
        while True:
            try:
                self._sock = self._dial()
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no agent listens on {self._path}") from None
                time.sleep(_RETRY_SECONDS)
        self._sock.settimeout(limit_seconds)
        header, payload, fds = self._receive(self._sock)
        self._map(self._sock, header, payload, fds)
        self._sock.settimeout(None)

    def start(self, *, save: Callable[[], bytes] | None = None, restore: Callable[[bytes], None] | None = None) -> None:
        """Start answering the agent.

        ``save`` returns the state that is not in the memory, and ``restore`` takes it on the other host.  The client's
        thread calls both while all workers stand still.
        """
        self._save, self._restore = save, restore
        threading.Thread(target=self._serve, name="migrated client", daemon=True).start()

    def safe_point(self) -> None:
        """Call between two pieces of work: returns at once, or, when the guest was paused, once it runs again."""
        if not self._paused and not self._ended:
            return
        with self._turn:
            self._parked += 1
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._paused or self._ended)
            self._parked -= 1
        if self._ended:
            raise MovedAwayError

    # ------------------------------------------------------------ the connection

    def _dial(self) -> socket.socket:
        flags = HELLO_DIRECT_IO if self._direct_io else 0
        flags |= HELLO_PAUSED if self._paused else 0
        pages = self._pages or tuple(0 for _ in self._sizes)
        addresses = self._addresses() if self._fds else tuple(0 for _ in self._sizes)
        hello = Hello(
            flags | (HELLO_PRESENTS if self._fds else 0),
            tuple(
                HelloRegion(name, size, page, address)
                for (name, size), page, address in zip(self._sizes.items(), pages, addresses, strict=True)
            ),
        )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._path)
            data = message(Kind.HELLO, hello.encode(), descriptors=len(self._fds))
            self._send(sock, data, tuple(self._fds))
        except BaseException:
            sock.close()
            raise
        return sock

    @staticmethod
    def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
        sent = socket.send_fds(sock, [data[: HEADER.size]], list(fds))
        sock.sendall(data[sent:])

    def _receive(self, sock: socket.socket) -> tuple[Header, bytes, tuple[int, ...]]:
        """Receive the next message.  Raises WireError, OSError, and ConnectionError when the connection has ended."""

        def have(size: int) -> bytes:
            while len(self._received) < size:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, MAX_REGIONS, socket.MSG_CMSG_CLOEXEC)
                self._received_fds += fds
                if not data:
                    raise ConnectionError("the agent closed the connection")
                self._received += data
            taken = bytes(self._received[:size])
            del self._received[:size]
            return taken

        header = Header.parse(have(HEADER.size))
        payload = have(header.payload_bytes)
        if len(self._received_fds) < header.descriptors:
            raise WireError("fewer descriptors than the agent said")
        fds = tuple(self._received_fds[: header.descriptors])
        del self._received_fds[: header.descriptors]
        return header, payload, fds

    def _serve(self) -> None:
        while not self._ended:
            try:
                if self._sock is None:
                    self._sock = self._dial()
                header, payload, fds = self._receive(self._sock)
                if header.kind is Kind.REFUSE:
                    raise ConnectionError(payload.decode(errors="replace"))
                if header.kind is Kind.LEAVE:
                    self._path = payload.decode()
                    self._disconnect()
                    if not self._path:
                        return
                    continue
                self._handle(self._sock, header, payload, fds)
            except (OSError, WireError):
                self._disconnect()
                if not self._path:
                    return
                time.sleep(_RETRY_SECONDS)

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._received.clear()
        while self._received_fds:
            os.close(self._received_fds.pop())
        if not self._uffd_incoming:
            self._forget()  # an exited agent tracks nothing; while pages are missing the descriptor must stay

    def _handle(self, sock: socket.socket, header: Header, payload: bytes, fds: tuple[int, ...]) -> None:
        answer = b""
        sent: tuple[int, ...] = ()
        try:
            match header.kind:
                case Kind.MEMORY:
                    self._map(sock, header, payload, fds)
                    return
                case Kind.UFFD:
                    answer, sent = self._open_uffd(incoming=payload != bytes(4))
                case Kind.FORGET:
                    self._forget()
                case Kind.PAUSE:
                    self._pause()
                case Kind.RUN:
                    self._run()
                case Kind.STATE:
                    answer = self._save() if self._save is not None else b""
                case Kind.RESTORE:
                    if self._restore is not None:
                        self._restore(payload)
                case Kind.END:
                    self._end()
                case _:
                    raise WireError(f"a {header.kind.name}, which only a guest may send")
        except (OSError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 - of the guest's own code: the agent is told
            self._send(sock, message(Kind.FAIL, f"{type(error).__name__}: {error}".encode(), sequence=header.sequence))
            return
        self._send(sock, message(Kind.REPLY, answer, sequence=header.sequence, descriptors=len(sent)), sent)

    # ------------------------------------------------------------ requests

    def _map(self, sock: socket.socket, header: Header, payload: bytes, fds: tuple[int, ...]) -> None:
        if header.kind is Kind.REFUSE:
            raise RefusedError(payload.decode(errors="replace"))
        if header.kind is not Kind.MEMORY:
            raise WireError(f"a {header.kind.name} before any memory")
        incoming, pages = decode_memory(payload)
        if len(pages) != len(self._sizes) or len(fds) != (0 if self._fds else len(self._sizes)):
            raise WireError("memory for other regions than ours")
        if fds:
            self._fds = list(fds)
            self._pages = pages
            self.incoming = self._paused = incoming
            for (name, size), fd in zip(self._sizes.items(), fds, strict=True):
                flags = mmap.MAP_SHARED | _MAP_NORESERVE  # the agent has already reserved what it must
                self.memory[name] = mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        addresses = self._addresses()
        answer = struct.pack(f"<{len(addresses)}Q", *addresses)
        self._send(sock, message(Kind.REPLY, answer, sequence=header.sequence))

    def _addresses(self) -> tuple[int, ...]:
        return tuple(ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self.memory.values())

    def _open_uffd(self, *, incoming: bool) -> tuple[bytes, tuple[int, ...]]:
        self._forget()
        user_mode_only = 0
        fd = _userfaultfd(0)
        if fd < 0:
            with contextlib.suppress(OSError):
                device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
                try:
                    fd = _LIBC.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
                finally:
                    os.close(device)
        if fd < 0:
            user_mode_only = 1
            fd = _userfaultfd(_UFFD_USER_MODE_ONLY)
        if fd < 0:
            code = ctypes.get_errno()
            raise RuntimeError(f"userfaultfd: {os.strerror(code)}")
        self._uffd, self._uffd_incoming = fd, incoming
        return struct.pack("<I", user_mode_only), (fd,)

    def _forget(self) -> None:
        fd, self._uffd, self._uffd_incoming = self._uffd, -1, False
        if fd >= 0:
            os.close(fd)

    def _pause(self) -> None:
        with self._turn:
            self._paused = True
            self._turn.wait_for(lambda: self._parked == self._workers)

    def _run(self) -> None:
        with self._turn:
            self._paused = False
            self._turn.notify_all()

    def _end(self) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify_all()


def _userfaultfd(flags: int) -> int:
    number = _SYS_USERFAULTFD.get(platform.machine(), -1)
    return int(_LIBC.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | flags))
