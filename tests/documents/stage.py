"""The hosts of the documents: `hosta`, `hostb` and `hostc`, as docs/first-migration.md prepares them.

Each has namespaces of its own: network (with a link from `hosta` to each of the others), processes, mounts and host name.  Its
/etc, /root and /tmp are overlays, its /run is empty, and /srv is shared by all, as storage is.  It sees nothing of this machine's
own agents, guests and configuration, and they see nothing of it.  A guest is a QEMU with a boot sector as its disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from migrated.demo.console import GuestConsole
from migrated.demo.images import build_bootsector
from migrated.demo.pair import AgentProcess, short_directory
from migrated.demo.run import cache_directory
from migrated.errors import MigratedError
from migrated.waiting import within
from tests.documents.blocks import ROOT, Block
from tests.rig import supervisor

MIB = 1 << 20
NAMES = ("hosta", "hostb", "hostc")
#: A host without a link, for what needs no other.
ALONE = "alone"
MEMORY_BYTES = 128 * MIB
#: What the guest writes, again and again.
LOADED_BYTES = 24 * MIB
#: Nothing waits this long unless something is broken.
PATIENCE_SECONDS = 100.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SERIAL = "/run/vm1.tty"
#: Where commands are run.
WORK = "/run/page"
#: What differs from the page.  Its guest has 1 GiB, and arrives on huge pages; but this machine is small, and whatever else
#: runs on it shares the pool.
GUEST_CHANGES = [("-m 1G", f"-m {MEMORY_BYTES // MIB}M"), ('page_size = "2M"', 'page_size = "4K"')]
if not Path("/dev/kvm").exists():
    GUEST_CHANGES.append(("-accel kvm", "-accel tcg"))
else:
    GUEST_CHANGES.append(("-cpu max ", "-accel kvm "))  # which is what the page has for TCG


def changed(text: str) -> str:
    """A guest of the documents, as this machine can have it."""
    for before, after in GUEST_CHANGES:
        text = text.replace(before, after)
    return text


#: Process 1 of a host: it prepares the mounts, says so, and reaps what loses its parent.
_INIT = """
hostname "$NAME"
mount --make-rprivate /
mount -t tmpfs tmpfs "$DIRECTORY/private"
mount --bind "$DIRECTORY/srv" /srv
cd "$DIRECTORY/private"  # which /tmp hides in the end
for place in etc root tmp; do
    mkdir $place.upper $place.work
    mount -t overlay -o "lowerdir=/$place,upperdir=$place.upper,workdir=$place.work" overlay "/$place"
