"""One side of a migration's control connection, as a state machine.

It decides which messages may be sent or received now, and what this side may do with the guest.

    source = Session(Role.SOURCE)
    transport.write(source.send(Hello(…)))
    for message in source.receive(data):     # the state is the one after this message
        …                                    # may send in here

The steps are in transitions.py, the reasons in docs/commit.md.  A Ping is yielded like any other message: answer it
with a Pong if `may_send` allows it.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.protocol import bounds, framing, transitions
from migrated.protocol.messages import AnyMessage, Hello, Ready, Resume, StateChunk, StateEnd
from migrated.protocol.transitions import Position, Role, State

_BUG = "this is a bug: please report it"


class Session:
    """The state machine of one side on one connection; no I/O, no clock.  Its `position` outlives it, see `resumed`.

    ``hello`` and ``ready`` are the messages as sent or received, or None before that.
    """

    def __init__(
        self, role: Role, *, state: State = State.IDLE, hello: Hello | None = None, ready: Ready | None = None
    ) -> None:
        """Create a new session, or one whose connection is lost, with its first messages and the state after the loss.

        On the source that state is UNSETTLED (COMMIT not sent) or PAUSED (sent, or about to be).  On the target it is
        WAITING (Loaded sent or about to be, no COMMIT), PAUSED (COMMIT received), CLOSED (Done), or ABORTED (nothing is
        left; this also answers for a session that the target does not know).  On either side the session may be
        finished, CLOSED or ABORTED.  Any other state raises ValueError.
        """
        self.role = role
        self.hello = hello
        self.ready = ready
        self.position = Position(state)
        self._connected = state is State.IDLE
        if not self._connected and not self.position.settled and state not in transitions.RESUMABLE[role]:
            msg = f"a {role} session cannot be taken up in state {state}"
            raise ValueError(msg)
        self._geometry = bounds.Geometry.of(hello, ready) if hello and ready else None
        self._decoder = framing.FrameDecoder()
        self._failure: RemoteProtocolError | None = None
        # The guest-state streams end with their connection.
        self._ended_ways: set[str] = set() if self._connected else {"send", "recv"}

    @classmethod
    def taken_up(cls, role: Role, position: Position, hello: Hello, page_bytes: tuple[int, ...]) -> Session:
        """Restore the session of a migration whose agent died, not connected, at the position from the journal."""
        return cls(role, state=position.state, hello=hello, ready=Ready(page_bytes) if page_bytes else None)

    @property
    def state(self) -> State:
        """The state of the current position."""
        return self.position.state

    @property
    def connected(self) -> bool:
        """Whether there is a connection.  Without one nothing can be sent or received."""
        return self._connected

    @property
    def committed(self) -> bool:
        """Source: COMMIT was sent.  Target: COMMIT was received."""
        return self.position.committed

    @property
    def bound(self) -> bool:
        """Target: Loaded was sent, and the source has not yet said whether it committed."""
        return self.role is Role.TARGET and self.position.bound

    @property
    def standing(self) -> str:
        """The target's standing, as in Resumed, while the session is being resumed; else empty."""
        words = transitions.STANDING[self.role].items()
        return next((word for word, state in words if state is self.position.standing), "")

    @property
    def guest_may_run_here(self) -> bool:
        """Source: COMMIT was never sent.  Target: COMMIT was received.  Never true on both sides at once."""
        return self.committed is (self.role is Role.TARGET)

    @property
    def abort_allowed(self) -> bool:
        """Whether this side can still abort the migration: the source before COMMIT, the target before Loaded.

        It does so by `send(Abort)`, which needs a connection.  A source without a connection has already aborted.
        """
        if not self._connected or self.committed:
            return False
        # In the resuming and refusing states the target's Abort only refuses a reconnect: it ends nothing.
        after = transitions.following(self.role, self.position, "send", "abort")
        return after is not None and after.state in {State.ABORTING, State.WITHDRAWING}

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to say: aborted on both sides, or closed."""
        return self.position.settled

    @property
    def must_reconnect(self) -> bool:
        """Whether the lost connection must be replaced to settle the session: the source dials, the target waits."""
        return not self._connected and not self.settled

    def may_send(self, message: AnyMessage) -> bool:
        """Whether `send` would accept the message in the current state."""
        return self._step("send", message) is not None

    def send(self, message: AnyMessage) -> bytes:
        """Make the step and return the frame to write.  LocalProtocolError if not allowed now: the state is unchanged.

        When this returns, the state has changed, whether the bytes ever leave or not: Commit counts as sent from here
        on.  A journal that is to survive a crash must be written in between: after this returns and before the bytes
        leave.
        """
        after = self._step("send", message)
        if after is None:
            raise LocalProtocolError(self._complaint("send", message), hint=_BUG)
        try:
            self._check(message)
        except ValueError as error:
            raise LocalProtocolError(f"{type(message).__name__}: {error}", hint=_BUG) from error
        frame = framing.encode(message)
        self._follow("send", message, after)
        return frame

    def receive(self, data: bytes) -> Iterator[AnyMessage]:
        """Buffer the connection's bytes at once; return an iterator that yields each message after making its step.

        The iterator raises RemoteProtocolError at a malformed or unexpected message, after all earlier ones.  That
        message makes no step, and the connection must be closed: every later call raises the error again.  Messages
        overtaken by an abort are dropped, not yielded.  When the connection is lost, the iterator ends.
        """
        if not self._connected:
            raise LocalProtocolError(f"bytes received in state {self.state}, without a connection", hint=_BUG)
        return self._arrivals(self._decoder.feed(data))

    def _arrivals(self, messages: Iterator[AnyMessage]) -> Iterator[AnyMessage]:
        while self._connected:
            if self._failure is not None:
                raise self._failure
            message = next(messages, None)
            if message is None:
                return
            if self._arrive(message):
                yield message

    def _arrive(self, message: AnyMessage) -> bool:
        """Make the step of a received message; return False if it was overtaken by an abort and is dropped."""
        after = self._step("recv", message)
        if after is None:
            absorbed = transitions.ABSORBED[self.role].get(self.state, frozenset())
            if transitions.event(message) in absorbed:
                return False
            self._failure = RemoteProtocolError(self._complaint("recv", message), code="unexpected-message")
            raise self._failure
        try:
            self._check(message)
        except ValueError as error:
            self._failure = RemoteProtocolError(f"{type(message).__name__}: {error}", code="malformed")
            raise self._failure from error
        self._follow("recv", message, after)
        return True

    def connection_lost(self) -> State:
        """Report that the connection has ended, for whatever reason; return the state that follows.  Idempotent.

        Pass every byte that arrived to `receive` first: a Commit may be in the last ones.
        """
        if self._connected:
            self._connected = False
            self.position = transitions.lost(self.role, self.position)
            self._ended_ways = {"send", "recv"}
        return self.state

    def resumed(self) -> Session:
        """Return this session for the connection that replaces the lost one: the source now sends Resume.

        Raises LocalProtocolError if still connected, or if the state has nothing to resume.
        """
        if self._connected or self.state not in transitions.RESUMABLE[self.role]:
            what = "connected" if self._connected else "over"
            raise LocalProtocolError(f"resumed in state {self.state}: the session is {what}", hint=_BUG)
        following = Session(self.role, state=self.state, hello=self.hello, ready=self.ready)
        following._connected = True
        return following

    def commit_by_hand(self) -> None:
        """Target: commit on the operator's word, since the source is gone: as if COMMIT had arrived before the loss."""
        if self._connected or self.state is not State.WAITING:
            raise LocalProtocolError(f"decided by hand in state {self.state}", hint=_BUG)
        self.position = Position(State.PAUSED)

    def _step(self, way: str, message: AnyMessage) -> Position | None:
        if not self._connected or (isinstance(message, StateChunk | StateEnd) and way in self._ended_ways):
            return None
        return transitions.following(self.role, self.position, way, transitions.event(message))

    def _complaint(self, way: str, message: AnyMessage) -> str:
        word = transitions.event(message)
        if not self._connected:
            return f"cannot send {word} in state {self.state}: not connected"
        if transitions.following(self.role, self.position, way, word) is not None:
            return f"{word} after state-end, or after the connection that carried the guest's state"
        allowed = ", ".join(transitions.expected(self.role, self.position, way)) or "nothing"
        if way == "send":
            return f"cannot send {word} in state {self.state}: allowed are {allowed}"
        return f"the peer sent {word} in state {self.state}: expected {allowed}"

    def _check(self, message: AnyMessage) -> None:
        """Check what only the session knows: its identity, and page numbers against its regions.  Raises ValueError."""
        match message:
            case Ready() if self.hello is not None:
                bounds.Geometry.of(self.hello, message)
            case Resume() if self.hello is not None:
                same = hmac.compare_digest(message.session + message.token, self.hello.session + self.hello.token)
                if not same:
                    msg = "session or token are not those of this migration"
                    raise ValueError(msg)
            case _ if self._geometry is not None:
                self._geometry.check(message)
            case _:
                pass

    def _follow(self, way: str, message: AnyMessage, after: Position) -> None:
        match message:
            case Hello():
                self.hello = message
            case Ready() if self.hello is not None:
                self.ready = message
                self._geometry = bounds.Geometry.of(self.hello, message)
            case StateEnd():
                self._ended_ways.add(way)
            case _:
                pass
        self.position = after
