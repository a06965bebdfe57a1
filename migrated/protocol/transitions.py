"""Which message may follow which: the tables of both sides.

One control connection carries one migration.  Either side is always in exactly one `State`; every message sent or received
makes one step, and a message for which the table has no step is an error that leaves the state as it was.  docs/commit.md
explains why these tables keep a guest from running twice; its diagrams are drawn from them:

    python -m migrated.protocol.transitions

How to read them
    A table maps a `Position` to its steps, ``"send hello"`` or ``"recv ready"`` to the position that follows.  Words are those
    of `event`: the message's tag, and for Resume and Resumed what they say (``resume-committed``, ``resumed-running``).
    `CONVERSATION` is added to many states at once: messages that never change the position.

The rules the tables are made of
    1. The source decides.  Until it sends Commit it may abort, and may run the guest; from then on neither, for good.
    2. Loaded is a promise.  A target that has sent it may not give up by itself (Commit may be on its way), also not when
       the connection is lost: it waits for Commit, or for the source's word that there will be none.  If its guest dies
       meanwhile it drops the connection and refuses the source's Resume(committed=True) by Abort.
    3. A message overtaken by an abort is harmless.  Both sides may send until they have read the other's Abort, so those
       states take what may have been on its way (`ABSORBED`) and drop it.  After Commit there is no Abort to be overtaken
       by.
    4. A lost connection is a step as well (`lost`), and what follows depends only on what was sent, never on what the peer
       may have got.
    5. A new connection begins with Resume, by which the source says on which side of Commit it is.

What is ugly
    The source has two states for an abort: in ``aborting`` the target cannot have sent Loaded, and cleans up even if it never
    hears of us again; in ``withdrawing`` it may have, and must be told.
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
    """Where a session stands; the same word on both sides means the same point of the conversation."""

    IDLE = "idle"  # nothing said yet
    HELLO = "hello"  # Hello sent/received
    PRECOPY = "precopy"  # Ready received/sent
    SWITCHOVER = "switchover"  # the guest is paused, the stale map travels
    MAPPED = "mapped"  # the stale map is whole
    LOADED = "loaded"  # Loaded received/sent: the source alone decides now
    COMMITTED = "committed"  # Commit sent/received
    POSTCOPY = "postcopy"  # Running received/sent
    DONE = "done"  # Done received/sent
    CLOSED = "closed"  # Released sent/received, or the connection lost after Done: over
    ABORTING = "aborting"  # somebody sent Abort, the target cleans up
    WITHDRAWING = "withdrawing"  # source: sent Abort to a target that may have sent Loaded
    ABORTED = "aborted"  # the target has nothing left of the guest: over
    UNSETTLED = "unsettled"  # source: gave up before Commit, and a target that may have sent Loaded may not know
    SETTLING = "settling"  # Resume(committed=False) sent/received, Abort follows
    WAITING = "waiting"  # target: Loaded was sent, then the connection was lost: only the source knows
    PAUSED = "paused"  # Commit was sent/received, then the connection was lost
    RESUMING = "resuming"  # Resume(committed=True) sent/received
    LISTING = "listing"  # Resumed sent/received, the map of lacking pages travels
    REFUSED = "refused"  # source: the target answered that with Abort; the guest stays paused here
    REFUSING = "refusing"  # target: received it, but nothing is left of the session
    RECOMMITTING = "recommitting"  # source: the target still waits for Commit: it must be sent again


class Position(NamedTuple):
    """A state, and while a session is being resumed also where the target stands: the state it goes on in afterwards.

    This is all that outlives a connection, and all that decides what may be done with the guest.
    """

    state: State
    standing: State | None = None  # known to the target in RESUMING, to both sides in LISTING

    @property
    def committed(self) -> bool:
        """Source: COMMIT was sent.  Target: it was received."""
        return (self.standing or self.state) in _COMMITTED

    @property
    def bound(self) -> bool:
        """Target: Loaded was sent, and the source has not said yet whether COMMIT was given: only its word ends this."""
        return (self.standing or self.state) in _BOUND

    @property
    def done(self) -> bool:
        """The target has every page, and both sides know it: source: it has said so; target: we have."""
        return self.state in _DONE

    @property
    def settled(self) -> bool:
        """Nothing more needs to be said: aborted on both sides, or closed."""
        return self.state in _SETTLED


Table = Mapping[Position, Mapping[str, Position]]


def event(message: AnyMessage) -> str:
    """The tables' word for a message."""
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
    _S.IDLE: {"send hello": _S.HELLO},
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
    _S.IDLE: {"recv hello": _S.HELLO},
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
#: States in which nobody is there to talk to, or nobody has said who he is yet.
_SILENT = {_S.IDLE, _S.CLOSED, _S.ABORTED, _S.UNSETTLED, _S.WAITING, _S.PAUSED, _S.REFUSED}

