"""The diagrams of docs/, drawn from the tables of the code: ``python -m docs.site.diagrams`` writes docs/img/*.svg."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Final

from docs.site.drawing import LINE, MARGIN, Drawing, Edges, framed, path, text
from migrated.agent.record import NEXT, State
from migrated.protocol import transitions
from migrated.protocol.transitions import CONVERSATION, TABLE, Position, Role

IMAGES: Final = Path(__file__).parents[1] / "img"

#: The rows of the states: those of a migration without a failure, and the others.  A state whose name ends with ' is the
#: same state before COMMIT: a target that is asked again may stand on either side of it.
ROWS: Final[dict[Role, tuple[dict[str, int], dict[str, int]]]] = {
    Role.SOURCE: (
        {"idle": 0, "hello": 1, "precopy": 2, "switchover": 3, "mapped": 4, "loaded": 5}
        | {"committed": 6, "postcopy": 7, "done": 8, "closed": 10},
        {"asking": 0, "aborted": 1, "aborting": 2, "withdrawing": 3, "settling": 4, "unsettled": 5}
        | {"recommitting": 6, "listing": 7, "resuming": 8, "paused": 9, "refused": 10},
    ),
    Role.TARGET: (
        {"idle": 0, "hello": 1, "precopy": 2, "switchover": 3, "mapped": 4, "loaded": 6}
        | {"committed": 8, "postcopy": 9, "done": 10, "closed": 11},
        {
            "asking": 0,
            "aborted": 1,
            "refusing": 2,
            "aborting": 3,
            "settling": 4,
            "waiting": 5,
            "resuming'": 6,
            "listing'": 7,
        }
        | {"paused": 8, "listing": 9, "resuming": 10},
    ),
}
COMMIT: Final = {Role.SOURCE: 5, Role.TARGET: 7}  # the row above the line


def _name(role: Role, position: Position) -> str:
    twice = role is Role.TARGET and position.standing is not None and not position.committed
    return f"{position.state}'" if twice else str(position.state)


def steps(role: Role) -> dict[tuple[str, str], list[str]]:
    """Return the steps of a side, lost connections included, by the states they lead from and to."""
    edges: dict[tuple[str, str], dict[str, None]] = {}
    for before, known in TABLE[role].items():
        for step, after in known.items():
            edges.setdefault((_name(role, before), _name(role, after)), {})[step] = None
        if (after := transitions.lost(role, before)) != before:
            edges.setdefault((_name(role, before), _name(role, after)), {})["lost"] = None
    return {edge: list(words) for edge, words in edges.items()}


def session(role: Role) -> str:
    """Draw the states of one side of the protocol."""
    main, side = ROWS[role]
    line = (COMMIT[role], "before COMMIT: the guest belongs to the source", "after COMMIT: it belongs to the target")
    return Drawing(steps(role), main, side, mark=line).svg(f"The states of the {role} and the steps between them")


def migration() -> str:
    """Draw the states of a migration's record, as operators see them."""
    edges: Edges = {
        (str(before), str(after)): () for before, known in NEXT.items() for after in State if after in known
    }
    main = {"setup": 0, "precopy": 1, "switchover": 2, "postcopy": 3, "completed": 5}
    side = {"aborted": 0, "failed": 1, "recovering": 3, "postcopy-paused": 4}
    return Drawing(edges, main, side).svg("The states of a migration")


def conversation() -> list[tuple[State | str, list[tuple[bool, str]]]]:
    """Return the messages of a migration in which nothing fails, by the source's state: from the source, and its name."""
    role, start = Role.SOURCE, Position(transitions.State.IDLE)
    came: dict[Position, tuple[Position, str]] = {}
    queue = deque([start])
    while queue:  # the shortest way to the end, through the state in which the guest runs on the target
        before = queue.popleft()
        for step, after in TABLE[role][before].items():
            if after not in came and after != start:
                came[after] = (before, step)
                queue.append(after)
    here, way = Position(transitions.State.CLOSED), []
    while here != start:
        here, step = came[here]
        way.append((here, step))
    found: list[tuple[State | str, list[tuple[bool, str]]]] = []
    for before, step in reversed(way):
        repeated = [known for known, after in TABLE[role][before].items() if after == before]
        if before.state is transitions.State.SWITCHOVER:
            repeated = [known for known in repeated if known == "send stale-map"]
            repeated[:0] = [known for known in CONVERSATION[role] if known == "send state"]
        elif before.state is transitions.State.MAPPED:
            repeated = []
        messages = [(known.startswith("send"), f"{known.partition(' ')[2]} …") for known in repeated]
        found.append((str(before.state), [*messages, (step.startswith("send"), step.partition(" ")[2])]))
    return found


def sequence() -> str:
    """Draw the control connection of a migration in which nothing fails."""
    left, right, y = 190, 470, 50
    body = [text(left, 22, "source", "middle", "name"), text(right, 22, "target", "middle", "name")]
    for state, messages in conversation():
        body.append(text(MARGIN, y + 4, str(state), kind="name"))
        for sent, word in messages:
            ends = (left, right) if sent else (right, left)
            body.append(path([(ends[0], y), (ends[1], y)]))
            body.append(text((left + right) / 2, y - 4, word, "middle"))
            y += LINE * 2 - 4
        if state == "loaded":
            body.append(f'<path class="mark" d="M{MARGIN} {y - 8}H{right + 130}"/>')
            body.append(text(right + 130, y - 14, "point of no return", "end", "marked"))
            y += 14
    body.insert(0, f'<path class="step" d="M{left} 32V{y}M{right} 32V{y}"/>')
    return framed(right + 138, y + MARGIN, "The messages of a migration, by the state of the source", body)


def diagrams() -> dict[str, str]:
    """Return every diagram by the name of its file."""
    return {
        "source-states.svg": session(Role.SOURCE),
        "target-states.svg": session(Role.TARGET),
        "migration-states.svg": migration(),
        "sequence.svg": sequence(),
    }


if __name__ == "__main__":
    for name, drawn in diagrams().items():
        (IMAGES / name).write_text(drawn)
