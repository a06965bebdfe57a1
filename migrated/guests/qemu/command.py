"""Check and complete the command line of an incoming QEMU.

This module refuses what cannot work and fills in the placeholders.  target.py sees in the running QEMU what the options
do not show (a wrapper script, a configuration file), and raises the same refusals.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from migrated.errors import GuestRefusedError
from migrated.guests.qemu.options import Properties, parse_size
from migrated.memory.regions import Region, TargetMemory

_MEMORY = re.compile(r"\{memory:([^{}]*)\}")
_ON = frozenset({"on", "yes", "true", "y"})


def regions_differ(guest: str, why: str) -> GuestRefusedError:
    """Return the refusal for memory backends that differ between the two sides."""
    return GuestRefusedError(
        f"guest {guest}: its memory differs between the hosts: {why}",
        code="regions-differ",
        hint="both QEMU commands need the same machine type, devices, and memory backends of the same ids and sizes; "
        "`migrated inspect PID --target-config` on the source prints a matching command",
    )


def check_command(guest: str, command: list[str], regions: tuple[Region, ...], *, reserve: bool = True) -> None:
    """Raise GuestRefusedError if this command cannot take a guest whose RAM is these ``regions`` on the source.

    ``reserve``: all of their memory is reserved; otherwise QEMU must not reserve it either.
    """
    if shutil.which(command[0]) is None:
        raise GuestRefusedError(
            f"guest {guest}: there is no program {command[0]} on this host",
            code="guest-command-missing",
            hint="install it, or correct the command of this guest in the target's configuration",
        )
    _refuse_options(guest, command)
    wanted = {region.name: region.size_bytes for region in regions}
    named = set(_MEMORY.findall(" ".join(command)))
    if named != wanted.keys():
        raise regions_differ(
            guest, f"the source has {_names(wanted)}, the command here has {_names(named)} (as {{memory:ID}})"
        )
    for backend in _declared_backends(command):
        name = backend.get("id")
        if name not in wanted:
            continue
        if not reserve and backend.get("reserve", "on").lower() in _ON:
            raise GuestRefusedError(
                f"guest {guest}: its memory is not to be reserved (reserve = false), but backend {name} would reserve it",
                code="guest-command",
                hint="add reserve=off to that -object memory-backend-file (QEMU 6.1 or newer)",
            )
        if backend.get("share", "off").lower() not in _ON:
            raise GuestRefusedError(
                f"guest {guest}: memory backend {name} in the command lacks share=on", code="memory-not-shared"
            )
        size = parse_size(backend.get("size"))
        if size is not None and size != wanted[name]:
            raise regions_differ(guest, f"{name} has {wanted[name]} bytes on the source and {size} here")


def _refuse_options(guest: str, command: list[str]) -> None:
    for argument in command[1:]:
        option = argument.lstrip("-") if argument.startswith("-") else ""
        if option in {"incoming", "daemonize", "loadvm", "snapshot"}:
            raise GuestRefusedError(
                f"guest {guest}: the command has {argument}, which does not fit a guest started by the agent",
                code="guest-command",
                hint="leave it out; -incoming defer -S is added by the agent",
            )


def command_line(command: list[str], memory: tuple[TargetMemory, ...], qmp: Path) -> list[str]:
    """Return the configured command with its placeholders filled in and the options of an incoming QEMU."""
    paths = {item.region.name: f"/proc/self/fd/{item.memory_fd}" for item in memory}
    line = [_MEMORY.sub(lambda match: paths[match[1]], argument).replace("{qmp}", str(qmp)) for argument in command]
    if not any("{qmp}" in argument for argument in command):
        line += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    return [*line, "-incoming", "defer", "-S"]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _declared_backends(command: list[str]) -> list[Properties]:
    """Return the -object memory-backend-… of a command, leaving those that cannot be parsed for QEMU to judge."""
    values = [value for flag, value in itertools.pairwise(command) if flag in {"-object", "--object"}]
    objects = [Properties(value, "qom-type") for value in values]
    return [one for one in objects if one.get("qom-type").startswith("memory-backend")]
