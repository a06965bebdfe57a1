"""The protocol's transition tables: which message may follow which, on both sides.

One control connection carries one migration.  Each side is always in exactly one `State`.  Every message sent or
received makes one step; a message for which the table has no step is an error and leaves the state unchanged.
docs/commit.md explains why these tables keep a guest from running twice.  Its diagrams are drawn from them
(docs/site/diagrams.py).

How to read them
    A table maps a `Position` to its steps: ``"send hello"`` or ``"recv ready"`` to the position that follows.  The
    words are those of `event`: the message's tag, or for Resume and Resumed what they say (``resume-committed``,
    ``resumed-running``).  `CONVERSATION` adds messages that never change the position to many states at once.

    The rules behind the tables
        1. The source decides.  Until it sends Commit it may abort and may run the guest; from then on it may do
           neither, ever.
        2. Loaded is a promise.  A target that has sent it may not give up by itself, since Commit may be in flight, not
           even when the connection is lost: it waits for Commit, or for the source to say that there will be none.  If
           its guest dies meanwhile, it drops the connection and answers the source's Resume(committed=True) with Abort.
        3. A message overtaken by an abort is harmless.  Both sides may send until they have read the other's Abort, so
           those states accept what may have been in flight (`ABSORBED`) and drop it.  After Commit there is no Abort.
        4. A lost connection is also a step (`lost`).  What follows depends only on what this side sent, never on what
           the peer may have received.
        5. A new connection begins with Resume, in which the source says on which side of Commit it is.

What is ugly
    The source has two states for an abort.  In ``aborting`` the target cannot have sent Loaded, and cleans up even if
    it never hears from us again.  In ``withdrawing`` it may have sent Loaded, and must be told.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from migrated.protocol.messages import AnyMessage, Resume, Resumed


class Role(enum.StrEnum):
    """Which side a session is."""

    SOURCE = "source"
    TARGET = "target"


class State(enum.StrEnum):
    """The state of a session; the same word on both sides means the same point of the conversation."""

    IDLE = "idle"  # nothing sent yet
    ASKING = "asking"  # Inquire sent/received: about the target's host, without a guest
    HELLO = "hello"  # Hello sent/received
    PRECOPY = "precopy"  # Ready received/sent
    SWITCHOVER = "switchover"  # the guest is paused; the stale map is in transfer
    MAPPED = "mapped"  # the stale map is complete
    LOADED = "loaded"  # Loaded received/sent: only the source decides now
    COMMITTED = "committed"  # Commit sent/received
    POSTCOPY = "postcopy"  # Running received/sent
    DONE = "done"  # Done received/sent
    CLOSED = "closed"  # final: Released sent/received, or the connection lost after Done
    ABORTING = "aborting"  # either side sent Abort; the target cleans up
    WITHDRAWING = "withdrawing"  # source: sent Abort to a target that may have sent Loaded
    ABORTED = "aborted"  # final: nothing of the guest is left on the target, or none was there
    UNSETTLED = "unsettled"  # source: aborted before Commit; a target that may have sent Loaded may not know
    SETTLING = "settling"  # Resume(committed=False) sent/received; Abort follows
    WAITING = "waiting"  # target: the connection was lost after Loaded: only the source knows about Commit
    PAUSED = "paused"  # the connection was lost after Commit was sent/received
    RESUMING = "resuming"  # Resume(committed=True) sent/received
    LISTING = "listing"  # Resumed sent/received; the map of lacking pages is in transfer
    REFUSED = "refused"  # source: the target answered Resume with Abort; the guest stays paused here
    REFUSING = "refusing"  # target: received Resume(committed=True), but nothing is left of the session
    RECOMMITTING = "recommitting"  # source: the target still waits for Commit, which must be sent again


class Position(NamedTuple):
    """A state and, while a session is being resumed, the target's standing: the state that the session then takes.

    Only this outlives a connection, and only this decides what may be done with the guest.
    """

    state: State
    standing: State | None = None  # known to the target in RESUMING, to both sides in LISTING

    @property
    def committed(self) -> bool:
        """Source: COMMIT was sent.  Target: COMMIT was received."""
        return (self.standing or self.state) in _COMMITTED

    @property
    def bound(self) -> bool:
        """Target: Loaded was sent, and the source has not yet said whether it committed.  Only it can end this."""
        return (self.standing or self.state) in _BOUND

    @property
    def done(self) -> bool:
        """The target has every page, and Done was sent (target) or received (source)."""
        return self.state in _DONE

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to say: aborted on both sides, or closed."""
        return self.state in _SETTLED


