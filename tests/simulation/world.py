"""A simulated world of three hosts and one guest.  The agents are real; everything around them is a model.

`World` also checks the rules that must hold at every step and at the end of a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import gc
import heapq
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import structlog

from migrated.agent import archive, host_agent
from migrated.agent.migration import Migration
from migrated.agent.record import State, id_of
from migrated.agent.requests import SetRequest, StartRequest
from migrated.config import AgentConfig, SourceConfig, TargetConfig
from migrated.errors import MigratedError
from migrated.guests.access import pidfd
from migrated.link import dialing, listener
from migrated.memory.engine import URGENT, EventKind
from migrated.protocol import messages, preamble, transitions
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role
from migrated.recovery import journal
from migrated.recovery import state as recovery_state
from migrated.settings import Timeouts, read
from migrated.source import agent as source_agent
from migrated.source import migration as source_migration
from migrated.target import agent as target_agent
from migrated.target import memory as target_memory
from migrated.target import migration as target_migration
from tests.simulation import engine, guest, machine, network
from tests.simulation.loop import LIFE, Life, Loop, current
from tests.simulation.schedule import Action, Schedule

GUEST: Final = "vm1"
TIMEOUTS: Final = Timeouts(
    connect=4.0,
    handshake=4.0,
    guest_start=6.0,
    guest_command=3.0,
    guest_pause=3.0,
    guest_state=6.0,
    switchover=5.0,
    abort=4.0,
    release=4.0,
    heartbeat_interval=1.0,
    heartbeat_limit=4.0,
    reconnect_interval=0.5,
    reconnect_interval_limit=4.0,
    shutdown=5.0,
)
#: All faults are healed at the latest this long after the start.
CHAOS_SECONDS: Final = 60.0
#: Everything must have finished this long after the faults are healed.
HEALING_SECONDS: Final = 240.0
MAX_STEPS: Final = 60_000
#: Maximum number of control connections within any `DIAL_SECONDS`.
MAX_DIALS: Final = 12
DIAL_SECONDS: Final = 2.0


class Violation(Exception):  # noqa: N818 - the name of a result, not of an error
    """A rule was broken."""


class SimSourceConfig(SourceConfig):
    """A configuration whose state directory is on a simulated disk."""

    @property
    def state_dir(self) -> Any:
        return machine.SimPath(current().host, "/state")


class SimTargetConfig(TargetConfig):
    """Likewise."""

    state_dir = SimSourceConfig.state_dir


class World:
    """One run.  `run` raises `Violation`."""

    def __init__(self, schedule: Schedule, *, trace: bool = False, timeouts: Timeouts = TIMEOUTS) -> None:
        self.schedule = schedule
        self.random = random.Random(schedule.seed * 7919 + 1)
        self.timeouts = timeouts
        self.lines: list[str] = []
        self.tracing = trace
        self.problem: str | None = None
        self.notes: dict[str, int] = {}
        self.states: set[str] = set()
        self.due: list[tuple[int, int, Action]] = []
        self.fired: list[Action] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.engines: list[Any] = []
        self.engine_endpoints: list[Any] = []
        self.healed = False
        self.healed_at = 0.0
        self.committed = False
        self.given: set[str] = set()  # migrations whose COMMIT was sent
        self.decided: set[str] = set()  # migrations that an operator has decided where the two sides could not
        self.guest_killed = False
        self.abandoned = False
        self.versions = (messages.PROTOCOL_VERSION, journal.VERSION)
        self.release_failed = False  # then the old process stays, and the record says so
        self.write_number = 0
        self._pid = 100
        self._restarts: dict[str, int] = {}
        draw = self.random
        self.pace = draw.choice((0.3, 1.0, 1.0, 3.0))
        self.style = draw.choice(("qemu", "process"))
        self.quiesced = draw.random() < 0.2
        self.early_state = draw.random() < 0.5
        self.loading_touches = draw.random() < 0.3
        self.resuming_touches = draw.random() < 0.3
        self.busy = draw.choice((0, 1, 3, 6))
        self.mode = draw.choice(("hybrid", "hybrid", "hybrid", "precopy", "postcopy"))
        self.max_records = draw.choice((200, 200, 0))
        regions = draw.choice((1, 2, 3))
        self.truth = [[0] * 8 for _ in range(regions)]
        self.loop = Loop(self.thread_seconds)
        self.net = network.Network(self.loop, self.latency)
        self.net.high_water = draw.choice((1 << 16, 1 << 16, 0))
        self.at_once = draw.random() < 0.5  # little memory, and a journal on a tmpfs: no thread is needed for either
        self.loop.sockets = self.net
        self.loop.ended = self.kill_life
        self.loop.speak = _speak
        self.hosts = {name: machine.Host(self, name, role) for name, role in HOSTS.items()}
        self.net.hosts = self.hosts
        self.triggers: dict[tuple[str, int], list[Action]] = {}
        memory = [guest.Memory(index, 8) for index in range(regions)]
        self.original = guest.Process(self, self.hosts["s"], memory, "running")

    # ------------------------------------------------------------ chance

    def latency(self) -> float:
        return self.pace * self.random.choice((0.0002, 0.0002, 0.001, 0.004, 0.02))

    def thread_seconds(self) -> float:
        return self.random.choice((0.0, 0.0, 0.0, 0.0001, 0.002))

    def command_seconds(self) -> float:
        return self.pace * self.random.choice((0.0, 0.001, 0.01, 0.05))

    def round_seconds(self) -> float:
        return self.pace * self.random.choice((0.001, 0.01, 0.03))

    def page_seconds(self) -> float:
        return self.pace * self.random.choice((0.001, 0.005, 0.02))

    def randbytes(self, count: int) -> bytes:
        return self.random.randbytes(count)

    def choose_pages(self, process: Any, count: int) -> list[tuple[int, int]]:
        return [
            (region, self.random.randrange(len(process.memory[region].pages)))
            for region in self.random.choices(range(len(process.memory)), k=count)
        ]

    def new_pid(self) -> tuple[int, int]:
        self._pid += 1
        return self._pid, self._pid * 10

    def new_ledger(self) -> engine.Ledger:
        return engine.Ledger()

    # ------------------------------------------------------------ what happens

    def trace(self, line: str) -> None:
        if self.tracing:
            self.lines.append(f"{self.loop.now:9.4f} {self.loop.steps:6d}  {line}")

    def note(self, name: str) -> None:
        """Count an event that schedules can refer to, and trigger the actions that wait for it."""
        count = self.notes[name] = self.notes.get(name, 0) + 1
        self.trace(name)
        for action in self.triggers.get((name, count), ()):
            if action.steps < 0:
                self.fire(action)
                continue
            if action.after:
                self.loop.call_later(action.after, self._at, action, context=ROOT)
                continue
            heapq.heappush(self.due, (self.loop.steps + action.steps, self.schedule.actions.index(action), action))
            if action.kind == "kill" and name.startswith(f"{action.host} disk") and action.steps == 0:
                current().doomed = True

    def violation(self, text: str) -> None:
        if self.problem is None:
            self.problem = text
            self.trace(f"VIOLATION {text}")

    def check_single(self) -> None:
        running = [process for process in self.processes() if process.state == "running"]
        if len(running) > 1:
            self.violation(f"the guest runs at two places: {running}")

    def processes(self) -> Iterator[Any]:
        for host in self.hosts.values():
            for process in host.processes.values():
                if process.alive:
                    yield process

    def running(self) -> Any:
        return next((process for process in self.processes() if process.state == "running"), None)

    # ------------------------------------------------------------ agents

    def config(self, host: machine.Host) -> AgentConfig:
        source = host.role == "source"
        guest = {"driver": "process", **({"socket": "/guest.sock"} if source else {"command": ["guest"]})}
        table = {
            "agent": {"name": host.name},
            "tls": {"insecure": True, "trusted_network": True},
            "migration": {"mode": self.mode, "max_rounds": 3},
            "timeouts": self.timeouts,
            "limits": {"max_records": self.max_records},
            "guests": {GUEST: guest},
        }
        path = f"{host.role}.toml"
        return read(SimSourceConfig if source else SimTargetConfig, table, path, path=path)

    def boot(self, host: machine.Host) -> None:
        if host.burned or (host.life is not None and host.life.alive):
            return
        life = host.life = Life(host.name, host)
        host.agent = host.stop = None
        self.trace(f"{host.name} starts, with versions {life.versions}")

        async def main() -> None:
            host.agent = (source_agent.SourceAgent if host.role == "source" else target_agent.TargetAgent)(
                self.config(host)
            )
            host.stop = asyncio.Event()
            await host.agent.run(host.stop)

        def over(task: asyncio.Task[None]) -> None:
            if not life.alive:
                return
            if not task.cancelled() and (error := task.exception()) is not None:
                self.trace(f"{host.name} ends with {error!r}")
                if not isinstance(error, MigratedError | OSError):
                    self.violation(f"the agent on {host.name} crashed: {error!r}")
            self.kill_life(life)

        host.task = self.spawn(main(), life)
        host.task.add_done_callback(over, context=ROOT)

    def spawn(self, work: Any, life: Life) -> asyncio.Task[Any]:
        task = self.loop.create_task(work, context=life.context)
        self.tasks.append(task)
        return task

    def kill_life(self, life: Life) -> None:
        """Kill a process between two of its steps."""
        if not life.alive:
            return
        life.alive = False
        self.trace(f"{life.host.name} is gone")
        for known in self.engines:
            if known.life is life:
                known.drop_streams()
                process = getattr(known, "_process", None)
                if process is not None and process.engine is known:
                    process.engine = None
        network.life_ended(self.net, life)
        # The service manager starts the agent again.
        again = self._restarts[life.host.name] = self._restarts.get(life.host.name, 0) + 1
        self.loop.call_later(0.3 if again < 3 else 1.0, self.boot, life.host, context=ROOT)

    def stop(self, host: machine.Host) -> None:
        if host.stop is None or not host.life.alive:
            return
        life = host.life
        life.context.run(host.stop.set)

        def lost_patience() -> None:
            self.kill_life(life)

        self.loop.call_later(4 * self.timeouts.shutdown, lost_patience, context=ROOT)

    def verb(self, host: machine.Host, name: str, *arguments: Any, **named: Any) -> None:
        """Issue an operator command.  The agent may refuse it."""
        agent = host.agent
        if agent is None or not host.life.alive or host.stop is None:
            return
        self.trace(f"operator on {host.name}: {name} {arguments}")
        if name in {"force_run", "discard"}:
            self.decided.add(arguments[0])

        async def ask() -> None:
            try:
                await getattr(agent, name)(*arguments, **named)
            except MigratedError as error:
                self.trace(f"refused: {error}")
            except Exception as error:  # noqa: BLE001 - any other exception is a bug in the agent
                self.violation(f"{name} on {host.name} met {error!r}")

        self.spawn(ask(), host.life)

    def migration_of(self, host: machine.Host) -> Any:
        """Return the newest migration of a host."""
        if host.agent is None:
            return None
        known = list(host.agent._migrations)
        return known[-1] if known else None

    # ------------------------------------------------------------ versions

    def install(self, host: machine.Host, versions: tuple[int, int]) -> None:
        """Upgrade or downgrade a host, and start its agent again."""
        if host.burned or host.versions == versions:
            return
        self.trace(f"{host.name} has versions {versions} from now on")
        host.versions = versions
        if host.life is not None:
            self.kill_life(host.life)

    def _reinstall(self, host: machine.Host) -> None:
        """What an operator does who reads why an agent does not start: only the version that wrote a journal takes it up."""
        protocol, version = self.versions
        for path, data in host.disk.items():
            if "/journal/" in path and (found := re.search(rb'"version":(\d+)', data)):
                version = int(found[1])
        self.install(host, (protocol, version))

    # ------------------------------------------------------------ faults

    def fire(self, action: Action) -> None:
        self.fired.append(action)
        self.trace(f"--- {action}")
        host = self.hosts.get(action.host)
        handler: Callable[[Action, Any], None] = getattr(self, f"_do_{action.kind}")
        handler(action, host)
        self.note("fault")

    def _do_kill(self, action: Action, host: Any) -> None:
        if host.life is not None:
            self.kill_life(host.life)

    def _do_stop(self, action: Action, host: Any) -> None:
        self.stop(host)

    def _do_cut(self, action: Action, host: Any) -> None:
        delays = {
            "both": (self.latency(), self.latency()),
            "client": (0.0, None),
            "server": (None, 0.0),
        }[action.how]
        for connection in self.net.connections:
            if not connection.over() and action.what in {"all", connection.what}:
                connection.cut(delays)

    def _do_flap(self, action: Action, host: Any) -> None:
        """Cut connections repeatedly, each cut soon enough to hit the recovery from the previous one."""
        steps = self.loop.steps
        for number in range(self.random.randint(2, 6)):
            cut = Action("cut", what="all", how=action.how)
            heapq.heappush(self.due, (steps, 1000 + 10 * self.schedule.actions.index(action) + number, cut))
            steps += self.random.choice((3, 10, 20, 30, 40, 60, 100))

    def _do_block(self, action: Action, host: Any) -> None:
        other = self.hosts["s"]
        if action.how != "server":
            self.net.block(other, host, action.seconds)
        if action.how != "client":
            self.net.block(host, other, action.seconds)

    def _do_disk(self, action: Action, host: Any) -> None:
        host.disk_error = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}[action.how]
        host.disk_error_until = self.loop.now + action.seconds

    def _do_descriptors(self, action: Action, host: Any) -> None:
        host.no_descriptors_until = self.loop.now + action.seconds

    def _do_store(self, action: Action, host: Any) -> None:
        host.store_fails_until = self.loop.now + action.seconds

    def _do_command(self, action: Action, host: Any) -> None:
        host.failing_command = action.what
        if action.how == "hang":
            host.commands_hang_until = self.loop.now + action.seconds
        else:
            host.commands_fail_until = self.loop.now + action.seconds

    def _do_engine(self, action: Action, host: Any) -> None:
        for known in self.engines:
            if known.life is host.life and known.alive:
                known.post(EventKind.FAILED, URGENT, 0, MigratedError("a thread of the engine failed", code="native"))

    def _do_die(self, action: Action, host: Any) -> None:
        for process in host.processes.values():
            if process.alive:
                self.guest_killed = True
                process.die()

    def _do_burn(self, action: Action, host: Any) -> None:
        """Lose a host for good.  At most one host is lost in a run."""
        if any(known.burned for known in self.hosts.values()):
            return
        host.burned = True
        if host.life is not None:
            self.kill_life(host.life)
        for process in host.processes.values():
            process.die()

    def _do_version(self, action: Action, host: Any) -> None:
        """Install another version; after a while the one from before, unless a journal keeps that from working."""
        protocol, version = self.versions
        by = 1 if action.how == "newer" else -1
        changed = (protocol + by * (action.what != "journal"), version + by * (action.what != "protocol"))
        self.install(host, changed)
        host.versions_until = self.loop.now + action.seconds
        self.loop.call_later(action.seconds, self._reinstall, host, context=ROOT)

    def _do_verb(self, action: Action, host: Any) -> None:
        match action.what:
            case "start":
                self.verb(host, "start", StartRequest.model_validate({"guest": GUEST, "to": f"{action.how}:7440"}))
            case "resume":
                self.verb(host, "resume", GUEST, f"{action.how}:7440" if action.how else None)
            case "abandon":
                self.abandoned = True
                self.verb(host, "abandon", GUEST, confirm=GUEST)
            case "set":
                self.verb(host, "set", GUEST, SetRequest.model_validate({"max_bandwidth": "1Gbit"}))
            case other:
                self.verb(host, other, GUEST)

    # ------------------------------------------------------------ checks

    def session_step(self, session: Session, way: str, message: Any) -> None:
        life = LIFE.get()
        if life is None:
            return
        word = transitions.event(message)
        if session.role is Role.SOURCE and way == "send" and word == "commit":
            self.committed = True
            assert session.hello is not None
            self.given.add(id_of(session.hello.session))
        self.states.add(f"{session.role} {session.position}")
        self.note(f"{life.host.name} {way} {word}")

    def state_changed(self, migration: Migration, before: State) -> None:
        record = migration.record
        if record.state is before:
            return
        life = current()
        self.trace(
            f"{life.host.name} {record.id} {before} -> {record.state} {record.error.message if record.error else ''}"
        )
        if record.state is State.COMPLETED:
            there = self.running()
            burned = any(host.burned for host in self.hosts.values())
            if not self.guest_killed and not burned and (there is None or there.host.role != "target"):
                self.violation(f"{life.host.name} says completed, and the guest runs {there}")
        if record.error is None or record.role != "source":
            return
        if record.error.code != "version-mismatch" and "protocol version" in record.error.message:
            self.violation(f"a peer of another version is called {record.error.code}: {record.error.hint!r}")
        if record.state in {State.ABORTED, State.FAILED} and "runs on here" in record.error.hint:
            there = self.running()
            if not self.guest_killed and (there is None or there.host is not life.host):
                self.violation(f"the record says {record.error.hint!r}, and the guest runs {there}")
        if record.state is State.FAILED and record.error.code == "target-lost-guest" and not self.guest_killed:
            there = [process for process in self.processes() if process.host.role == "target"]
            if there:
                self.violation(f"{record.error.message!r} was said, and the guest is there: {there}")

    def check_dials(self) -> None:
        dials = [when for when, sender, _ in self.net.dials[-200:] if sender == "s"]
        streams = 3  # a control connection brings its page connections
        for index in range(len(dials) - MAX_DIALS * streams):
            if dials[index + MAX_DIALS * streams] - dials[index] < DIAL_SECONDS:
                self.violation(f"more than {MAX_DIALS} reconnects within {DIAL_SECONDS:g} s")
                return

    def check_end(self) -> None:
        """Check the final state, after all faults are healed and all migrations have finished."""
        where = self.running()
        burned = any(host.burned for host in self.hosts.values()) and not list(self.processes())
        if where is None and not self.guest_killed and not burned:
            self.violation(f"the guest runs nowhere: {list(self.processes())}; {self.records()}")
        if where is not None and not self.committed and where.host.name != "s":
            self.violation(f"COMMIT was never sent, and the guest runs at {where}")
        for process in self.processes():
            if process is not where and not (process is self.original and self.release_failed):
                self.violation(f"a process is left behind: {process}; {self.records()}")
        if where is not None:
            if where.tracked:
                self.violation(f"{where} is still tracked")
            if where.registered or (where.holds_uffd and not self.release_failed):
                self.violation(f"{where} still waits for an agent")
            if where.registered is False and not self.abandoned:
                pages = [memory.pages for memory in where.memory]
                if pages != self.truth:
                    self.violation(f"memory differs: {pages} is not {self.truth}")
        for host in self.hosts.values():
            if host.burned:
                continue
            left = [path for path in host.disk if "/journal/" in path and not path.endswith(".done")]
            if left:
                self.violation(f"{host.name} keeps {left}")
            if host.kept:
                self.violation(f"descriptors are kept on {host.name}: {sorted(host.kept)}")
            open_files = [thing for thing in host.life.fds.values() if not getattr(thing, "backlog", None) is not None]
            if open_files:
                self.violation(f"the agent on {host.name} has open: {open_files}")

    def records(self) -> list[str]:
        found = []
        for host in self.hosts.values():
            if host.agent is not None and not host.burned:
                found += [
                    f"{host.name}: {record.id} {record.state}" + (f" {record.error.code}" if record.error else "")
                    for record in host.agent.records()
                ]
        return found

    # ------------------------------------------------------------ the operator

    def quiet(self) -> bool:
        """Return whether no migration is active on any host."""
        for host in self.hosts.values():
            if host.burned:
                continue
            if host.life is None or not host.life.alive or host.agent is None or host.stop is None:
                return False
            if host.stop.is_set() or host.agent._tasks or host.agent._migrations.active:
                return False
            if host.role == "target" and host.agent._listener.connections:
                return False
        return True

    def operate(self) -> None:
        """Act like an operator who reads the records and follows their hints."""
        source = self.hosts["s"]
        if source.agent is not None and source.life.alive:
            for migration in list(source.agent._migrations):
                if not migration.over:
                    self._mend_address(source, migration)
                elif migration.record.error is not None and migration.record.error.code == "target-lost-guest":
                    self._decide(source, migration)
        for host in self.hosts.values():
            migration = self.migration_of(host)
            if host.role == "target" and source.burned and migration is not None and not migration.record.ended:
                if migration.session.bound:
                    self.committed = True  # by the operator
                    self.verb(host, "force_run", migration.id, confirm=GUEST)
                elif migration.session.committed:
                    self.abandoned = True
                    self.verb(host, "abandon", migration.id, confirm=GUEST)
        for host in self.hosts.values():
            for migration in list(host.agent._migrations) if host.agent is not None else ():
                if migration.record.error is None or not migration.record.ended:
                    continue
                hint = migration.record.error.hint
                told = f"start the {host.role} agent again" in hint or "start the source agent anew" in hint
                if told and self._once(f"restart {migration.id} {self._restarts.get(host.name, 0)}"):
                    self.stop(host)
                    break
        if self.loop.now - self.healed_at > 60.0:
            self._decide_on_targets()
        waiting = [host for host in self.hosts.values() if host.role == "target" and host.agent is not None]
        for host in waiting:
            if host.agent._waiting_for_next and self._once(f"restart {host.name} {host.life!r}"):
                self.stop(host)

    def _decide_on_targets(self) -> None:
        """Discard a guest that waits on a target for a source that has forgotten it."""
        for host in self.hosts.values():
            for migration in list(host.agent._migrations) if host.role == "target" and host.agent is not None else ():
                if not migration.record.ended and migration.session.bound and self.running() is not None:
                    self.verb(host, "discard", migration.id, confirm=GUEST)

    def _mend_address(self, source: Any, migration: Any) -> None:
        if migration.record.ended and not migration.over:
            forced = migration.record.error is not None and migration.record.error.code == "forced"
            if forced or any(
                host.burned and migration.record.peer.startswith(f"{host.name}:") for host in self.hosts.values()
            ):
                self.verb(source, "discard", migration.id, confirm=GUEST)
        if migration.record.state is not State.POSTCOPY_PAUSED:
            return
        there = [process.host.name for process in self.processes() if process.host.role == "target"]
        done = [
            host.name
            for host in self.hosts.values()
            if host.role == "target"
            and not host.burned
            and host.agent is not None
            and any(r.id == migration.id and r.state is State.COMPLETED for r in host.agent.records())
        ]
        right = (there or done or [""])[0]
        refused = migration.record.error is not None and migration.record.error.code == "target-refuses"
        if right and not migration.record.peer.startswith(f"{right}:"):
            self.verb(source, "resume", migration.id, f"{right}:7440")
        elif not right and (refused or any(host.burned for host in self.hosts.values())):
            self._decide(source, migration)

    def _decide(self, source: Any, migration: Any) -> None:
        """Decide about a guest that no other host has any more."""
        if self.original.alive and self.running() is None:
            self.guest_killed = False  # it is revived
            self.verb(source, "force_run", migration.id, confirm=GUEST)
        else:
            self.verb(source, "discard", migration.id, confirm=GUEST)

    def _once(self, what: str) -> bool:
        if what in self.notes:
            return False
        self.notes[what] = 1
        return True

    def heal(self) -> None:
        self.healed, self.healed_at = True, self.loop.now
        self.trace("=== all faults are healed")
        self.net.heal()
        for host in self.hosts.values():
            host.heal()
            self._reinstall(host)
            self.boot(host)

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        gc.disable()
        with seams(self):
            asyncio._set_running_loop(self.loop)
            try:
                self._run()
            finally:
                self._dispose()
                asyncio._set_running_loop(None)
                gc.enable()
                sys.unraisablehook = hook
        if self.problem is not None:
            raise Violation(self.problem)

    def _run(self) -> None:
        for host in self.hosts.values():
            self.boot(host)
        for action in self.schedule.actions:
            if action.note:
                self.triggers.setdefault((action.note, action.count), []).append(action)
            else:
                self.loop.call_at(action.at, self._at, action, context=ROOT)
        self.loop.call_at(0.1, self.begin, context=ROOT)
        self._chaos()
        if self.problem is None:
            self.heal()
            self._recover()
        if self.problem is None:
            self._restart_everything()
        if self.problem is None:
            self.check_end()

    def _restart_everything(self) -> None:
        """Restart every agent, which removes what could not be removed while a disk failed."""
        self.trace("=== every agent is stopped and started once more")
        for host in self.hosts.values():
            self.stop(host)
        self.healed_at = self.loop.now
        self._recover()

    def begin(self) -> None:
        self.verb(self.hosts["s"], "start", StartRequest.model_validate({"guest": GUEST, "to": "t1:7440"}))

    def _at(self, action: Action) -> None:
        heapq.heappush(self.due, (self.loop.steps, self.schedule.actions.index(action), action))

    def _step(self) -> bool:
        alive = self.loop.step()
        while self.due and self.due[0][0] <= self.loop.steps and not self.healed:
            self.fire(heapq.heappop(self.due)[2])
        if self.loop.steps > MAX_STEPS:
            self.violation(f"{MAX_STEPS} steps were not enough; {self.records()}")
        return alive and self.problem is None

    def _chaos(self) -> None:
        timed = max((action.at for action in self.schedule.actions if not action.note), default=0.0)
        looked = 0.0
        while self._step():
            if self.loop.now > CHAOS_SECONDS:
                return
            if self.loop.now > looked + 1.0:
                looked = self.loop.now
                self.check_dials()
                if looked > 1.0 and looked > timed and not self.due and self.quiet():
                    return
            if len(self.fired) == len(self.schedule.actions) and not self._failing():
                return

    def _failing(self) -> bool:
        """Return whether a lasting fault is still active."""
        now = self.loop.now
        return any(count for count in self.net.blocked.values()) or any(
            now < until
            for host in self.hosts.values()
            for until in (
                host.disk_error_until,
                host.no_descriptors_until,
                host.store_fails_until,
                host.commands_fail_until,
                host.commands_hang_until,
                host.versions_until,
            )
        )

    def _recover(self) -> None:
        looked = self.loop.now
        calm = 0
        while self._step():
            if self.loop.now - looked > 1.0:
                looked = self.loop.now
                self.check_dials()
                self.operate()
                calm = calm + 1 if self.quiet() else 0
                if calm > 2:
                    return
            if self.loop.now - self.healed_at > HEALING_SECONDS:
                self.violation(f"not over {HEALING_SECONDS:g} s after the last fault: {self.records()}")

    def _dispose(self) -> None:
        """Free everything, and avoid executing the code under test while doing so."""
        everything = asyncio.all_tasks(self.loop)
        for host in self.hosts.values():
            if host.life is not None:
                host.life.alive = False
                host.life.fds.clear()
        kept, self.problem, self.tracing = self.problem, "", False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in everything:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                for _ in range(8):  # a coroutine that awaits in a ``finally`` must be closed again
                    with contextlib.suppress(BaseException):
                        cast("Any", task.get_coro()).close()
                        break
            everything.clear()
            self.tasks.clear()
            self.engines.clear()
            self.net.connections.clear()
            self.net.listeners.clear()
            self.loop._ready.clear()
            self.loop._scheduled.clear()
            self.loop.close()
            for host in self.hosts.values():
                host.agent = host.task = host.stop = None
            gc.collect()  # nothing of this world may be finalized in the next one
        self.problem = kept


def _speak(versions: tuple[int, int]) -> None:
    """From now on an agent of these versions executes: of the protocol, and of the journal."""
    for name, module in list(sys.modules.items()):
        if name.startswith("migrated.") and hasattr(module, "PROTOCOL_VERSION"):
            cast("Any", module).PROTOCOL_VERSION = versions[0]
    preamble.Preamble.__init__.__defaults__ = (0, versions[0])
    journal.VERSION = versions[1]


HOSTS: Final = {"s": "source", "t1": "target", "t2": "target"}
ROOT: Final = contextvars.copy_context()


def _process_started(pid: int) -> int:
    process = current().host.processes.get(pid)
    return process.started if process is not None and process.alive else 0


class _BootId:
    @staticmethod
    def read_text() -> str:
        return "boot"


def _reserve(size_bytes: int, page_bytes: int | None, *, name: str, reserved: bool) -> tuple[int, int]:
    del page_bytes, reserved
    return current().open(
        guest.Memory(int(name.removeprefix("region")), size_bytes // guest.PAGE_BYTES)
    ), guest.PAGE_BYTES


class _Memfd:
    BASE_PAGE_BYTES = guest.PAGE_BYTES
    reserve = staticmethod(_reserve)


@contextlib.contextmanager
def seams(world: World) -> Iterator[None]:
    """Replace the real parts with the simulated ones."""
    sockets = network.SocketModule(world.net)
    follow, set_state = Session._follow, Migration.set_state

    def followed(session: Session, way: str, message: Any, after: Any) -> None:
        follow(session, way, message, after)
        world.session_step(session, way, message)

    def stated(migration: Migration, state: State, error: BaseException | None = None) -> None:
        before = migration.record.state
        set_state(migration, state, error)
        world.state_changed(migration, before)

    places: list[tuple[Any, str, Any]] = [
        (time, "time", lambda: 1e9 + world.loop.now),
        (time, "monotonic", world.loop.time),
        (time, "monotonic_ns", lambda: int(world.loop.now * 1e9)),
        (Session, "_follow", followed),
        (Migration, "set_state", stated),
        (host_agent, "store_for", lambda state_dir: machine.SimStore(current().host)),
        (host_agent, "GuestRegistry", guest.SimGuestRegistry),
        (host_agent, "Histories", lambda _state_dir: None),  # files for display only
        (journal, "BOOT_ID", _BootId),
        (journal, "_on_tmpfs", lambda _directory: world.at_once),
        (pidfd, "process_started", _process_started),
        (source_migration, "process_started", _process_started),
        (target_migration, "process_started", _process_started),
        (source_migration, "SourceEngine", engine.SimSourceEngine),
        (source_migration, "Tracker", engine.Tracker),
        (target_migration, "TargetEngine", engine.SimTargetEngine),
        (target_memory, "ledger_bytes", lambda pieces: 1),
        (target_memory, "memfd", _Memfd),
        (target_agent, "PidHandle", guest.SimPidHandle),
        (target_agent, "users_of", guest.users_of),
        (dialing, "socket", sockets),
        (listener, "socket", sockets),
    ]
    places += [
        (module, "os", machine.OS)
        for module in (
            archive,
            journal,
            recovery_state,
            source_agent,
            source_migration,
            target_agent,
            target_memory,
            target_migration,
        )
        if hasattr(module, "os")
    ]
    former = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    config = structlog.get_config()
    structlog.configure(
        processors=[_logged(world)] if world.tracing else [_dropped],
        wrapper_class=cast("Any", structlog.BoundLogger if world.tracing else _Silent),
        cache_logger_on_first_use=False,
    )
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        _speak(world.versions)
        for owner, name, value in former:
            setattr(owner, name, value)
        structlog.configure(**config)


def _dropped(logger: Any, name: str, event: Any) -> Any:
    raise structlog.DropEvent


def _logged(world: World) -> Callable[..., Any]:
    def take(logger: Any, name: str, event: Any) -> Any:
        life = LIFE.get()
        if event.get("event") != "state":
            error = event.pop("exc_info", None)
            world.trace(
                f"{life.name if life else '-'} {name}: {event} {error!r}"
                if error
                else f"{life.name if life else '-'} {name}: {event}"
            )
        raise structlog.DropEvent

    return take


class _Silent:
    """A logger that discards everything."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def bind(self, **_: Any) -> _Silent:
        return self

    def _said(self, *_: Any, **__: Any) -> None: ...

    debug = info = warning = error = exception = critical = _said
