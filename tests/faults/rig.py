"""Two agents, a co-operative guest, a bad network between them, and the questions to be asked after every failure.

The guest that arrives connects to the same source agent again, so that one rig serves as many migrations as are wanted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from migrated.demo.pair import AgentProcess, free_port, short_directory
from migrated.errors import GuestError, MigratedError
from migrated.waiting import within
from tests.faults.proxy import DOWN, Proxy
from tests.rig import supervisor
from tests.rig.reconnects import check_reconnects

HERE = Path(__file__).parent
GUEST = "vm"
ENDED = ("completed", "aborted", "failed")
LIMIT_SECONDS = 30.0
PIDFD = "anon_inode:[pidfd]"

#: Short enough that a test does not wait long, long enough for two busy cores.
TIMEOUTS: dict[str, float] = {
    "connect": 2.0,
    "handshake": 3.0,
    "guest_start": 10.0,
    "guest_command": 3.0,
    "guest_pause": 1.5,
    "guest_state": 3.0,
    "switchover": 3.0,
    "abort": 3.0,
    "release": 3.0,
    "heartbeat_interval": 0.25,
    "heartbeat_limit": 1.5,
    "reconnect_interval": 0.05,
    "reconnect_interval_limit": 0.2,
    "shutdown": 2.0,
}


def build_guest(directory: Path) -> Path:
    """Compile the guest; GuestError when there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise GuestError("no C compiler")
    program = directory / "fault_guest"
    root = HERE.parent.parent
    command = [
        compiler,
        *(
            "-std=gnu11",
            "-O2",
            "-pthread",
            "-I",
            str(root / "native/include"),
            "-I",
            str(root / "migrated/demo/images"),
        ),
        *("-o", str(program), str(HERE / "guest.c")),
    ]
    subprocess.run(command, check=True, timeout=120)
    return program


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def zombies(pid: int) -> list[int]:
    """Children that have ended and whose exit status nobody has collected."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children += [int(child) for child in path.read_text().split()]
    return [child for child in children if os.path.exists(f"/proc/{child}") and not is_alive(child)]


def descriptors(pid: int) -> collections.Counter[str]:
    """What the process has open, by kind."""
    kinds: collections.Counter[str] = collections.Counter()
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                link = os.readlink(f"/proc/{pid}/fd/{entry}")
                # libuv keeps a descriptor in reserve: of /dev/null, and of / once it had to be used.
                kinds[re.sub(r"^(socket|pipe):.*", r"\1", "/dev/null" if link == "/" else link)] += 1
    return kinds


def guest_mappings(pid: int) -> list[str]:
    """Lines of /proc/PID/maps that show a guest's memory."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return [line for line in lines if "memfd:" in line and "memfd:libffi" not in line]
    return []


def tracked(pid: int) -> list[str]:
    """What userfaultfd has left in the process: descriptors, and flags of its mappings."""
    found = [kind for kind in descriptors(pid) if "userfaultfd" in kind]
    with contextlib.suppress(OSError):
        flags = [line for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if line.startswith("VmFlags:")]
        found += [line for line in flags if {"uw", "um", "ui"} & set(line.split()[1:])]
    return found


@dataclasses.dataclass(frozen=True)
class Status:
    """One answer of the guest."""

    pid: int
    incoming: int
    ready: int
    paused: int
    parked: int
    uffd: int
    connected: int
    operations: int
    errors: int
    wrong: int
    twice: int
    sweep: int
    swept: int
    first_wrong: list[int]


