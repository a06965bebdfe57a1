"""Messages that fit together, and two sessions wired without a socket."""

from __future__ import annotations

import dataclasses

from migrated.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    AnyMessage,
    AskedGuest,
    BarrierAck,
    Capacity,
    Commit,
    Done,
    Hello,
    Inquire,
    Lacking,
    LackingEnd,
    Loaded,
    PagePool,
    Ping,
    Pong,
    Populated,
    Ready,
    Refusal,
    RegionInfo,
    Released,
    Resume,
    Resumed,
    Round,
    Running,
    StaleMap,
    StaleMapEnd,
    StateChunk,
    StateEnd,
    Switchover,
    Verdict,
)
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role, State

SESSION = bytes(range(16))
TOKEN = bytes(range(32))
HELLO = Hello(
    version=PROTOCOL_VERSION,
    session=SESSION,
    token=TOKEN,
    guest="vm1",
    driver="qemu",
    mode="hybrid",
    streams=2,
    block_secret=bytes(4104),
    regions=(RegionInfo("ram0", 64 << 20, 4096), RegionInfo("ram1", 6 << 20, 2 << 20)),
    agent="migrated 0.1.0",
)
READY = Ready(page_bytes=(2 << 20, 2 << 20))
ABORT = Abort(code="aborted", message="somebody asked for it")
RESUME_COMMITTED = Resume(PROTOCOL_VERSION, SESSION, TOKEN, committed=True)
RESUME_ABORTED = Resume(PROTOCOL_VERSION, SESSION, TOKEN, committed=False)

INQUIRE = Inquire(PROTOCOL_VERSION, SESSION, TOKEN, (AskedGuest("vm1", "qemu"), AskedGuest("vm2", "libvirt")))
CAPACITY = Capacity(
    agent="migrated 0.1.0",
    memory_bytes=8 << 30,
    pools=(PagePool(2 << 20, 1024), PagePool(1 << 30, 0)),
    migrations=1,
    max_migrations=8,
    guests=(Verdict(2 << 20), Verdict(refusal=Refusal("unknown-guest", "no guest 'vm2' is configured"))),
)

#: One of each word of the tables.
VOCABULARY: tuple[AnyMessage, ...] = (
    HELLO,
    READY,
    Populated(0, 0, b"\xff"),
    Round(1, 4096),
    BarrierAck(1),
    Switchover(3),
    StaleMap(1, 0, b"\x07"),
    StaleMapEnd(),
    StateChunk(b"device state"),
    StateEnd(),
    Loaded(),
    Commit(),
    Running(),
    Done(),
    Released(),
    ABORT,
    Aborted(),
    Ping(1),
    Pong(1),
    RESUME_COMMITTED,
    RESUME_ABORTED,
    Resumed("loaded", 3),
    Resumed("running", 3),
    Resumed("done", 0),
    Lacking(0, 8, b"\x01"),
    LackingEnd(),
    INQUIRE,
    CAPACITY,
)

#: A whole migration without trouble: who says what.
STRAIGHT: tuple[tuple[Role, AnyMessage], ...] = (
    (Role.SOURCE, HELLO),
    (Role.TARGET, READY),
    (Role.SOURCE, Populated(0, 0, b"\xff")),
    (Role.SOURCE, Round(1, 4096)),
    (Role.TARGET, BarrierAck(1)),
    (Role.SOURCE, StateChunk(b"early")),
    (Role.TARGET, StateChunk(b"return path")),
    (Role.SOURCE, Switchover(3)),
    (Role.TARGET, BarrierAck(2)),
    (Role.SOURCE, StaleMap(1, 0, b"\x07")),
    (Role.SOURCE, StaleMapEnd()),
    (Role.SOURCE, StateChunk(b"late")),
    (Role.SOURCE, StateEnd()),
    (Role.TARGET, StateEnd()),
    (Role.TARGET, Loaded()),
    (Role.SOURCE, Commit()),
    (Role.TARGET, Running()),
    (Role.SOURCE, Ping(7)),
    (Role.TARGET, Pong(7)),
    (Role.TARGET, Done()),
    (Role.SOURCE, Released()),
)