Table = Mapping[Position, Mapping[str, Position]]


def event(message: AnyMessage) -> str:
    """Return the tables' word for a message."""
    if isinstance(message, Resume):
        return "resume-committed" if message.committed else "resume-aborted"
    if isinstance(message, Resumed):
        return f"resumed-{message.state}"
    tag = type(message).__struct_config__.tag
    return str(tag)


def _stay(state: State, steps: Iterable[str]) -> dict[str, State]:
    return dict.fromkeys(steps, state)


_S = State

#: The source's steps.
_SOURCE: Final[dict[State, dict[str, State]]] = {
    _S.IDLE: {"send hello": _S.HELLO, "send inquire": _S.ASKING},
    _S.ASKING: {"recv capacity": _S.ABORTED, "recv abort": _S.ABORTED},
    _S.HELLO: {"recv ready": _S.PRECOPY, "send abort": _S.ABORTING, "recv abort": _S.ABORTING},
    _S.PRECOPY: {
        **_stay(_S.PRECOPY, ("send populated", "send round", "recv barrier-ack")),
        "send switchover": _S.SWITCHOVER,
        "send abort": _S.ABORTING,
        "recv abort": _S.ABORTING,
    },
    _S.SWITCHOVER: {
        **_stay(_S.SWITCHOVER, ("send populated", "send round", "recv barrier-ack", "send stale-map")),
        "send stale-map-end": _S.MAPPED,
        "send abort": _S.ABORTING,
        "recv abort": _S.ABORTING,
    },
    _S.MAPPED: {
        "recv barrier-ack": _S.MAPPED,
        "recv loaded": _S.LOADED,
        "send abort": _S.WITHDRAWING,
        "recv abort": _S.ABORTING,
    },
    _S.LOADED: {"send commit": _S.COMMITTED, "send abort": _S.WITHDRAWING},
    _S.COMMITTED: {"recv running": _S.POSTCOPY},
    _S.POSTCOPY: {"recv done": _S.DONE},
    _S.DONE: {"send released": _S.CLOSED},
    _S.CLOSED: {},
    _S.ABORTING: {"recv aborted": _S.ABORTED},
    _S.WITHDRAWING: {"recv aborted": _S.ABORTED},
    _S.ABORTED: {},
    _S.UNSETTLED: {"send resume-aborted": _S.SETTLING},
    _S.SETTLING: {"send abort": _S.WITHDRAWING, "recv abort": _S.UNSETTLED},
    _S.PAUSED: {"send resume-committed": _S.RESUMING},
    _S.REFUSED: {},
    _S.RECOMMITTING: {"send commit": _S.COMMITTED},
}

#: The target's steps.
_TARGET: Final[dict[State, dict[str, State]]] = {
    _S.IDLE: {"recv hello": _S.HELLO, "recv inquire": _S.ASKING},
    _S.ASKING: {"send capacity": _S.ABORTED, "send abort": _S.ABORTED},
    _S.HELLO: {"send ready": _S.PRECOPY, "send abort": _S.ABORTING, "recv abort": _S.ABORTING},
    _S.PRECOPY: {
        **_stay(_S.PRECOPY, ("recv populated", "recv round", "send barrier-ack")),
        "recv switchover": _S.SWITCHOVER,
        "send abort": _S.ABORTING,
        "recv abort": _S.ABORTING,
    },
    _S.SWITCHOVER: {
        **_stay(_S.SWITCHOVER, ("recv populated", "recv round", "send barrier-ack", "recv stale-map")),
        "recv stale-map-end": _S.MAPPED,
        "send abort": _S.ABORTING,
        "recv abort": _S.ABORTING,
    },
    _S.MAPPED: {
        "send barrier-ack": _S.MAPPED,
        "send loaded": _S.LOADED,
        "send abort": _S.ABORTING,
        "recv abort": _S.ABORTING,
    },
    _S.LOADED: {"recv commit": _S.COMMITTED, "recv abort": _S.ABORTING},
    _S.COMMITTED: {"send running": _S.POSTCOPY},
    _S.POSTCOPY: {"send done": _S.DONE},
    _S.DONE: {"recv released": _S.CLOSED},
    _S.CLOSED: {},
    _S.ABORTING: {"send aborted": _S.ABORTED},
    _S.ABORTED: {"recv resume-aborted": _S.SETTLING, "recv resume-committed": _S.REFUSING},
    _S.SETTLING: {"recv abort": _S.ABORTING},
    _S.REFUSING: {"send abort": _S.ABORTED},
    _S.WAITING: {"recv resume-aborted": _S.SETTLING},
    _S.PAUSED: {},
}