done
cd /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/page
rm -rf /etc/migrated /root/migrated-ca
printf '%s\\n' "$HOSTS" >/etc/hosts
ip link set lo up
echo ready
while sleep 1000; do :; done
"""


class StageUnavailableError(Exception):
    """This machine does not let us make such hosts; the message says why."""


class DocumentHost:
    """One host.  `up` makes it."""

    def __init__(self, name: str, pid: int, programs: Path) -> None:
        self.name = name
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")
        self._environment = {"PATH": f"{programs}:{PATH}", "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
        self._environment[supervisor.WORD] = os.environ[supervisor.WORD]
        self.started: list[asyncio.subprocess.Process] = []

    def _command(self, text: str) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--net", "--pid", "--"]
        return [*enter, "sh", "-c", f"cd {WORK} && {text}"]

    async def run(self, text: str, *, codes: tuple[int, ...] = (0,), interrupt: float = 0) -> str:
        """Run a command as its page writes it; its output, both streams.  ``interrupt``: send ^C after so long."""
        process = await asyncio.create_subprocess_exec(
            *self._command(f"timeout --foreground -s INT {interrupt} {text}" if interrupt else text),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
        )
        try:
            async with within(PATIENCE_SECONDS, text):
                output, _ = await process.communicate()
        except BaseException:
            if process.returncode is None:
                process.kill()
                await process.wait()
            raise
        told = output.decode(errors="replace")
        allowed = (*codes, 124) if interrupt else codes
        assert process.returncode in allowed, f"{self.name}# {text}\nexit code {process.returncode}\n{told}"
        return told

    async def start(self, text: str, log: str) -> asyncio.subprocess.Process:
        """Start a command that does not end by itself; its output goes to a file of this host."""
        process = await asyncio.create_subprocess_exec(
            *self._command(f"exec {text} >{log} 2>&1"),
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    async def script(self, pieces: list[str]) -> str:
        """Run the blocks of a page in one shell, which gives up at the first error.

        Where a block starts something in the background, the next one waits for its sockets, as a reader would.
        """
        text = "set -eu\n"
        for piece in pieces:
            sockets = re.findall(r"unix:(/\S+?),server", piece)
            sockets += [
                f"/run/migrated/{role}/control.sock"
                for role in re.findall(r"^migrated (source|target)\b.*&$", piece, re.MULTILINE)
            ]
            text += piece + "".join(f"until [ -S {socket} ]; do sleep 0.05; done\n" for socket in sockets)
        path, log = (self.root / "run" / name for name in ("script", "script.log"))
        path.write_text(text)
        # What stays in the background keeps its output.
        await self.run("sh -x /run/script >/run/script.log 2>&1; echo $? >/run/script.code")
        assert (self.root / "run/script.code").read_text() == "0\n", log.read_text()
        return log.read_text()

    def agent(self, role: str) -> AgentProcess:
        """An agent of this host, to be asked over its control socket."""
        return AgentProcess(role, self.root / "run/migrated", {})

    async def until(self, what: str, is_so: Callable[[], bool]) -> None:
        """Wait for something that nobody reports."""
        async with within(PATIENCE_SECONDS, f"{what} on {self.name}"):
            while not is_so():  # noqa: ASYNC110 - as said
                await asyncio.sleep(0.05)

    def processes(self, program: str) -> list[int]:
        """The processes of this host that run a program."""
        mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.stat(f"/proc/{entry}/ns/pid").st_ino == mine:
                    first = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")[0].decode()
                    found += [int(entry)] * (Path(first).name == program)
        return found

    async def end(self, program: str) -> None:
        """End every process of this host that runs a program."""
        for pid in self.processes(program):
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    if pid in self.processes(program):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        await self.until(f"end of {program}", lambda: not self.processes(program))


@contextlib.asynccontextmanager
async def _up(name: str, directory: Path, hosts: str) -> AsyncIterator[DocumentHost]:
    unshare = ("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child")
    environment = {**os.environ, "NAME": name, "DIRECTORY": str(directory), "HOSTS": hosts}
    log = directory / f"{name}.log"
    with log.open("wb") as errors:
        holder = await asyncio.create_subprocess_exec(
            *unshare, "sh", "-euc", _INIT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        assert holder.stdout is not None
        async with within(PATIENCE_SECONDS, f"{name} to be up"):
            if await holder.stdout.readline() != b"ready\n":
                raise StageUnavailableError(f"no such host can be made here: {log.read_text().strip()}")
        host = DocumentHost(name, _child(holder.pid), directory / "bin")
        try:
            yield host
        finally:
            holder.kill()  # and process 1 with it, and everything on this host
            for process in (holder, *host.started):
                await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            holder.kill()
        await holder.wait()


def _child(pid: int) -> int:
    """The only child of a process."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def _join(hub: int, far: int, number: int) -> None:
    """Make the link between two hosts, which are named by their process 1."""
    near_end, far_end = (f"eth{number}", hub, 1), ("eth0", far, 2)
    cable = ("add", "name", near_end[0], "netns", hub, "type", "veth", "peer", "name", far_end[0], "netns", far)
    subprocess.run(["ip", "link", *map(str, cable)], check=True, capture_output=True, timeout=30)
    for device, pid, last in (near_end, far_end):
        for words in (f"address add 10.77.{number}.{last}/30 dev {device}", f"link set {device} up"):
            command = ["nsenter", f"--target={pid}", "--net", "ip", *words.split()]
            subprocess.run(command, check=True, capture_output=True, timeout=30)


