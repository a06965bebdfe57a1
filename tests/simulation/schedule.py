"""A schedule: which faults and operator commands happen when, drawn from a seed."""

from __future__ import annotations

import dataclasses
import random
from typing import Final


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """One fault or operator command.

    It happens at the time ``at``, or after the ``count``-th occurrence of ``note``: ``steps`` of the event loop or ``after``
    seconds later.  With negative ``steps`` it happens at once: a message that is noted has not left yet.  The note "fault" is
    the previous action.
    """

    kind: str
    host: str = ""
    what: str = ""
    how: str = ""
    seconds: float = 0.0
    at: float = 0.0
    note: str = ""
    count: int = 1
    steps: int = 0
    after: float = 0.0

    def __str__(self) -> str:
        distance = f"{self.after:.3f} s" if self.after else f"{self.steps} steps"
        when = f"{distance} after '{self.note}' number {self.count}" if self.note else f"at {self.at:.3f} s"
        parts = [self.kind, self.host, self.what, self.how]
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{' '.join(part for part in parts if part)}{lasting}, {when}"


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """The complete input of one run."""

    seed: int
    actions: tuple[Action, ...]


_FROM_SOURCE: Final = (
    "hello", "populated", "round", "switchover", "stale-map", "stale-map-end", "state", "state-end", "commit", "commit", "commit", "commit",
    "released", "abort", "resume-committed", "resume-committed", "resume-aborted", "ping",
)  # fmt: skip
_FROM_TARGET: Final = (
    "ready", "barrier-ack", "state-end", "loaded", "loaded", "loaded", "loaded", "running", "running", "done", "done", "aborted", "resumed-loaded",
    "resumed-running", "resumed-done", "lacking", "lacking-end", "abort",
)  # fmt: skip
_COMMANDS_SOURCE: Final = (
    "open", "tracking_uffd", "quiesce", "unquiesce", "pause", "send_state", "resume", "reclaim", "adopt", "release",
)  # fmt: skip
_COMMANDS_TARGET: Final = ("check", "start", "started", "load_state", "resume", "adopt", "release")
_DISK: Final = ("open", "write", "fsync", "rename", "read", "unlink")


def _moment(draw: random.Random, first_free: int) -> dict[str, object]:
    """Draw the time of an action.  Later actions often follow soon after an earlier one."""
    first = first_free == 0
    chance = draw.random()
    if not first and chance < 0.45:
        count = draw.randint(1, first_free)
        if draw.random() < 0.5:
            return {"note": "fault", "count": count, "steps": draw.choice((1, 3, 8, 20, 50, 100, 200, 400))}
        after = round(draw.choice((0.01, 0.1, 0.5, 2.0, 8.0)) * (0.2 + draw.random()), 4)
        return {"note": "fault", "count": count, "after": after}
    if chance < 0.6:
        return {"at": round(draw.choice((0.3, 0.5, 1.0, 3.0)) * draw.random() + 0.1, 4)}
    kind = draw.random()
    if kind < 0.55:
        from_source = draw.random() < 0.5
        word = draw.choice(_FROM_SOURCE if from_source else _FROM_TARGET)
        sent = draw.random() < 0.5
        host = "s" if from_source is sent else "t1"
        note = f"{host} {'send' if sent else 'recv'} {word}"
    elif kind < 0.75:
        note = draw.choice(
            [*(f"s guest {word}" for word in _COMMANDS_SOURCE), *(f"t1 guest {word}" for word in _COMMANDS_TARGET)]
        )
    elif kind < 0.9:
        note = f"{draw.choice(('s', 't1'))} disk {draw.choice(_DISK)}"
    else:
        note = f"{draw.choice(('s', 't1'))} store {draw.choice(('keep', 'forget'))}"
    count = draw.choice((1, 1, 1, 1, 2, 2, 3, 5))
    steps = draw.choice((0, 0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89))
    return {"note": note, "count": count, "steps": steps}


def _action(draw: random.Random, number: int) -> Action:
    host = draw.choice(("s", "t1", "t1", "s", "t2"))
    moment = _moment(draw, number)
    seconds = round(draw.choice((0.05, 0.5, 3.0, 12.0)) * (0.5 + draw.random()), 2)
    kind = draw.choices(
        (
            "kill",
            "stop",
            "cut",
            "flap",
            "block",
            "disk",
            "descriptors",
            "store",
            "command",
            "engine",
            "die",
            "burn",
            "verb",
            "version",
        ),
        (22, 6, 12, 16, 8, 6, 3, 2, 8, 2, 1, 2, 20, 4),
    )[0]
    fields: dict[str, object] = {"kind": kind, "host": host}
    match kind:
        case "cut":
            fields["host"] = ""
            fields["what"] = draw.choice(("all", "all", "control", "bulk", "urgent"))
            fields["how"] = draw.choice(("both", "both", "client", "server"))
        case "flap":
            fields["host"] = ""
            fields["how"] = "both"
        case "block":
            fields["host"] = "t1"
            fields["how"] = draw.choice(("both", "client", "server"))
            fields["seconds"] = seconds
        case "disk":
            fields["how"] = draw.choice(("ENOSPC", "EIO"))
            fields["seconds"] = seconds
        case "version":
            fields["what"] = draw.choice(("both", "protocol", "journal"))
            fields["how"] = draw.choice(("newer", "newer", "older"))
            fields["seconds"] = seconds
        case "descriptors" | "store":
            fields["seconds"] = seconds
        case "command":
            host = draw.choice(("s", "t1"))
            fields["host"] = host
            fields["what"] = draw.choice(("", *(_COMMANDS_SOURCE if host == "s" else _COMMANDS_TARGET)))
            fields["how"] = draw.choice(("fail", "fail", "hang"))
            fields["seconds"] = seconds
        case "verb":
            verb = draw.choice(("start", "start", "abort", "abort", "switchover", "resume", "resume", "resume", "set"))
            fields["what"] = verb
            if draw.random() < 0.05:
                verb = fields["what"] = "abandon"
            on_target = verb == "abandon" or (verb == "abort" and draw.random() < 0.3)
            fields["host"] = "t1" if on_target else "s"
            if verb == "start":
                fields["how"] = draw.choice(("t1", "t2"))
            elif verb == "resume":
                fields["how"] = draw.choice(("", "t1", "t2", "nowhere"))
        case _:
            pass
    return Action(**fields, **moment)  # type: ignore[arg-type]


def draw_schedule(seed: int) -> Schedule:
    """Draw the schedule of a seed."""
    draw = random.Random(seed)
    count = draw.choice((1, 2, 3, 3, 4, 4, 5, 6, 8))
    return Schedule(seed, tuple(_action(draw, number) for number in range(count)))