_CHAT = ("ping", "pong")
_GUEST_STATE = ("state", "state-end")
#: States without a peer, or in which neither side has introduced itself yet.
_SILENT = {_S.IDLE, _S.CLOSED, _S.ABORTED, _S.UNSETTLED, _S.WAITING, _S.PAUSED, _S.REFUSED}

#: Messages that never change the state, and the states in which they may be sent and received.  Guest state that is
#: still in flight at Loaded (a last StateEnd) may continue; in DONE the target may still receive it, but sends none.
CONVERSATION: Final[dict[Role, dict[str, frozenset[State]]]] = {
    role: {
        **{
            f"{way} {word}": frozenset({*table, _S.RESUMING, _S.LISTING} - _SILENT)
            for way in ("send", "recv")
            for word in _CHAT
        },
        **{
            f"{way} {word}": frozenset(
                {_S.PRECOPY, _S.SWITCHOVER, _S.MAPPED, _S.LOADED, _S.COMMITTED, _S.POSTCOPY}
                | ({_S.DONE} if (role, way) == (Role.TARGET, "recv") else set())
            )
            for way in ("send", "recv")
            for word in _GUEST_STATE
        },
    }
    for role, table in ((Role.SOURCE, _SOURCE), (Role.TARGET, _TARGET))
}

_FROM_TARGET_BEFORE_LOADED = ("barrier-ack", *_GUEST_STATE, "abort")
_FROM_SOURCE_BEFORE_COMMIT = (
    "populated",
    "round",
    "switchover",
    "stale-map",
    "stale-map-end",
    *_GUEST_STATE,
    "abort",
)

#: Messages that may still arrive because the peer sent them before it knew; they are silently dropped.
ABSORBED: Final[dict[Role, dict[State, frozenset[str]]]] = {
    Role.SOURCE: {
        _S.ABORTING: frozenset({*_FROM_TARGET_BEFORE_LOADED, "ready"}),
        _S.WITHDRAWING: frozenset({*_FROM_TARGET_BEFORE_LOADED, "loaded"}),
        _S.CLOSED: frozenset(_CHAT),
    },
    Role.TARGET: {
        _S.ABORTING: frozenset(_FROM_SOURCE_BEFORE_COMMIT),
        _S.ABORTED: frozenset({*_FROM_SOURCE_BEFORE_COMMIT, *_CHAT}),
        _S.WAITING: frozenset(_CHAT),
        _S.PAUSED: frozenset(_CHAT),
        _S.CLOSED: frozenset(_CHAT),
    },
}

#: The state that follows a lost connection; a state that is not listed stays.
_LOST: Final[dict[Role, dict[State, State]]] = {
    Role.SOURCE: {
        # The target has not received the end of the stale map: it cannot have promised anything, and aborts by itself.
        **dict.fromkeys((_S.IDLE, _S.ASKING, _S.HELLO, _S.PRECOPY, _S.SWITCHOVER, _S.ABORTING), _S.ABORTED),
        # The target may have promised: it must hear from us, however long that takes.
        **dict.fromkeys((_S.MAPPED, _S.LOADED, _S.WITHDRAWING, _S.SETTLING), _S.UNSETTLED),
        **dict.fromkeys((_S.COMMITTED, _S.POSTCOPY, _S.RESUMING, _S.REFUSED, _S.RECOMMITTING), _S.PAUSED),
        _S.DONE: _S.CLOSED,
    },
    Role.TARGET: {
        **dict.fromkeys((_S.IDLE, _S.ASKING, _S.HELLO, _S.PRECOPY, _S.SWITCHOVER, _S.MAPPED), _S.ABORTED),
        **dict.fromkeys((_S.ABORTING, _S.SETTLING, _S.REFUSING), _S.ABORTED),
        _S.LOADED: _S.WAITING,
        **dict.fromkeys((_S.COMMITTED, _S.POSTCOPY), _S.PAUSED),
        _S.DONE: _S.CLOSED,
    },
}