class Rig:
    """See `running`."""

    def __init__(
        self,
        directory: Path,
        program: Path,
        *,
        pages: str = "4K",
        target_pages: str | None = None,
        size_mib: int = 16,
        rate: int = 2000,
        timeouts: dict[str, float] | None = None,
        source_journal_dir: Path | None = None,
        target_journal_dir: Path | None = None,
        target_status: bool = False,
        tls: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.directory = directory
        self.program = program
        self.size_mib = size_mib
        self.rate = rate
        self.migration = ""
        self.heartbeat_limit = {**TIMEOUTS, **(timeouts or {})}["heartbeat_limit"]
        self.begun_at = 0.0  # by the loop's clock: the last migration
        self.guest = 0  # pid of the guest at the source when the migration began
        port = free_port()
        self.proxy = Proxy(("127.0.0.1", port))
        self.guest_socket = directory / "vm.sock"
        common: dict[str, Any] = {
            "tls": {"insecure": True},
            "http": {"status": ""},
            "timeouts": {**TIMEOUTS, **(timeouts or {})},
        }
        command = [str(program), str(directory), str(size_mib), str(rate)]
        source_guest = {"driver": "process", "socket": str(self.guest_socket), "page_size": pages}
        target_guest = {
            "driver": "process",
            "command": command,
            "page_size": target_pages or pages,
            "next_socket": str(self.guest_socket),
        }
        self.source = AgentProcess("source", directory, {**common, "guests": {GUEST: source_guest}})
        listen = {"listen": {"address": f"127.0.0.1:{port}"}}
        self.status = f"127.0.0.1:{free_port()}" if target_status else ""  # of the target
        listen["http"] = {"status": self.status}
        self.target = AgentProcess("target", directory, {**common, **listen, "guests": {GUEST: target_guest}})
        for agent, journal in ((self.source, source_journal_dir), (self.target, target_journal_dir)):
            if journal is not None:
                agent.state_dir.mkdir()
                (agent.state_dir / "journal").symlink_to(journal)
            if tls is not None:  # which the proxy does not understand: migrate to the target's own address
                agent.table["tls"] = tls[agent.role]
        self.baseline: dict[str, collections.Counter[str]] = {}
        self._guests: list[asyncio.subprocess.Process] = []

    @property
    def agents(self) -> tuple[AgentProcess, AgentProcess]:
        """Source, target."""
        return self.source, self.target

    # ------------------------------------------------------------ life

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Rig]:
        """Agents and guest, until the end; nothing of them stays."""
        async with self.proxy.listening():
            try:
                await asyncio.gather(self.source.start(), self.target.start())
                await self.start_guest()
                yield self
            finally:
                self.proxy.expect(None)
                await self.end()

    async def end(self) -> None:
        """Whatever state things are in."""
        for agent in self.agents:
            await agent.kill()
        for pid in self.guests():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._guests:
            await process.wait()

    async def start_guest(self) -> int:
        """A new guest at the source; its pid."""
        (self.directory / "incoming").unlink(missing_ok=True)
        with (self.directory / "guest.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(str(self.program), str(self.directory), str(self.size_mib), str(self.rate)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "MIGRATED_SOCKET": str(self.guest_socket)},
                start_new_session=True,
            )
        self._guests.append(process)
        async with within(LIMIT_SECONDS, "the guest to work"):
            while not await self._works(process.pid):
                if process.returncode is not None:
                    raise GuestError((self.directory / "guest.log").read_text(errors="replace")[-500:])
                await asyncio.sleep(0.01)
        return process.pid

    async def _works(self, pid: int) -> bool:
        try:
            return bool((await self.ask(pid, "status")).ready)
        except OSError:
            return False

    async def restart(self, agent: AgentProcess) -> None:
        """Start an agent that is gone again, with the same configuration."""
        agent.process = None
        await agent.start()

    # ------------------------------------------------------------ guests

    def guests(self) -> list[int]:
        """Processes of the guest that live, wherever."""
        pids = [int(path.name[4:]) for path in self.directory.glob("pid.*")]
        for pid in pids:
            if not is_alive(pid):
                (self.directory / f"pid.{pid}").unlink(missing_ok=True)
                (self.directory / f"{pid}.sock").unlink(missing_ok=True)
        return sorted(pid for pid in pids if is_alive(pid))

    async def end_strays(self) -> None:
        """End guests that run beside the one that is ours: somebody else's session brought them."""
        known = self.guest or self.guests()[0]
        async with within(LIMIT_SECONDS, "guests of strangers to end"):
            while len(pids := self.guests()) > 1:
                for pid in pids:
                    if pid != known:
                        await self._end_arrived(pid)
                await asyncio.sleep(0.01)

    async def _end_arrived(self, pid: int) -> None:
        """A guest that nobody will settle any more: one that is loaded waits for its source for ever, and rightly so."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def ask(self, pid: int, command: str) -> Status:
        """One command to one guest process; OSError when it is not there."""
        reader, writer = await asyncio.open_unix_connection(str(self.directory / f"{pid}.sock"))
        try:
            writer.write(command.encode() + b"\n")
            line = await asyncio.wait_for(reader.readline(), 10)
        finally:
            writer.close()
        if not line:
            raise ConnectionError(f"guest {pid} did not answer")
        return Status(**json.loads(line))

    async def sweep(self, pid: int) -> Status:
        """Have the guest check all its memory; it must run for that."""
        wanted = (await self.ask(pid, "sweep")).sweep
        async with within(LIMIT_SECONDS, f"guest {pid} to check its memory"):
            while (status := await self.ask(pid, "status")).swept < wanted:  # noqa: ASYNC110 - it is asked
                await asyncio.sleep(0.005)
            return status

    def misbehave(self, word: str) -> None:
        """What the next incoming guest does."""
        path = self.directory / "incoming"
        if word:
            path.write_text(word)
        else:
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------ migrations

    async def connected(self) -> None:
        """Until the source agent knows the guest that lives."""
        async with within(LIMIT_SECONDS, "the guest to be known to the source agent"):
            while not (guests := self.guests()) or not self._knows(guests[0]):  # noqa: ASYNC110 - so is the log
                await asyncio.sleep(0.01)

    def _knows(self, pid: int) -> bool:
        said = [line for line in self.source.log_path.read_text(errors="replace").splitlines() if "guest conn" in line]
        up = self.source.log_path.read_text(errors="replace").rfind('"agent up"')
        return bool(said) and f'"pid": {pid},' in said[-1] and self.source.log_path.read_text().rfind(said[-1]) > up

    async def begin(self, **options: Any) -> str:
        """Start a migration; its id."""
        await self.connected()
        self.begun_at = asyncio.get_running_loop().time()
        body = {"guest": GUEST, "to": self.proxy.address, **options}
        self.migration = str((await self.source.request("POST", "/v1/migrations", body))["id"])
        return self.migration

    async def over(self, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """Wait until no agent has anything under way; the record of the migration, from the side that remembers it."""
        found: dict[str, Any] = {}
        for agent in self.agents:
            async with within(limit_seconds, f"the {agent.role} to have nothing under way"):
                while True:
                    records = (await agent.request("GET", "/v1/migrations"))["migrations"]
                    busy = [record for record in records if record["state"] not in ENDED]
                    for record in records:
                        if record["id"] == self.migration and record["id"] not in found:
                            found[record["id"]] = record
                    if not busy:
                        break
                    found.clear()
                    await asyncio.sleep(0.01)
        with contextlib.suppress(MigratedError):
            return await self.source.record(self.migration)
        last: dict[str, Any] = found.get(self.migration, {})
        return last

    def check_reconnects(self, *, least: int = 0) -> None:
        """Of this migration so far.  Call it before `Proxy.expect`, which forgets what has passed."""
        seconds = asyncio.get_running_loop().time() - self.begun_at
        times = self.proxy.passed.count((DOWN, "resumed"))
        try:
            check_reconnects(times, seconds=seconds, heartbeat_limit=self.heartbeat_limit, least=least)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    async def migrate(self, **options: Any) -> dict[str, Any]:
        """A whole migration."""
        self.proxy.expect(None)
        await self.begin(**options)
        return await self.over()

    def logs(self, lines: int = 40) -> str:
        """Ends of both logs, one after the other in time, for people."""
        told: list[tuple[str, str]] = []
        for agent in self.agents:
            text = agent.log_path.read_text(errors="replace") if agent.log_path.exists() else ""
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    told.append((told[-1][0] if told else "", f"{agent.role}: {line}"))
                    continue
                when, event = str(entry.pop("timestamp", ""))[11:26], entry.pop("event", "")
                rest = " ".join(f"{k}={v}" for k, v in entry.items() if k not in ("logger", "level", "guest"))
                told.append((when, f"{when} {agent.role}: {event} {rest}"))
        return "\n".join(line for _, line in sorted(told, key=lambda one: one[0])[-lines:])

    # ------------------------------------------------------------ what must be true afterwards

    async def settle_baseline(self) -> None:
        """What the agents hold when nothing is under way."""
        await self.clean()
        await self.connected()
        self.baseline = {agent.role: descriptors(agent.pid) for agent in self.agents}

    def left_behind(self, *, wanted: int = 1) -> Iterator[str]:
        """What should not be there when nothing is under way."""
        guests = self.guests()
        if len(guests) != wanted:
            yield f"{len(guests)} processes of the guest: {guests}"
        for pid in guests:
            for line in tracked(pid):
                yield f"guest {pid}: {line}"
        for agent in self.agents:
            if agent.process is None:
                continue
            for line in guest_mappings(agent.pid):
                yield f"{agent.role}: {line}"
            now = descriptors(agent.pid)
            # A guest that arrived is the target's child: it keeps its pidfd to collect its exit status.
            if (count := now.pop(PIDFD, 0)) > len(guests):
                yield f"{agent.role}: {count} pidfds"
            for pid in zombies(agent.pid):
                yield f"{agent.role}: zombie {pid}"
            if (base := self.baseline.get(agent.role)) is not None and (more := now - base):
                yield f"{agent.role}: descriptors {dict(more)}"
            for path in (agent.state_dir / "journal").glob("*.[jnr]*"):
                yield f"{agent.role}: {path}"
            if (agent.state_dir / "holder.sock").exists():
                yield f"{agent.role}: its holder holds something"
            for path in (agent.state_dir / "guests" / GUEST).glob("*.sock"):
                yield f"{agent.role}: {path}"
        if (self.directory / "twice").exists():
            yield "the guest ran in two places: " + (self.directory / "twice").read_text()

    async def clean(self, *, guests: int = 1) -> None:
        """Wait until nothing but so many guests is left behind; AssertionError with what is."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LIMIT_SECONDS
        while left := list(self.left_behind(wanted=guests)):
            assert loop.time() < deadline, "left behind:\n" + "\n".join(left) + "\n" + self.logs()
            await asyncio.sleep(0.01)

    async def sound(self) -> int:
        """The guest runs, in one place, with every byte it wrote, and nothing is left behind; its pid."""
        await self.clean()
        (pid,) = self.guests()
        status = await self.sweep(pid)
        assert (status.wrong, status.errors, status.twice) == (0, 0, 0), f"{status}\n{self.logs()}"
        return pid


@contextlib.asynccontextmanager
async def rig(program: Path, *, prove: bool = True, **options: Any) -> AsyncIterator[Rig]:
    """A rig with a baseline, in a directory of its own.  ``prove``: a migration has been seen to work."""
    with supervisor.directory("mf-", short_directory()) as directory:
        made = Rig(directory, program, **options)
        async with made.running():
            if prove:
                record = await made.migrate()
                assert record["state"] == "completed", f"{record}\n{made.logs()}"
            await made.settle_baseline()
            yield made