class Stage:
    """The hosts, and what has to be so before a command of the documents can be run."""

    def __init__(self, hosts: dict[str, DocumentHost], page: list[Block]) -> None:
        self.hosts = hosts
        self.hosta, self.hostb, self.hostc, self.alone = (hosts[name] for name in (*NAMES, ALONE))
        self._page = page
        self._followed = ""  # the last migration that took the guest from `hosta`, once it has gone
        #: What the page has them do until the agents run: host and command, with the output.
        self.ran: dict[tuple[str, str], str] = {}

    # ------------------------------------------------------------ the page, from the guest to the agents

    def _block(self, start: str) -> str:
        """The first block of the page that begins so."""
        return next(block.text for block in self._page if block.text.startswith(start))

    async def start_guest(self) -> None:
        """Start the page's guest on `hosta`, if it is not there."""
        if self.hosta.processes("qemu-system-x86_64"):
            return
        for host in (self.hostb, self.hostc):
            await host.end("qemu-system-x86_64")
        text = re.sub(r"\s+", " ", self._block("qemu-system-x86_64").replace("\\\n", " ")).strip()
        self.ran["hosta", text] = ""
        text = changed(text)
        qmp, log = (self.hosta.root / "run" / name for name in ("vm1.qmp", "guest.log"))
        qmp.unlink(missing_ok=True)
        qemu = await self.hosta.start(f"{text} -serial unix:{SERIAL},server=on,wait=off", "/run/guest.log")
        await self.hosta.until("QEMU's monitor", lambda: qmp.exists() or qemu.returncode is not None)
        assert qemu.returncode is None, log.read_text()
        ended, booted = asyncio.ensure_future(qemu.wait()), asyncio.ensure_future(self._boot())
        try:
            await asyncio.wait({ended, booted}, return_when=asyncio.FIRST_COMPLETED)
            assert not ended.done(), log.read_text()
            await booted
        finally:
            ended.cancel()
            booted.cancel()

    async def _boot(self) -> None:
        async with self.console(self.hosta) as console:
            await console.stats(PATIENCE_SECONDS)

    @contextlib.asynccontextmanager
    async def console(self, host: DocumentHost) -> AsyncIterator[GuestConsole]:
        """The guest's console, wherever it runs."""
        console = GuestConsole("vm1")
        try:
            await console.attach(host.root / SERIAL.lstrip("/"), PATIENCE_SECONDS)
            yield console
        finally:
            await console.close()

    async def assert_sound(self, host: DocumentHost) -> None:
        """The guest runs on this host, and its memory is what it wrote."""
        async with self.console(host) as console:
            swept = await console.sweep(PATIENCE_SECONDS)
            assert (swept.wrong, swept.errors, console.corrupt) == (0, 0, [])

    async def prepare(self) -> None:
        """Certificates, configuration and agents, as the page says."""
        certificates = [
            line.removeprefix("hosta# ") for line in self._block("hosta# migrated certificates").splitlines()
        ]
        for host in self.hosts.values():
            directory = host.root / "etc/migrated"
            directory.mkdir(mode=0o750)  # by `make install`
            for role in ("source", "target"):
                shutil.copy(ROOT / "config" / f"{role}.toml", directory)
        for command in certificates:
            self.ran["hosta", command] = await self.run_on_hosta(command)
        await self.hosta.run("migrated certificates new hostc --ca /root/migrated-ca")
        await self.copy("scp -rp /root/migrated-ca/hostc root@hostc:/etc/migrated/tls")
        await self.start_guest()
        assert "PID" not in self._block("hosta# migrated inspect")
        (self.hosta.root / "etc/migrated/source.toml").write_text(self._block("[guests.vm1]") + PROCESS_GUEST)
        inspect = self._block("hosta# migrated inspect").removeprefix("hosta# ").strip()
        table = self.ran["hosta", inspect] = await self.hosta.run(inspect)
        for host in (self.hostb, self.hostc):
            (host.root / "etc/migrated/target.toml").write_text(self._block("[tls]") + changed(table))
            await host.start("migrated target", "/run/target.log")
        await self.hosta.start("migrated source", "/run/source.log")
        for host, role in ((self.hosta, "source"), (self.hostb, "target"), (self.hostc, "target")):
            socket, log = host.root / f"run/migrated/{role}/control.sock", host.root / f"run/{role}.log"
            await host.until(f"the {role} agent ({log})", socket.exists)

    async def run_on_hosta(self, command: str) -> str:
        """Run a command of `hosta`, a copy to another host included; its output."""
        return await (self.copy(command) if command.startswith("scp ") else self.hosta.run(command))

    async def copy(self, command: str) -> str:
        """Do what scp(1) does: these hosts have no sshd."""
        match = re.fullmatch(r"scp -rp (/\S+) root@(host[bc]):(/\S+)", command)
        assert match is not None, command
        source, destination = self.hosta.root / match[1].lstrip("/"), self.hosts[match[2]].root / match[3].lstrip("/")
        await asyncio.to_thread(shutil.copytree, source, destination)
        return ""

    # ------------------------------------------------------------ states

    async def newest(self) -> dict[str, Any]:
        """The record of the newest migration."""
        records = (await self.hosta.agent("source").request("GET", "/v1/migrations"))["migrations"]
        return dict(max(records, key=lambda record: record["started_at"])) if records else {}

    async def active(self) -> str:
        """The id of a migration in pre-copy, which lasts as long as a command needs it."""
        if (record := await self.newest()) and record["state"] == "precopy":
            return str(record["id"])
        await self.idle()
        body = {"guest": "vm1", "to": "hostb:7440", "max_bandwidth": "50KB"}
        made = await self.hosta.agent("source").request("POST", "/v1/migrations", body)
        await self.hosta.agent("source").wait(made["id"], "precopy", ended=False)
        return str(made["id"])

    async def idle(self) -> None:
        """No migration, and the guest on `hosta`."""
        source = self.hosta.agent("source")
        if record := await self.newest():
            if record["ended_at"] is None:
                with contextlib.suppress(MigratedError):  # it may end before
                    await source.request("POST", f"/v1/migrations/{record['id']}/abort")
                record = await source.wait(record["id"])
            if record["state"] == "completed" and record["id"] != self._followed:
                self._followed = record["id"]
                await self.hosta.until("end of QEMU", lambda: not self.hosta.processes("qemu-system-x86_64"))
        await self.start_guest()

    async def ended(self) -> None:
        """There was a migration."""
        if not (record := await self.newest()) or record["ended_at"] is None:
            await self.active()
            await self.idle()


