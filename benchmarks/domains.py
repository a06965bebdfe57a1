"""Migrate a libvirt domain with `migrated` and with `virsh migrate`: the same domain, between the same two libvirts.

Both are measured as an operator sees them: from the command to its end, including the start of the incoming QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from benchmarks.guest import LOADS, TimedConsole
from benchmarks.network import Link, link
from benchmarks.report import Section, mebibytes, milliseconds, seconds
from benchmarks.sample import Sample, medians
from benchmarks.settings import MIB, Settings
from migrated.demo.images import build_bootsector
from migrated.demo.pair import short_directory
from migrated.demo.run import cache_directory
from migrated.errors import HostError, MigratedError
from tests.rig import libvirt_host, supervisor
from tests.rig.host import Host
from tests.rig.libvirt_host import LibvirtHost, libvirt_hosts
from tests.rig.pages import PagesUnavailableError, more_pages

NAME = "bench"
SYSTEMS = ("migrated", "virsh", "virsh-postcopy")
DOWNTIME_LIMIT_MS = 50
PORT = 49152
COMMAND_SECONDS = 60.0
_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")
_EVENT = re.compile(r"event (\w+) at (\d+\.\d+)")
NOTES = (
    (
        "The domain has libvirt's default memory (private, 4 KiB and transparent huge pages); after `migrated` it is on 2 MiB pages, "
        "after `virsh migrate` as before. A KVM guest, one virtual processor; loads as in the comparison with QEMU."
    ),
    (
        "Total: the whole command, with the start of the incoming QEMU and what libvirt does on both hosts. Downtime: from QEMU's "
        "STOP on the source to RESUME on the target, as libvirt reports these events. Longest stall: as in the comparison."
    ),
    (
        "virsh: `virsh migrate --live`, and with `--postcopy --postcopy-after-precopy`; downtime limit as migrated's "
        f"({DOWNTIME_LIMIT_MS} ms), bandwidth unlimited. Bytes: on the wire, both directions."
    ),
)


class Events:
    """The monitor events that one libvirt reports: the wall clock time of the last of each kind."""

    def __init__(self, libvirt: LibvirtHost) -> None:
        self._libvirt = libvirt
        self._seen: dict[str, float] = {}
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[Events]:
        """Follow the events until the end of the block."""
        process = await asyncio.create_subprocess_exec(
            *("stdbuf", "-oL", "virsh", "--connect", self._libvirt.uri, "qemu-monitor-event", "--loop"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        reading = asyncio.create_task(self._read(process))
        try:
            yield self
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await process.wait()
            await reading

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise AssertionError
        while line := await process.stdout.readline():
            if found := _EVENT.match(line.decode(errors="replace")):
                async with self._changed:
                    self._seen[found[1]] = float(found[2])
                    self._changed.notify_all()

    async def last(self, name: str) -> float:
        """Return the time of the last event of this name; wait for the first."""
        async with asyncio.timeout(COMMAND_SECONDS), self._changed:
            await self._changed.wait_for(lambda: name in self._seen)
        return self._seen[name]


class Domain:
    """A domain under load on the first of two libvirts, and an agent on each side."""

    def __init__(self, made: Link, libvirts: tuple[LibvirtHost, ...], hosts: tuple[Host, Host]) -> None:
        self.link = made
        self.libvirts = libvirts
        self.hosts = hosts
        self.console = TimedConsole(NAME)

    async def migrate(self, sample: Sample, limit_seconds: float) -> None:
        """Migrate it with the sample's system, and enter the figures."""
        source, target = (Events(libvirt) for libvirt in self.libvirts)
        async with source.followed() as stops, target.followed() as resumes:
            await self.console.command("reset")
            await self.console.stats()
            attach = asyncio.ensure_future(
                self.console.attach(self.libvirts[1].console, limit_seconds + COMMAND_SECONDS)
            )
            try:
                agent = await self.hosts[0].source()
                wire = self.link.wire_bytes(agent.pid)
                began = time.monotonic()
                ended = await (
                    self._migrated(sample, limit_seconds)
                    if sample.system == "migrated"
                    else self._virsh(sample.system, limit_seconds)
                )
                sample.total_seconds = time.monotonic() - began
                sample.wire_bytes = self.link.wire_bytes(agent.pid) - wire
                if not ended:
                    sample.outcome = f"no end in {limit_seconds:g} s"
                    return
                await attach
            finally:
                attach.cancel()
            sample.downtime_seconds = await resumes.last("RESUME") - await stops.last("STOP")
        load = await self.console.stats()
        sample.stall_seconds = max(load.stall_ms / 1000, sample.downtime_seconds)
        sample.verified = await self.console.verified()

    async def _migrated(self, sample: Sample, limit_seconds: float) -> bool:
        source = await self.hosts[0].source()
        body = {"guest": NAME, "to": self.hosts[1].address}
        identity = str((await source.request("POST", "/v1/migrations", body))["id"])
        record = await source.wait(identity, limit_seconds=limit_seconds)
        if record["state"] != "completed":
            error = record.get("error") or {}
            raise MigratedError(f"{record['state']}: {error.get('code')}: {error.get('message')}")
        sample.details = {key: record[key] for key in ("downtime_breakdown", "round", "stale_pages", "timeline")}
        return True

    async def _virsh(self, system: str, limit_seconds: float) -> bool:
        options = ["--postcopy", "--postcopy-after-precopy"] if system == "virsh-postcopy" else []
        process = await asyncio.create_subprocess_exec(
            *("virsh", "--quiet", "--connect", self.libvirts[0].uri, "migrate", "--live", "--unsafe", *options, NAME),
            *(
                f"qemu+unix:///system?socket={self.libvirts[1].socket}",
                "--migrateuri",
                f"tcp://{self.link.target_address}:{PORT}",
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        talk = asyncio.ensure_future(process.communicate())
        try:
            done, _ = await asyncio.wait({talk}, timeout=limit_seconds)
            if not done:
                await self.libvirts[0].virsh("domjobabort", NAME)
                await asyncio.wait_for(talk, COMMAND_SECONDS)
                return False
            if process.returncode:
                raise MigratedError(talk.result()[0].decode(errors="replace").strip())
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        return True


async def run(settings: Settings) -> Section:
    """Measure every path and load ``settings.runs`` times, the systems in alternating runs."""
    if lacking := libvirt_host.missing():
        raise HostError(f"libvirt domains cannot be compared: {lacking}")
    section = Section(
        "libvirt",
        "Compared with `virsh migrate`",
        ("path", "load", "system", "total", "downtime", "longest stall", "wire", "memory verified"),
        notes=[
            f"{settings.memory_bytes // MIB} MiB of memory; medians of {settings.runs} runs, the systems alternating.",
            *NOTES,
        ],
    )
    supervisor.start()
    try:
        with _userfaultfd_for_all(), more_pages(settings.memory_bytes // (2 * MIB), 2 * MIB):
            for path in settings.paths:
                await _path(settings, section, path)
    except PagesUnavailableError as error:
        raise HostError(str(error)) from error
    return section


@contextlib.contextmanager
def _userfaultfd_for_all() -> Iterator[None]:
    """Let libvirt's unprivileged QEMU make a userfaultfd, as libvirt's packages set it up for post-copy."""
    former = _USERFAULTFD.read_text()
    _USERFAULTFD.write_text("1")
    try:
        yield
    finally:
        _USERFAULTFD.write_text(former)


async def _path(settings: Settings, section: Section, path: str) -> None:
    with link(path) as made, supervisor.directory("mgb-", short_directory()) as directory:
        prefixes = (made.source_prefix, made.target_prefix)
        async with libvirt_hosts(directory, "a", "b", prefixes=prefixes) as libvirts:
            numbers = itertools.count()
            for load in settings.loads:
                samples: dict[str, list[Sample]] = {system: [] for system in SYSTEMS}
                for number in range(settings.runs):
                    for system in SYSTEMS:
                        sample = Sample(system=system, path=path, load=load, memory_bytes=settings.memory_bytes)
                        await _one(sample, made, libvirts, directory / f"m{next(numbers)}", settings.limit_seconds)
                        settings.say(path, load, system, number, sample)
                        samples[system].append(sample)
                for system in SYSTEMS:
                    _add(section, samples[system])
                settings.save(section)


async def _one(
    sample: Sample, made: Link, libvirts: tuple[LibvirtHost, ...], directory: Path, limit_seconds: float
) -> None:
    try:
        async with _domain(sample, made, libvirts, directory) as domain:
            await domain.migrate(sample, limit_seconds)
    except (AssertionError, MigratedError, OSError, TimeoutError) as error:
        sample.outcome = f"{type(error).__name__}: {error}"


@contextlib.asynccontextmanager
async def _domain(
    sample: Sample, made: Link, libvirts: tuple[LibvirtHost, ...], directory: Path
) -> AsyncIterator[Domain]:
    directory.mkdir()  # noqa: ASYNC240 - at once
    prefixes, listen = (made.source_prefix, made.target_prefix), (made.target_address, made.target_address)
    hosts = tuple(
        Host(
            directory,
            name,
            prefix=prefix,
            listen=address,
            source={"libvirt": {"uri": libvirt.uri, "domains": [NAME]}},
            target={"libvirt": {"uri": libvirt.uri, "accept": [NAME]}},
        )
        for name, prefix, address, libvirt in zip("ab", prefixes, listen, libvirts, strict=True)
    )
    domain = Domain(made, libvirts, (hosts[0], hosts[1]))
    try:
        await libvirts[0].start_domain(_xml(directory, sample), persistent=False)
        await libvirts[0].virsh("migrate-setmaxdowntime", NAME, str(DOWNTIME_LIMIT_MS))
        await domain.console.attach(libvirts[0].console)
        await domain.console.wait_booted()
        await hosts[0].source()
        await hosts[1].target()
        yield domain
    finally:
        for host in hosts:
            await host.stop()
        await domain.console.close()
        for libvirt in libvirts:
            await libvirt.forget(NAME)


def _xml(directory: Path, sample: Sample) -> str:
    disk = directory / "boot.img"
    shutil.copyfile(build_bootsector(cache_directory(), **LOADS[sample.load]), disk)
    return f"""\
<domain type='kvm'>
  <name>{NAME}</name>
  <memory unit='b'>{sample.memory_bytes}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>{shutil.which("qemu-system-x86_64")}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{disk}'/>
      <target dev='hda' bus='ide'/>
      <shareable/>
    </disk>
    <serial type='unix'><source mode='bind' path='{libvirt_host.CONSOLE}'/></serial>
  </devices>
</domain>
"""


def _add(section: Section, samples: list[Sample]) -> None:
    result, first = medians(samples), samples[0]
    total = seconds(result["total_seconds"]) if result["ended"] else first.outcome.splitlines()[0][:60]
    if 0 < result["ended"] < result["runs"]:
        total += f" ({result['ended']} of {result['runs']} ended)"
    section.rows.append(
        (
            *(first.path, first.load, first.system, total, milliseconds(result["downtime_seconds"])),
            *(milliseconds(result["stall_seconds"]), mebibytes(result["wire_bytes"] or first.wire_bytes)),
            f"{result['verified']} of {result['ended']}",
        )
    )
    data = {"path": first.path, "load": first.load, "system": first.system}
    section.data.append({**data, **result, "samples": [msgspec.to_builtins(sample) for sample in samples]})