#: What a side that wants to get to the end says next, by state.
NEXT_WORD: dict[Role, dict[State, AnyMessage]] = {
    Role.SOURCE: {
        State.IDLE: HELLO,
        State.PRECOPY: Switchover(3),
        State.SWITCHOVER: StaleMapEnd(),
        State.LOADED: Commit(),
        State.RECOMMITTING: Commit(),
        State.DONE: Released(),
        State.UNSETTLED: RESUME_ABORTED,
        State.SETTLING: ABORT,
        State.PAUSED: RESUME_COMMITTED,
    },
    Role.TARGET: {
        State.HELLO: READY,
        State.MAPPED: Loaded(),
        State.COMMITTED: Running(),
        State.POSTCOPY: Done(),
        State.ABORTING: Aborted(),
        State.LISTING: LackingEnd(),
    },
}


def next_word(session: Session) -> AnyMessage | None:
    """What it says next on its way to the end, if it is its turn."""
    if session.role is Role.TARGET and session.state is State.RESUMING:
        return Resumed(session.standing, 0 if session.standing == "done" else 3)
    return NEXT_WORD[session.role].get(session.state)


def other(role: Role) -> Role:
    return Role.TARGET if role is Role.SOURCE else Role.SOURCE


@dataclasses.dataclass
class Pair:
    """Both sides and the frames on their way from each, in order."""

    sides: dict[Role, Session] = dataclasses.field(default_factory=lambda: {role: Session(role) for role in Role})
    under_way: dict[Role, list[bytes]] = dataclasses.field(default_factory=lambda: {role: [] for role in Role})

    @property
    def source(self) -> Session:
        return self.sides[Role.SOURCE]

    @property
    def target(self) -> Session:
        return self.sides[Role.TARGET]

    @property
    def states(self) -> tuple[State, State]:
        return self.source.state, self.target.state

    def check(self) -> None:
        """Invariant 2."""
        assert not (self.source.guest_may_run_here and self.target.guest_may_run_here), self.states

    def say(self, role: Role, message: AnyMessage) -> None:
        self.under_way[role].append(self.sides[role].send(message))
        self.check()

    def deliver(self, sender: Role) -> list[AnyMessage]:
        """Everything under way from that side arrives."""
        data = b"".join(self.under_way[sender])
        self.under_way[sender].clear()
        arrived = list(self.sides[other(sender)].receive(data))
        self.check()
        return arrived

    def tell(self, role: Role, message: AnyMessage) -> list[AnyMessage]:
        """Say it, and it arrives at once; what the other side was given."""
        self.say(role, message)
        return self.deliver(role)

    def advance(self, state: State) -> Pair:
        """Go straight on until both sides are in that state."""
        for role, message in STRAIGHT:
            if self.states == (state, state):
                return self
            self.tell(role, message)
        assert self.states == (state, state)
        return self

    def cut(self) -> tuple[State, State]:
        """Lose the connection, and what is under way."""
        for role in Role:
            self.sides[role].connection_lost()
            self.under_way[role].clear()
        self.check()
        return self.states

    def reconnect(self) -> None:
        for role in Role:
            self.sides[role] = self.sides[role].resumed()

    def settle(self) -> None:
        """Over good links, two sides that want to get to the end do: aborted on both, or closed on both."""
        for _ in range(40):
            if self.source.state is State.REFUSED or self.source.settled or self.target.settled:
                self.cut()
            if self.source.settled and self.target.settled:
                break
            if not self.source.connected:
                self.cut()
                self.reconnect()
            for role in Role:
                message = next_word(self.sides[role])
                if message is not None and self.sides[role].connected:
                    self.say(role, message)
                if self.sides[other(role)].connected:
                    self.deliver(role)
        assert self.states in {(State.ABORTED, State.ABORTED), (State.CLOSED, State.CLOSED)}
        # And the guest runs in exactly one place.
        assert self.source.guest_may_run_here is not self.target.guest_may_run_here
