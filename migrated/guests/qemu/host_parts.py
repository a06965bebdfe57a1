"""Find what in QEMU's command line depends on the host rather than on the guest: disks, networks, sockets, devices.

Only the operator of another host can say whether it has the same; `doubts` says what to check.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from migrated.guests.qemu.options import Option, Properties

_DISKS = frozenset(
    {"", "blockdev", "drive", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "sd", "pflash", "mtdblock"}
)
_FILES = frozenset({"kernel", "initrd", "dtb", "bios", "option-rom", "pidfile", "D", "L", "chroot"})
_CHARACTER_DEVICES = frozenset({"serial", "parallel", "monitor", "debugcon", "gdb", "qmp", "qmp-pretty"})
_NO_PATHS = frozenset({"append", "name", "uuid", "numa", "smp", "cpu", "m", "boot", "rtc"})
_COMMON_FILES = frozenset({"/dev/urandom", "/dev/random", "/dev/null", "/dev/zero", "/dev/kvm"})
_DESCRIPTORS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock_fd", "sockfd", "tpmfd"})
_PATH = re.compile(r"(?:^|[:=])(/[^:,]+)")


def doubts(option: Option, properties: Properties | None, implied: str, directory: str) -> Iterator[str]:
    """Yield what to check in an option.

    ``implied``: the key of its first property; ``directory``: where QEMU was started.
    """
    name, value = option.name, option.value or ""
    pairs = [*properties.items()] if properties is not None else [("", value)]
    kind = properties.get(implied) if properties is not None else value
    yield from _descriptors(name, pairs)
    if name in _DISKS:
        for key, text in pairs:
            named = key in {"", "file"} if name != "blockdev" else key.rpartition(".")[2] == "filename"
            if named or "/" in text:
                yield f"{text}: the target must reach the same image{_relative(text, directory)}"
        return
    if name in _FILES or name == "readconfig":
        more = ", and what it configures is not shown here" if name == "readconfig" else ""
        yield f"{value}: must fit the target{more}{_relative(value, directory)}"
    elif name in {"netdev", "nic", "net"}:
        if kind not in {"none", "nic"}:
            yield "the network back end must exist on the target"
    elif name in _CHARACTER_DEVICES or name == "chardev":
        yield from _character_device(kind)
    elif name == "s":
        yield "TCP port 1234 must be free on the target"
    elif name in {"vnc", "spice"}:
        if kind != "none":
            yield "the address must be free on the target"
    elif name in {"display", "sdl", "curses"}:
        if kind not in {"none", "vnc"}:
            yield "needs a display or a GPU of the target"
    elif name == "nographic":
        yield "the agent gives QEMU no terminal: the serial console goes to its log"
    elif name == "cpu":
        if kind.partition(",")[0] in {"host", "max"}:
            yield "depends on the host's processor: both hosts need the same one"
    elif name == "runas":
        yield f"{value}: the user must exist on the target"
    elif name == "device":
        yield from _device(kind)
    elif name == "object" and kind.startswith(("sev-", "tdx-", "pef-")):
        yield f"{kind}: memory that is encrypted for one host cannot be migrated"
    if name not in _NO_PATHS and name not in _FILES:
        for path in (match for _, text in pairs for match in _PATH.findall(text)):
            if path not in _COMMON_FILES:
                yield f"{path}: must fit the target"


def _relative(path: str, directory: str) -> str:
    return "" if path.startswith("/") or ":" in path else f" (relative to {directory})"


def _descriptors(name: str, pairs: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the descriptors that whoever started the source's QEMU had opened for it."""
    by_type = {key.rpartition(".")[0]: value for key, value in pairs if key.endswith("addr.type")}
    for key, value in pairs:
        inner = key.rpartition(".")
        fd_address = inner[2] == "str" and by_type.get(inner[0]) == "fd"
        if inner[2] in _DESCRIPTORS or fd_address or (name == "add-fd" and key == "fd"):
            yield f"{key}={value}: a file descriptor that QEMU was started with; the agent passes none"
        elif "/dev/fdset/" in value or value.startswith("fd:"):
            yield f"{value}: a file descriptor that QEMU was started with; the agent passes none"


def _character_device(kind: str) -> Iterator[str]:
    backend = kind.partition(":")[2] if kind.startswith("mon:") else kind
    word = backend.partition(":")[0]
    if word == "stdio":
        yield "the agent gives QEMU no terminal: input is empty, output goes to its log"
    elif word not in {"none", "null", "vc", "chardev", "ringbuf", "spicevmc", "spiceport", "qemu-vdagent"}:
        yield "the socket, port, file or device must be free on the target"


def _device(kind: str) -> Iterator[str]:
    if kind.startswith(("vfio-", "vhost-vdpa", "usb-host")):
        yield f"{kind}: a device of the host, which cannot be migrated"
    elif kind.startswith("vhost-user"):
        yield f"{kind}: its other process writes guest memory; such a guest cannot be migrated"
    elif kind.startswith("virtio-mem"):
        yield f"{kind}: only QEMU's own migration saves all of its state; such a guest cannot be migrated"
    elif kind.startswith(("ivshmem", "virtio-pmem")):
        yield f"{kind}: its memory belongs to others as well; on the target it is the guest's alone"