#: Messages that never change the state, and the states in which they may go and come.  Guest state still under way when
#: Loaded is said (a last StateEnd) goes on; a side that has nothing to add after it (Done) only listens.
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

#: What may still arrive because it was sent before the peer knew better: read, and dropped without a word.
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

#: What a lost connection makes of a state; a state that is not here stays.
_LOST: Final[dict[Role, dict[State, State]]] = {
    Role.SOURCE: {
        # The target has not seen the end of the stale map: it cannot have promised anything, and aborts by itself.
        **dict.fromkeys((_S.IDLE, _S.HELLO, _S.PRECOPY, _S.SWITCHOVER, _S.ABORTING), _S.ABORTED),
        # It may have promised: it must hear from us, whenever that is.
        **dict.fromkeys((_S.MAPPED, _S.LOADED, _S.WITHDRAWING, _S.SETTLING), _S.UNSETTLED),
        **dict.fromkeys((_S.COMMITTED, _S.POSTCOPY, _S.RESUMING, _S.REFUSED, _S.RECOMMITTING), _S.PAUSED),
        _S.DONE: _S.CLOSED,
    },
    Role.TARGET: {
        **dict.fromkeys((_S.IDLE, _S.HELLO, _S.PRECOPY, _S.SWITCHOVER, _S.MAPPED), _S.ABORTED),
        **dict.fromkeys((_S.ABORTING, _S.SETTLING, _S.REFUSING), _S.ABORTED),
        _S.LOADED: _S.WAITING,
        **dict.fromkeys((_S.COMMITTED, _S.POSTCOPY), _S.PAUSED),
        _S.DONE: _S.CLOSED,
    },
}

#: Where the target stands when it is asked, in the word of Resumed, and the state in which a session so resumed goes on.
STANDING: Final[dict[Role, dict[str, State]]] = {
    Role.SOURCE: {"loaded": _S.RECOMMITTING, "running": _S.POSTCOPY, "done": _S.DONE},
    Role.TARGET: {"loaded": _S.LOADED, "running": _S.POSTCOPY, "done": _S.DONE},
}

#: States from which a new connection may go on.
RESUMABLE: Final[dict[Role, frozenset[State]]] = {
    Role.SOURCE: frozenset({_S.UNSETTLED, _S.PAUSED}),
    Role.TARGET: frozenset({_S.WAITING, _S.PAUSED, _S.CLOSED, _S.ABORTED}),
}

#: What a journal may say of a migration whose agent died, and the state in which its session is taken up again.
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
    """The end of a resumption: the list of what is lacking, of which there is none where nothing is."""
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
    """What a lost connection makes of it.  A target that was being asked where it stands stands there still."""
    if position.standing is not None:
        return Position(_S.PAUSED if role is Role.SOURCE else _LOST[role][position.standing])
    return Position(_LOST[role].get(position.state, position.state))


def following(role: Role, position: Position, way: str, word: str) -> Position | None:
    """What follows sending (``way`` "send") or receiving ("recv") ``word``; None: not allowed (see also `ABSORBED`)."""
    step = f"{way} {word}"
    found = TABLE[role][position].get(step)
    if found is None and position.state in CONVERSATION[role].get(step, ()):
        return position
    return found


def expected(role: Role, position: Position, way: str) -> list[str]:
    """The words that may be sent or received now, for error messages."""
    words = {step.partition(" ")[2] for step in TABLE[role][position] if step.startswith(f"{way} ")}
    words |= {
        step.partition(" ")[2]
        for step, states in CONVERSATION[role].items()
        if position.state in states and step.startswith(way)
    }
    return sorted(words)


def mermaid(role: Role) -> str:
    """The role's table as a mermaid state diagram, lost connections included.  Where the target stands is left out."""
    edges: dict[tuple[State, State], dict[str, None]] = {}
    for before, steps in TABLE[role].items():
        for step, after in steps.items():
            edges.setdefault((before.state, after.state), {})[step] = None
        if (after := lost(role, before)) != before:
            edges.setdefault((before.state, after.state), {})["lost"] = None
    lines = ["stateDiagram-v2", f"    [*] --> {State.IDLE}"]
    lines += [f"    {before} --> {after}: {', '.join(words)}" for (before, after), words in edges.items()]
    return "\n".join(lines) + "\n"


def diagrams() -> str:
    """Both diagrams as docs/commit.md has them."""
    return "\n".join(f"### The {role}\n\n```mermaid\n{mermaid(role)}```\n" for role in Role)


if __name__ == "__main__":
    print(diagrams(), end="")  # noqa: T201  (its output is the document)
