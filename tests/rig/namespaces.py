"""Network namespaces joined by veth pairs: hosts as far as TCP can tell.

Their names contain the pid of the test run.  Every exit path deletes them, and so does the supervisor if the run is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.rig import supervisor

_COMMAND_SECONDS = 10
_PREFIX = "mgt-"
_DEVICE = "cable"
_numbers = itertools.count()


def ip(*arguments: str) -> str:
    """Run ip(8).  Raises AssertionError with its output if it fails."""
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


@dataclasses.dataclass(frozen=True, slots=True)
class Namespaces:
    """Names and addresses of the two sides."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    @property
    def hosts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of `Host` for each side."""
        first, second = (
            {"prefix": ("ip", "netns", "exec", name), "listen": address}
            for name, address in zip(self.names, self.addresses, strict=True)
        )
        return first, second

    def limit(self, side: int, rate: str) -> None:
        """Limit the rate at which ``side`` sends (in the units of tc(8): ``200mbit``)."""
        shape = ["tbf", "rate", rate, "burst", "128kb", "latency", "100ms"]
        _run("tc", "-n", self.names[side], "qdisc", "replace", "dev", _DEVICE, "root", *shape)

    def sent_bytes(self, side: int) -> int:
        """Return the number of bytes that a side has sent through the link."""
        path = f"/sys/class/net/{_DEVICE}/statistics/tx_bytes"
        return int(ip("netns", "exec", self.names[side], "cat", path))


@contextlib.contextmanager
def namespaces() -> Iterator[Namespaces]:
    """Create two namespaces that can reach each other."""
    number = next(_numbers)
    first, second = f"{_PREFIX}{os.getpid()}-{number}a", f"{_PREFIX}{os.getpid()}-{number}b"
    # Addresses are local to the namespaces, so every pair may use the same ones.
    addresses = ("10.74.40.1", "10.74.40.2")
    with contextlib.ExitStack() as undo:
        for name in (first, second):
            undo.enter_context(supervisor.undoing("ip", "netns", "delete", name))
            ip("netns", "add", name)
            undo.callback(ip, "netns", "delete", name)
        ip("link", "add", "name", _DEVICE, "netns", first, "type", "veth", "peer", "name", _DEVICE, "netns", second)
        for name, address in zip((first, second), addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/30", "dev", _DEVICE)
            ip("-n", name, "link", "set", _DEVICE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Namespaces((first, second), addresses)


@contextlib.contextmanager
def star(rays: int) -> Iterator[list[dict[str, Any]]]:
    """Create a namespace in the middle and ``rays`` others, each joined to it; yield the arguments of `Host` for each.

    The one in the middle is the first.  It has an address on each link, and nobody needs to reach it.
    """
    number = next(_numbers)
    names = [f"{_PREFIX}{os.getpid()}-{number}{letter}" for letter in "abcdefgh"[: rays + 1]]
    hosts: list[dict[str, Any]] = [{"prefix": ("ip", "netns", "exec", name)} for name in names]
    with contextlib.ExitStack() as undo:
        for name in names:
            undo.enter_context(supervisor.undoing("ip", "netns", "delete", name))
            ip("netns", "add", name)
            undo.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        for ray, name in enumerate(names[1:], 1):
            near, far = f"{_DEVICE}{ray}", _DEVICE
            ip("link", "add", "name", near, "netns", names[0], "type", "veth", "peer", "name", far, "netns", name)
            for side, device, address in ((names[0], near, f"10.74.{40 + ray}.1"), (name, far, f"10.74.{40 + ray}.2")):
                ip("-n", side, "address", "add", f"{address}/30", "dev", device)
                ip("-n", side, "link", "set", device, "up")
            hosts[ray]["listen"] = f"10.74.{40 + ray}.2"
        yield hosts