#: The target's standing, as in Resumed, and the state in which a session resumed there continues.
STANDING: Final[dict[Role, dict[str, State]]] = {
    Role.SOURCE: {"loaded": _S.RECOMMITTING, "running": _S.POSTCOPY, "done": _S.DONE},
    Role.TARGET: {"loaded": _S.LOADED, "running": _S.POSTCOPY, "done": _S.DONE},
}

#: States that a new connection can resume.
RESUMABLE: Final[dict[Role, frozenset[State]]] = {
    Role.SOURCE: frozenset({_S.UNSETTLED, _S.PAUSED}),
    Role.TARGET: frozenset({_S.WAITING, _S.PAUSED, _S.CLOSED, _S.ABORTED}),
}

#: The journal's stages of a migration whose agent died, and the state in which its session is restored.
TAKEN_UP: Final[dict[Role, dict[str, State]]] = {
    Role.SOURCE: {"active": _S.UNSETTLED, "committed": _S.PAUSED, "released": _S.CLOSED},
    Role.TARGET: {"setup": _S.ABORTED, "loaded": _S.WAITING, "committed": _S.PAUSED, "running": _S.PAUSED},
}

_COMMITTED = frozenset(
    {_S.COMMITTED, _S.POSTCOPY, _S.DONE, _S.CLOSED, _S.PAUSED, _S.RESUMING, _S.REFUSED, _S.RECOMMITTING}
)
_BOUND = frozenset({_S.LOADED, _S.WAITING})
_DONE = frozenset({_S.DONE, _S.CLOSED})
_SETTLED = frozenset({_S.ABORTED, _S.CLOSED})


def _listing(role: Role, way: str) -> Iterator[tuple[Position, dict[str, Position]]]:
    """Yield the last steps of a resumption: the map of lacking pages, which is empty if the target is done."""
    for after in STANDING[role].values():
        listing = Position(_S.LISTING, after)
        more = {} if after is _S.DONE else {f"{way} lacking": listing}
        yield listing, {**more, f"{way} lacking-end": Position(after)}


def _source() -> Table:
    table = {Position(state): {step: Position(after) for step, after in _SOURCE[state].items()} for state in _SOURCE}
    table[Position(_S.RESUMING)] = {
        **{f"recv resumed-{word}": Position(_S.LISTING, after) for word, after in STANDING[Role.SOURCE].items()},
        "recv abort": Position(_S.REFUSED),
    }
    return table | dict(_listing(Role.SOURCE, "recv"))


def _target() -> Table:
    table = {Position(state): {step: Position(after) for step, after in _TARGET[state].items()} for state in _TARGET}
    for word, after in STANDING[Role.TARGET].items():
        apart, asked = Position(_LOST[Role.TARGET][after]), Position(_S.RESUMING, after)
        table[apart]["recv resume-committed"] = asked
        table[asked] = {f"send resumed-{word}": Position(_S.LISTING, after), "send abort": apart}
    return table | dict(_listing(Role.TARGET, "send"))


TABLE: Final[dict[Role, Table]] = {Role.SOURCE: _source(), Role.TARGET: _target()}


def lost(role: Role, position: Position) -> Position:
    """Return the position after a lost connection.  A target whose standing was being asked for keeps that standing."""
    if position.standing is not None:
        return Position(_S.PAUSED if role is Role.SOURCE else _LOST[role][position.standing])
    return Position(_LOST[role].get(position.state, position.state))


def following(role: Role, position: Position, way: str, word: str) -> Position | None:
    """Return the position after sending (``way`` "send") or receiving ("recv") ``word``; None if not allowed.

    See also `ABSORBED`.
    """
    step = f"{way} {word}"
    found = TABLE[role][position].get(step)
    if found is None and position.state in CONVERSATION[role].get(step, ()):
        return position
    return found


def expected(role: Role, position: Position, way: str) -> list[str]:
    """Return the words that may be sent or received now, for error messages."""
    words = {step.partition(" ")[2] for step in TABLE[role][position] if step.startswith(f"{way} ")}
    words |= {
        step.partition(" ")[2]
        for step, states in CONVERSATION[role].items()
        if position.state in states and step.startswith(way)
    }
    return sorted(words)