#: Beside the page's guest, so that docs/process-guests.md has its own.
PROCESS_GUEST = '\n[guests.p1]\ndriver = "process"\nsocket = "/run/p1.sock"\npage_size = "4K"\n'


@contextlib.asynccontextmanager
async def stage(page: list[Block]) -> AsyncIterator[Stage]:
    """The hosts, with guest and agents.  Raises StageUnavailableError."""
    with supervisor.directory("mgd-", short_directory()) as directory:
        for name in ("bin", "private", "srv"):
            (directory / name).mkdir()
        program = directory / "bin" / "migrated"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m migrated "$@"\n')
        program.chmod(0o755)
        image = await asyncio.to_thread(
            build_bootsector, cache_directory(), size_bytes=LOADED_BYTES, rate=1000, sweep_seconds=0
        )
        disk = directory / "srv" / "vm1.qcow2"
        await asyncio.to_thread(shutil.copy, image, disk)
        os.truncate(disk, 2 * MIB)  # where O_DIRECT asks for whole pages, as on a tmpfs, so does QEMU
        others = NAMES[1:]
        lines = ["127.0.0.1 localhost", f"10.77.1.1 {NAMES[0]}"]
        lines += [f"10.77.{number}.2 {name}" for number, name in enumerate(others, 1)]
        async with contextlib.AsyncExitStack() as stack:
            hosts = {
                name: await stack.enter_async_context(_up(name, directory, "\n".join(lines)))
                for name in (*NAMES, ALONE)
            }
            for number, name in enumerate(others, 1):
                await asyncio.to_thread(_join, hosts[NAMES[0]].pid, hosts[name].pid, number)
            made = Stage(hosts, page)
            await made.prepare()
            yield made
