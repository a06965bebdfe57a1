"""Describe and run a self-checking QEMU guest.

This module has its command lines on both sides, its process and its console.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

from migrated.demo.images import build_bootsector, build_linux_guest
from migrated.demo.running_guest import RunningGuest
from migrated.errors import GuestError

#: The program to run.  MIGRATED_QEMU names another version of QEMU.
QEMU = os.environ.get("MIGRATED_QEMU") or "qemu-system-x86_64"
MIB = 1 << 20


#: Where the first QEMU keeps the guest's memory: in its default, private memory ("private-small": without transparent
#: huge pages), in a memfd with pages of ``page_bytes``, or in a file on a hugetlbfs.
Memory = Literal["private", "private-small", "memfd", "file"]

#: Starts the command that follows it without transparent huge pages (PR_SET_THP_DISABLE).
_WITHOUT_THP = (
    sys.executable,
    "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QemuGuest:
    """What to run.  ``directory`` must have a short path: sockets and logs live there."""

    directory: Path
    cache: Path
    name: str = "demo"
    program: str = QEMU
    target_program: str | None = None  # default: as at the source
    machine: str = "q35"
    kind: Literal["linux", "boot"] = "linux"
    accel: Literal["tcg", "kvm"] = "tcg"
    memory_bytes: int = 512 * MIB
    page_bytes: int = 2 * MIB
    target_page_bytes: int | None = None  # default: as at the source
    memory: Memory = "memfd"
    regions: int = 1  # memory backends, each a NUMA node
    hugetlbfs: Path | None = None  # a mount for `memory` "file"
    load: dict[str, str | int] = dataclasses.field(default_factory=dict)  # of linux_init.c / build_bootsector
    disk: Path | None = None
    disk_options: str = "cache=none"
    extra: tuple[str, ...] = ()
    source_extra: tuple[str, ...] = ()  # for the first QEMU only
    qmp: Path | None = None  # QMP socket of the first QEMU; default: in ``directory``

    @property
    def backends(self) -> tuple[str, ...]:
        """Ids of the memory backends; a PC's own one is called pc.ram."""
        if self.regions == 1:
            return ("pc.ram",) if self._private else ("ram",)
        return tuple(f"ram{index}" for index in range(self.regions))

    @property
    def _private(self) -> bool:
        return self.memory in {"private", "private-small"}

    def _memory(self, paths: bool) -> list[str]:
        arguments = ["-m", f"{self.memory_bytes // MIB}M", "-machine"]
        if self._private and self.regions == 1 and not paths:
            return [*arguments, self.machine]
        size = self.memory_bytes // self.regions
        arguments += [f"{self.machine},memory-backend={self.backends[0]}" if self.regions == 1 else self.machine]
        for backend in self.backends:
            arguments += ["-object", self._target_backend(backend, size) if paths else self._backend(backend, size)]
            arguments += ["-numa", f"node,memdev={backend}"] if self.regions > 1 else []
        return arguments

    def _target_backend(self, backend: str, size: int) -> str:
        return f"memory-backend-file,id={backend},size={size},share=on,mem-path={{memory:{backend}}}"

    def _backend(self, backend: str, size: int) -> str:
        if self._private:
            return f"memory-backend-ram,id={backend},size={size}"
        if self.memory == "file":
            return f"memory-backend-file,id={backend},size={size},share=on,mem-path={self.hugetlbfs}"
        huge = f",hugetlb=on,hugetlbsize={self.page_bytes}" if self.page_bytes > 4096 else ""
        return f"memory-backend-memfd,id={backend},size={size},share=on{huge}"

    def _devices(self) -> list[str]:
        arguments = ["-accel", self.accel, "-nodefaults", "-display", "none"]
        if self.kind == "linux":
            arguments += ["-cpu", "max"] if self.accel == "tcg" else []
            arguments += build_linux_guest(self.cache).arguments(**self.load)
        else:
            image = build_bootsector(self.cache, **self.load)  # type: ignore[arg-type]  # checked by the callee's tests
            arguments += ["-drive", f"format=raw,file={image},if=ide,readonly=off,snapshot=on"]
        if self.disk is not None:
            arguments += [
                *("-blockdev", f"driver=file,filename={self.disk},node-name=disk0,{self._disk_cache()}"),
                *("-device", "virtio-blk-pci,drive=disk0"),
            ]
        return [*arguments, *self.extra]

    def _disk_cache(self) -> str:
        direct = "on" if "none" in self.disk_options or "direct" in self.disk_options else "off"
        aio = ",aio=native" if direct == "on" else ""
        return f"cache.direct={direct}{aio}"

    @property
    def source_qmp(self) -> Path:
        """QMP socket of the first QEMU."""
        return self.qmp or self.directory / f"{self.name}.qmp"

    @property
    def source_serial(self) -> Path:
        """Serial socket of the first QEMU."""
        return self.directory / f"{self.name}.tty"

    def target_serial(self, move: int = 1) -> Path:
        """Return the serial socket of the QEMU after this migration."""
        return self.directory / f"{self.name}.{move}.tty"

    def source_command(self) -> list[str]:
        """Return the command of the running guest."""
        return [
            *(_WITHOUT_THP if self.memory == "private-small" else ()),
            *(self.program, *self._memory(paths=False), *self._devices()),
            *("-serial", f"unix:{self.source_serial},server=on,wait=off"),
            *("-qmp", f"unix:{self.source_qmp},server=on,wait=off"),
            *self.source_extra,
        ]

    def target_command(self, move: int = 1) -> list[str]:
        """Return the command of the incoming guest, as in the target's configuration."""
        return [
            *(self.target_program or self.program, *self._memory(paths=True), *self._devices()),
            *("-serial", f"unix:{self.target_serial(move)},server=on,wait=off"),
            *("-qmp", "unix:{qmp},server=on,wait=off"),
        ]

    def source_table(self, qmp: Path | None = None) -> dict[str, Any]:
        """``[guests.NAME]`` of the source."""
        return {"driver": "qemu", "qmp": str(qmp or self.source_qmp)}

    def target_table(self, move: int = 1) -> dict[str, Any]:
        """``[guests.NAME]`` of the target."""
        page = self.target_page_bytes or self.page_bytes
        return {"driver": "qemu", "page_size": str(page), "command": self.target_command(move)}


class RunningQemu(RunningGuest):
    """The first QEMU process and the guest's console."""

    def __init__(self, guest: QemuGuest) -> None:
        super().__init__(guest.name, guest.directory / f"{guest.name}.qemu.log")
        self.guest = guest

    async def start(self, *, boot_seconds: float = 120, prefix: tuple[str, ...] = ()) -> None:
        """Start QEMU, attach the console, and wait for the load."""
        command = await asyncio.to_thread(self.guest.source_command)
        process = await self._launch(*prefix, *command)
        ended = asyncio.ensure_future(process.wait())
        booted = asyncio.ensure_future(self._boot(boot_seconds))
        try:
            await asyncio.wait({ended, booted}, return_when=asyncio.FIRST_COMPLETED)
            if not booted.done():
                raise GuestError(f"QEMU exited with status {process.returncode}: {self.log_path.read_text()[-2000:]}")
            booted.result()
        finally:
            booted.cancel()
            ended.cancel()

    async def _boot(self, limit_seconds: float) -> None:
        await self.console.attach(self.guest.source_serial)
        await self.console.wait_booted(limit_seconds)
