"""One side of one migration's control connection: which message may go or come now, and what may be done with the guest.

    source = Session(Role.SOURCE)
    transport.write(source.send(Hello(…)))
    for message in source.receive(data):     # the state is the one right after this message
        …                                    # may send in here
"""

from __future__ import annotations

from collections.abc import Iterator

from migrated.protocol.messages import AnyMessage, Hello, Ready
from migrated.protocol.transitions import Role, State


class Session:
    """The state machine of one side, no I/O and no clock."""

    def __init__(
        self, role: Role, *, state: State = State.IDLE, hello: Hello | None = None, ready: Ready | None = None
    ) -> None:
        """A new session; or one taken up again after a crash: ``state`` as journalled, not connected, with its first messages.

        After a crash a source is in UNSETTLED (COMMIT not sent) or PAUSED (sent, or about to be); a target in WAITING
        (Loaded sent or about to be, no COMMIT), PAUSED (COMMIT received), CLOSED (Done), or ABORTED (nothing left of it:
        also what answers for a session the target does not know).
        """

    role: Role
    state: State
    hello: Hello | None  # as sent or received
    ready: Ready | None

    @property
    def connected(self) -> bool:
        """Whether there is a connection: without one nothing can be sent or received."""
        raise NotImplementedError

    @property
    def guest_may_run_here(self) -> bool:
        """Source: COMMIT was never sent.  Target: COMMIT was received.  Never both at once."""
        raise NotImplementedError

    @property
    def abort_allowed(self) -> bool:
        """Whether `send(Abort)` can still end the migration: before COMMIT is sent; on the target, before Loaded is sent."""
        raise NotImplementedError

    @property
    def committed(self) -> bool:
        """Source: COMMIT was sent.  Target: it was received."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Nothing more needs to be said: aborted on both sides, or closed."""
        raise NotImplementedError

    @property
    def must_reconnect(self) -> bool:
        """Not connected, and the two sides have something to settle: the source dials, the target waits."""
        raise NotImplementedError

    def may_send(self, message: AnyMessage) -> bool:
        """Whether `send` would take it."""
        raise NotImplementedError

    def send(self, message: AnyMessage) -> bytes:
        """Make the step and return the frame to write.  LocalProtocolError: not now; the state is unchanged.

        The state has changed when this returns, whether the bytes ever leave or not: Commit counts as sent from here on.
        """
        raise NotImplementedError

    def receive(self, data: bytes) -> Iterator[AnyMessage]:
        """Take bytes of the connection (kept at once); iterate over the messages, each after its step was made.

        Raises RemoteProtocolError (from the iterator) at a malformed or unexpected message, after all earlier ones; that
        message makes no step, and the connection is good for nothing but closing: every later call raises it again.
        """
        raise NotImplementedError

    def connection_lost(self) -> State:
        """The connection has ended, however.  Returns the state that follows.  Idempotent."""
        raise NotImplementedError

    def reconnected(self) -> None:
        """A new connection is there (call `connection_lost` for the old one first): the source now sends Resume.

        LocalProtocolError when still connected, or when the state has nothing to resume.
        """
        raise NotImplementedError
