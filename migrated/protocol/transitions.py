"""Which message may follow which: the tables of both sides.

One control connection carries one migration.  Either side is always in exactly one `State`; every message sent or received
makes one step, and a message for which the table has no step is an error that leaves the state as it was.  docs/commit.md
explains why these tables keep a guest from running twice; its diagrams are drawn from them:

    python -m migrated.protocol.transitions

How to read them
    A table maps a state to its steps, ``"send hello"`` or ``"recv ready"`` to the state that follows.  Words are those of
    `event`: the message's tag, and for Resume and Resumed what they say (``resume-committed``, ``resumed-running``).
    `CONVERSATION` is added to many states at once: messages that never change the state.

The rules the tables are made of
    1. The source decides.  Until it sends Commit it may abort, and may run the guest; from then on neither, for good.
    2. Loaded is a promise.  A target that has sent it may not give up by itself (Commit may be on its way), also not when
       the connection is lost: it waits for Commit, or for the source's word that there will be none.  If its guest dies
       meanwhile it drops the connection and refuses the source's Resume(committed=True) by Abort.
    3. A message overtaken by an abort is harmless.  Both sides may send until they have read the other's Abort, so those
       states take what may have been on its way (`ABSORBED`) and drop it.  After Commit there is no Abort to be overtaken
       by.
    4. A lost connection is a step as well (`LOST`), and what follows depends only on what was sent, never on what the peer
       may have got.
    5. A new connection begins with Resume, by which the source says on which side of Commit it is.

What is ugly
    The same point of the conversation needs a state for each thing the target may have said it is at (resuming-loaded,
    resuming-running, resuming-done), since a table cannot remember.  The source has two states for an abort: in ``aborting``
    the target cannot have sent Loaded, and cleans up even if it never hears of us again; in ``withdrawing`` it may have, and
    must be told.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Final

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
    RESUMING = "resuming"  # source: Resume(committed=True) sent
    REFUSED = "refused"  # source: the target answered that with Abort; the guest stays paused here
    REFUSING = "refusing"  # target: received it, but nothing is left of the session
    RESUMING_LOADED = "resuming-loaded"  # target: received it, and stands at loaded / running / done
    RESUMING_RUNNING = "resuming-running"
    RESUMING_DONE = "resuming-done"
    LISTING_LOADED = "listing-loaded"  # Resumed sent/received, the map of lacking pages travels
    LISTING_RUNNING = "listing-running"
    LISTING_DONE = "listing-done"
    RECOMMITTING = "recommitting"  # source: the target still waits for Commit: it must be sent again


Table = Mapping[State, Mapping[str, State]]


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
    _S.RESUMING: {
        "recv resumed-loaded": _S.LISTING_LOADED,
        "recv resumed-running": _S.LISTING_RUNNING,
        "recv resumed-done": _S.LISTING_DONE,
        "recv abort": _S.REFUSED,
    },
    _S.REFUSED: {},
    _S.LISTING_LOADED: {"recv lacking": _S.LISTING_LOADED, "recv lacking-end": _S.RECOMMITTING},
    _S.LISTING_RUNNING: {"recv lacking": _S.LISTING_RUNNING, "recv lacking-end": _S.POSTCOPY},
    _S.LISTING_DONE: {"recv lacking-end": _S.DONE},
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
    _S.CLOSED: {"recv resume-committed": _S.RESUMING_DONE},
    _S.ABORTING: {"send aborted": _S.ABORTED},
    _S.ABORTED: {"recv resume-aborted": _S.SETTLING, "recv resume-committed": _S.REFUSING},
    _S.SETTLING: {"recv abort": _S.ABORTING},
    _S.REFUSING: {"send abort": _S.ABORTED},
    _S.WAITING: {"recv resume-aborted": _S.SETTLING, "recv resume-committed": _S.RESUMING_LOADED},
    _S.PAUSED: {"recv resume-committed": _S.RESUMING_RUNNING},
    _S.RESUMING_LOADED: {"send resumed-loaded": _S.LISTING_LOADED, "send abort": _S.WAITING},
    _S.RESUMING_RUNNING: {"send resumed-running": _S.LISTING_RUNNING, "send abort": _S.PAUSED},
    _S.RESUMING_DONE: {"send resumed-done": _S.LISTING_DONE, "send abort": _S.CLOSED},
    _S.LISTING_LOADED: {"send lacking": _S.LISTING_LOADED, "send lacking-end": _S.LOADED},
    _S.LISTING_RUNNING: {"send lacking": _S.LISTING_RUNNING, "send lacking-end": _S.POSTCOPY},
    _S.LISTING_DONE: {"send lacking-end": _S.DONE},
}

_CHAT = ("ping", "pong")
_GUEST_STATE = ("state", "state-end")
#: States in which nobody is there to talk to, or nobody has said who he is yet.
_SILENT = {_S.IDLE, _S.CLOSED, _S.ABORTED, _S.UNSETTLED, _S.WAITING, _S.PAUSED, _S.REFUSED}

#: Messages that never change the state, and the states in which they may go and come.  Guest state still under way when
#: Loaded is said (a last StateEnd) goes on; a side that has nothing to add after it (Done) only listens.
CONVERSATION: Final[dict[Role, dict[str, frozenset[State]]]] = {
    role: {
        **{f"{way} {word}": frozenset(table.keys() - _SILENT) for way in ("send", "recv") for word in _CHAT},
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
LOST: Final[dict[Role, dict[State, State]]] = {
    Role.SOURCE: {
        # The target has not seen the end of the stale map: it cannot have promised anything, and aborts by itself.
        **dict.fromkeys((_S.IDLE, _S.HELLO, _S.PRECOPY, _S.SWITCHOVER, _S.ABORTING), _S.ABORTED),
        # It may have promised: it must hear from us, whenever that is.
        **dict.fromkeys((_S.MAPPED, _S.LOADED, _S.WITHDRAWING, _S.SETTLING), _S.UNSETTLED),
        **dict.fromkeys((_S.COMMITTED, _S.POSTCOPY, _S.RESUMING, _S.REFUSED, _S.RECOMMITTING), _S.PAUSED),
        **dict.fromkeys((_S.LISTING_LOADED, _S.LISTING_RUNNING, _S.LISTING_DONE), _S.PAUSED),
        _S.DONE: _S.CLOSED,
    },
    Role.TARGET: {
        **dict.fromkeys((_S.IDLE, _S.HELLO, _S.PRECOPY, _S.SWITCHOVER, _S.MAPPED), _S.ABORTED),
        **dict.fromkeys((_S.ABORTING, _S.SETTLING, _S.REFUSING), _S.ABORTED),
        **dict.fromkeys((_S.LOADED, _S.RESUMING_LOADED, _S.LISTING_LOADED), _S.WAITING),
        **dict.fromkeys((_S.COMMITTED, _S.POSTCOPY, _S.RESUMING_RUNNING, _S.LISTING_RUNNING), _S.PAUSED),
        **dict.fromkeys((_S.DONE, _S.RESUMING_DONE, _S.LISTING_DONE), _S.CLOSED),
    },
}

#: States from which a new connection may go on.
RESUMABLE: Final[dict[Role, frozenset[State]]] = {
    Role.SOURCE: frozenset({_S.UNSETTLED, _S.PAUSED}),
    Role.TARGET: frozenset({_S.WAITING, _S.PAUSED, _S.CLOSED, _S.ABORTED}),
}

#: States in which Commit has been sent (source) or received (target).
COMMITTED: Final[dict[Role, frozenset[State]]] = {
    Role.SOURCE: frozenset(
        {_S.COMMITTED, _S.POSTCOPY, _S.DONE, _S.CLOSED, _S.PAUSED, _S.RESUMING, _S.REFUSED, _S.RECOMMITTING}
        | {_S.LISTING_LOADED, _S.LISTING_RUNNING, _S.LISTING_DONE}
    ),
    Role.TARGET: frozenset(
        {_S.COMMITTED, _S.POSTCOPY, _S.DONE, _S.CLOSED, _S.PAUSED}
        | {_S.RESUMING_RUNNING, _S.LISTING_RUNNING, _S.RESUMING_DONE, _S.LISTING_DONE}
    ),
}

#: States of a target that has sent Loaded and may neither run the guest nor give it up: only the source's word ends them.
BOUND: Final = frozenset({_S.LOADED, _S.WAITING, _S.RESUMING_LOADED, _S.LISTING_LOADED})

TABLE: Final[dict[Role, Table]] = {Role.SOURCE: _SOURCE, Role.TARGET: _TARGET}


def following(role: Role, state: State, way: str, word: str) -> State | None:
    """The state after sending (``way`` "send") or receiving ("recv") ``word``; None: not allowed (see also `ABSORBED`)."""
    step = f"{way} {word}"
    found = TABLE[role][state].get(step)
    if found is None and state in CONVERSATION[role].get(step, ()):
        return state
    return found


def expected(role: Role, state: State, way: str) -> list[str]:
    """The words that may be sent or received now, for error messages."""
    words = {step.partition(" ")[2] for step in TABLE[role][state] if step.startswith(f"{way} ")}
    words |= {
        step.partition(" ")[2]
        for step, states in CONVERSATION[role].items()
        if state in states and step.startswith(way)
    }
    return sorted(words)


def mermaid(role: Role) -> str:
    """The role's table as a mermaid state diagram, lost connections included."""
    lines = ["stateDiagram-v2", f"    [*] --> {_node(State.IDLE)}"]
    for state, steps in TABLE[role].items():
        merged: dict[State, list[str]] = {}
        for step, after in steps.items():
            merged.setdefault(after, []).append(step)
        lines += [f"    {_node(state)} --> {_node(after)}: {', '.join(words)}" for after, words in merged.items()]
    lines += [f"    {_node(before)} --> {_node(after)}: lost" for before, after in LOST[role].items()]
    return "\n".join(lines) + "\n"


def _node(state: State) -> str:
    return state.value.replace("-", "_")


def diagrams() -> str:
    """Both diagrams as docs/commit.md has them."""
    return "\n".join(f"### The {role}\n\n```mermaid\n{mermaid(role)}```\n" for role in Role)


if __name__ == "__main__":
    print(diagrams(), end="")  # noqa: T201  (its output is the document)
