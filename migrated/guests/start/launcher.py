"""The first program of a guest's process: it makes the process what the guest is to find, and executes the guest.

    python3 -I -S -c SOURCE PLAN

It is passed as text and imports the standard library only, because the guest's user may be unable to read our files.
PLAN is JSON.  As a service of systemd the plan is ``{"socket": NAME}``, an abstract socket of the agent's.  One packet
from there has the rest, and the descriptors that the guest inherits.  A packet in return says why the guest could not be
executed; if it could, the connection just ends.  As a child of the agent the plan has everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys

MAX_PACKET_BYTES = 1 << 20
MAX_FDS = 250  # SCM_MAX_FD is 253
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MODES = {"preferred": 1, "bind": 2, "interleave": 3, "local": 4}
_NODES = 1024

_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), call)


def _place(connection: socket.socket, fds: list[int], numbers: list[int]) -> socket.socket:
    """Give the received descriptors the numbers under which the guest expects them; return the connection anew."""
    free = max([2, *numbers]) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in (connection.detach(), *fds)]
    for fd, number in zip(moved[1:], numbers, strict=True):
        os.dup2(fd, number)
    return socket.socket(fileno=moved[0])


def _keep_only(numbers: list[int]) -> None:
    """Let the guest inherit these descriptors, and its standard ones."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib takes time to import
        number = int(name)
        if number > 2 and number not in numbers:
            with contextlib.suppress(OSError):  # that of this listing
                os.set_inheritable(number, False)


def _set_policy(mode: str, nodes: list[int]) -> None:
    mask = (ctypes.c_ulong * (_NODES // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    number = _SYS_SET_MEMPOLICY[os.uname().machine]
    _check(_LIBC.syscall(number, _MODES[mode], mask if nodes else None, _NODES + 1), "set_mempolicy")


def _become(uid: int, gid: int, groups: list[int]) -> None:
    """Become a user without capabilities, who cannot gain any."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    number = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:  # EINVAL after the last one
        number += 1
    _check(_LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl(PR_CAP_AMBIENT)")
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_LIBC.capset(header, bytes(24)), "capset")


def main() -> None:
    """Do what the plan says; return only by an exception."""
    plan = json.loads(sys.argv[1])
    connection = None
    try:
        if "socket" in plan:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect("\0" + plan["socket"])
            packet, fds, _, _ = socket.recv_fds(connection, MAX_PACKET_BYTES, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            plan = json.loads(packet)
            connection = _place(connection, fds, plan["fds"])
        if plan.get("numa"):
            _set_policy(*plan["numa"])
        if plan.get("nice"):
            os.setpriority(os.PRIO_PROCESS, 0, plan["nice"])
        if plan.get("ids"):
            _become(*plan["ids"])
        _keep_only(plan["fds"])
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and execve would pass that on
            signal.signal(number, signal.SIG_DFL)
        environment = {**os.environ, **plan["environment"]}
        os.execve(plan["program"], plan["command"], environment)  # noqa: S606 - no shell is wanted
    except (OSError, ValueError, KeyError) as error:
        text = f"cannot start {plan.get('program', 'the guest')}: {error}"
        if connection is not None:
            connection.send(text.encode())
        sys.exit(text)


if __name__ == "__main__":
    main()
