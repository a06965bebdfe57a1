"""A libvirtd of a test's own, as on a host of its own: its directories, its domains, nothing of this machine's libvirt.

libvirtd keeps its state in fixed places.  In a mount namespace these are directories of the test's, so that several run beside
each other and beside the machine's own.  The socket is reached from outside by its real path.  libvirtd runs as root without
systemd; its QEMUs run as libvirt's unprivileged user and under its seccomp sandbox, as on any host.

QEMU outlives libvirtd, as it should, and has a clean environment: it is known by its kernel, which lies in the test's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from migrated.demo.images import build_linux_guest
from migrated.demo.run import cache_directory
from migrated.errors import GuestRefusedError
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.libvirt import connection
from migrated.waiting import within
from tests.rig import subreaper, supervisor, traces

MIB = 1 << 20
_START_SECONDS = 60.0
_COMMAND_SECONDS = 60.0
_PLACES = {
    "etc/libvirt": "etc",
    "run/libvirt": "run",
    "var/lib/libvirt": "lib",
    "var/log/libvirt": "log",
    "var/cache/libvirt": "cache",
}
_QEMU_CONF = """\
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
"""
CONSOLE = "/var/lib/libvirt/qemu/console.sock"


def missing() -> str:
    """What this machine lacks for these tests; empty if nothing."""
    if os.geteuid() != 0:
        return "needs root: libvirtd in a mount namespace"
    for program in ("libvirtd", "virsh"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    try:
        connection.binding("vm")
    except GuestRefusedError as error:
        return error.message
    return ""


def end_everything(directory: Path) -> None:
    """End every process that names the directory: the QEMUs of its domains."""
    traces.end_processes(directory)


class LibvirtHost:
    """``name`` under ``directory``: short, and to be traversed by libvirt's user.  ``prefix`` goes before libvirtd's command.

    To libvirt it is a host of its own, with a name and a UUID: it refuses to migrate a domain to the host that has it.
    """

    def __init__(self, directory: Path, name: str, *, prefix: tuple[str, ...] = ()) -> None:
        self.directory = directory / f"virt-{name}"
        self._name = name
        self._prefix = prefix
        self._init: asyncio.subprocess.Process | None = None
        self._daemon: PidHandle | None = None

    @property
    def socket(self) -> Path:
        """Of libvirtd, as seen from outside its namespace."""
        return self.directory / "run" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """What a client connects to."""
        return f"qemu:///system?socket={self.socket}"

    @property
    def console(self) -> Path:
        """The serial console of the one domain here, from outside."""
        return self.directory / "lib" / Path(CONSOLE).relative_to("/var/lib/libvirt")

    async def start(self) -> None:
        """Start libvirtd and wait until it answers.  Also after `kill` or `terminate`: domains that run are found again."""
        if self._init is None:
            self._init = await self._enter()
        init = self._init
        assert init.stdin is not None
        assert init.stdout is not None
        init.stdin.write(b"start\n")
        async with within(_START_SECONDS, f"libvirtd to answer ({self.directory}/libvirtd.log)"):
            self._daemon = PidHandle.attach(int(await init.stdout.readline()))
            while (await self._virsh("version"))[0] != 0:
                assert self._daemon.poll() is None, (self.directory / "libvirtd.out").read_text()
                await asyncio.sleep(0.05)

    async def _enter(self) -> asyncio.subprocess.Process:
        """Make the namespace; its first process starts libvirtd when told to, and reaps what libvirtd leaves."""
        for place in _PLACES.values():
            (self.directory / place).mkdir(parents=True, exist_ok=True)
        (self.directory / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        (self.directory / "etc" / "libvirtd.conf").write_text(
            f'auth_unix_rw = "none"\nlog_outputs = "3:file:{self.directory}/libvirtd.log"\nhost_uuid = "{uuid.uuid4()}"\n'
        )
        mounts = [f"hostname host-{self._name}"]
        mounts += [f"mkdir -p /{to}; mount --bind {self.directory}/{of} /{to}" for to, of in _PLACES.items()]
        # A /dev/kvm that is there and that libvirt's user may not open has libvirt ask QEMU what it can do again, each time.
        kvm = self.directory / "kvm"
        mounts.append(f"[ -e /dev/kvm ] && mknod -m 666 {kvm} c 10 232 && mount --bind {kvm} /dev/kvm || true")
        daemon = "libvirtd -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid"
        init = f"exec {sys.executable} {Path(subreaper.__file__)} {daemon}"
        with (self.directory / "libvirtd.out").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(
                    *self._prefix,
                    "unshare",
                    "--mount",
                    "--uts",
                    "--propagation",
                    "private",
                    "bash",
                    "-ec",
                    "; ".join([*mounts, init]),
                ),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    async def kill(self) -> None:
        """SIGKILL libvirtd: its domains run on."""
        await self._end(signal.SIGKILL)

    async def terminate(self) -> None:
        """SIGTERM libvirtd: its domains run on."""
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            try:
                daemon.signal(number)
                await daemon.wait(_COMMAND_SECONDS)
            finally:
                daemon.signal(signal.SIGKILL)
                daemon.close()

    async def stop(self) -> None:
        """End libvirtd, what stands in for init, and all that libvirtd has left."""
        await self._end(signal.SIGKILL)
        init, self._init = self._init, None
        if init is not None:
            assert init.stdin is not None
            init.stdin.close()
            async with within(_COMMAND_SECONDS, "what libvirtd has left to end"):
                await init.wait()

    # ------------------------------------------------------------ virsh

    async def virsh(self, *arguments: str) -> str:
        """What virsh prints; AssertionError with what it says when it fails."""
        status, out, err = await self._virsh(*arguments)
        assert status == 0, f"virsh {' '.join(arguments)}: {err}"
        return out.strip()

    async def fails(self, *arguments: str) -> str:
        """What virsh says of a command that is to fail."""
        status, _, err = await self._virsh(*arguments)
        assert status != 0, f"virsh {' '.join(arguments)} succeeded"
        return err.strip()

    async def _virsh(self, *arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *("virsh", "--quiet", "--connect", self.uri, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with within(_COMMAND_SECONDS, f"virsh {' '.join(arguments)}"):
                out, err = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return int(process.returncode or 0), out.decode(), err.decode()

    async def state(self, domain: str) -> str:
        """``running``, ``paused``, ``shut off``, or ``none``: not known here."""
        status, out, _ = await self._virsh("domstate", domain)
        return out.strip() if status == 0 else "none"

    async def forget(self, domain: str) -> None:
        """End and undefine a domain, if it is known; start libvirtd for that if it has ended."""
        if self._daemon is None or self._daemon.poll() is not None:
            await self.start()
        await self._virsh("destroy", domain)
        await self._virsh("undefine", domain)

    async def start_domain(self, xml: str, *, persistent: bool) -> None:
        """Create a transient domain, or define and start a persistent one."""
        path = self.directory / "domain.xml"
        path.write_text(xml)
        if persistent:
            await self.virsh("define", str(path))
            await self.virsh("start", domain_name(xml))
        else:
            await self.virsh("create", str(path))


def domain_name(xml: str) -> str:
    """The name in a domain's XML."""
    return xml.partition("<name>")[2].partition("</name>")[0]


