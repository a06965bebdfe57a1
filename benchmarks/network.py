"""Paths for the memory: temporary network namespaces, joined by a link of a given rate."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

#: Bits per second of the named paths; 0: as fast as the machine copies.
RATES = {"loopback": 0, "10g": 10_000_000_000, "1g": 1_000_000_000}
#: Token bucket: burst size, and the maximum time of a packet in the queue.
BURST_SECONDS = 0.0008
QUEUE_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Link:
    """Where each side runs.  ``device`` is the source's network device, which counts the bytes of both directions."""

    name: str
    source_namespace: str
    target_namespace: str
    target_address: str
    device: str

    @property
    def source_prefix(self) -> tuple[str, ...]:
        """Prefix of a command that runs it on the source's side, with the same process id."""
        return _inside(self.source_namespace)

    @property
    def target_prefix(self) -> tuple[str, ...]:
        """Like `source_prefix`, for the target's side."""
        return _inside(self.target_namespace)

    def wire_bytes(self, pid: int) -> int:
        """Return the bytes that the link has carried so far, as a process on the source's side sees it."""
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.strip() == self.device:
                fields = rest.split()
                received, sent = int(fields[0]), int(fields[8])
                return sent if self.device == "lo" else received + sent  # lo counts every byte twice
        raise LookupError(f"process {pid} is not on {self.name}: it has no {self.device}")


@contextlib.contextmanager
def link(name: str) -> Iterator[Link]:
    """Create the path ``name`` (a key of `RATES`).  Needs root."""
    own = f"mgb{os.getpid()}"
    with contextlib.ExitStack() as stack:
        if RATES[name] == 0:
            _namespace(stack, own)
            yield Link(name, own, own, "127.0.0.1", "lo")
            return
        source, target = f"{own}s", f"{own}t"
        _namespace(stack, source)
        _namespace(stack, target)
        _ip("-n", source, "link", "add", "mgb0", "type", "veth", "peer", "name", "mgb1", "netns", target)
        for namespace, device, address in ((source, "mgb0", "10.77.0.1/24"), (target, "mgb1", "10.77.0.2/24")):
            _ip("-n", namespace, "address", "add", address, "dev", device)
            _ip("-n", namespace, "link", "set", device, "up")
            _limit(namespace, device, RATES[name])
        yield Link(name, source, target, "10.77.0.2", "mgb0")


def _inside(namespace: str) -> tuple[str, ...]:
    return ("nsenter", f"--net=/run/netns/{namespace}")


def _namespace(stack: contextlib.ExitStack, name: str) -> None:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _ip("-n", name, "link", "set", "lo", "up")


def _limit(namespace: str, device: str, bits_per_second: int) -> None:
    burst = max(int(bits_per_second / 8 * BURST_SECONDS), 128 * 1024)  # never below two full TSO packets
    _run(
        *(*_inside(namespace), "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{bits_per_second}bit"),
        *("burst", f"{burst}b", "latency", f"{QUEUE_SECONDS * 1000:g}ms"),
    )


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