def domain_xml(
    directory: Path, name: str, memory_bytes: int, *, memory: str = "", devices: str = "", **load: str | int
) -> str:
    """A self-checking Linux guest under TCG as a domain.  ``memory``: inside ``<memoryBacking>``; ``devices``: more of them."""
    image = build_linux_guest(cache_directory())
    boot = directory / "boot"
    boot.mkdir(exist_ok=True)
    kernel, initrd = boot / "kernel", boot / "initrd"
    for source, copy in ((image.kernel, kernel), (image.initrd, initrd)):
        if not copy.exists():
            shutil.copyfile(source, copy)
    arguments = image.arguments(**load)
    words = arguments[arguments.index("-append") + 1]
    return f"""\
<domain type='qemu'>
  <name>{name}</name>
  <title>the title of {name}</title>
  <metadata><note xmlns='urn:migrated:test'>kept</note></metadata>
  <memory unit='b'>{memory_bytes}</memory>
  <memoryBacking>{memory}</memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{shutil.which("qemu-system-x86_64")}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'><source mode='bind' path='{CONSOLE}'/></serial>
    {devices}
  </devices>
</domain>
"""


@contextlib.asynccontextmanager
async def libvirt_hosts(
    directory: Path, *names: str, prefixes: Sequence[tuple[str, ...]] = ()
) -> AsyncIterator[tuple[LibvirtHost, ...]]:
    """Running libvirtds in ``directory``, which goes with all that runs from there.  ``prefixes``: one a name."""
    directory.chmod(0o755)  # noqa: ASYNC240 - at once
    prefixes = prefixes or [()] * len(names)
    hosts = tuple(LibvirtHost(directory, name, prefix=prefix) for name, prefix in zip(names, prefixes, strict=True))
    with supervisor.undoing(sys.executable, "-m", "tests.rig.libvirt_host", str(directory)):
        try:
            await asyncio.gather(*(host.start() for host in hosts))
            yield hosts
        finally:
            await asyncio.gather(*(host.stop() for host in hosts))
            end_everything(directory)


if __name__ == "__main__":
    end_everything(Path(sys.argv[1]))
