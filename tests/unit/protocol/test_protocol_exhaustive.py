"""The tables by enumeration: every way two sides can go, with up to three messages under way from each.

The walk uses nothing but the tables: all that may be sent is sent at any time, links fail at any time, each side notices at
a time of its own (what it sent may still arrive), and the source dials again.  `test_protocol_loss.py` drives real sessions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from migrated.protocol import transitions
from migrated.protocol.session import Session
from migrated.protocol.transitions import Position, Role, State
from tests.unit.protocol.wired_sessions import HELLO, READY, VOCABULARY, Pair

UNDER_WAY = 3
WORDS = tuple(transitions.event(message) for message in VOCABULARY)
#: Never change a state and mean the same everywhere: one of each kind stands for all.
STANDS_FOR = {"pong": "ping", "round": "populated", "state-end": "state", "lacking": "", "stale-map": ""}
SAID = tuple(word for word in WORDS if word not in STANDS_FOR)


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One side, and what it has sent that has not arrived."""

    at: Position
    connected: bool
    sent: tuple[str, ...] = ()
    first: bool = True  # still on its first connection: guest state lives and ends with that

    def lost(self, role: Role) -> Side:
        return Side(transitions.lost(role, self.at), connected=False, sent=self.sent, first=False)


Both = tuple[Side, Side]  # source, target
ROLES = (Role.SOURCE, Role.TARGET)


def put(both: Both, index: int, side: Side, peer: Side) -> Both:
    return (side, peer) if index == 0 else (peer, side)


def steps(both: Both) -> Iterator[Both]:
    """Everything that can happen next."""
    for index, role in enumerate(ROLES):
        side, peer = both[index], both[1 - index]
        if not side.connected:
            continue
        if len(side.sent) < UNDER_WAY:
            for word in SAID:
                after = transitions.following(role, side.at, "send", word)
                if after is not None and (side.first or word != "state"):
                    yield put(both, index, dataclasses.replace(side, at=after, sent=(*side.sent, word)), peer)
        if peer.sent:
            word, rest = peer.sent[0], peer.sent[1:]
            after = transitions.following(role, side.at, "recv", word)
            if after is None:
                absorbed = word in transitions.ABSORBED[role].get(side.at.state, ())
                assert absorbed, f"{role} at {side.at} cannot take the {word} it was rightly sent: {both}"
                after = side.at
            yield put(both, index, dataclasses.replace(side, at=after), dataclasses.replace(peer, sent=rest))
        yield put(both, index, side.lost(role), dataclasses.replace(peer, sent=()))
    source, target = both
    if not source.connected and source.at.state in transitions.RESUMABLE[Role.SOURCE]:
        let_go = target.lost(Role.TARGET) if target.connected else target
        assert let_go.at.state in transitions.RESUMABLE[Role.TARGET]
        yield Side(source.at, connected=True, first=False), Side(let_go.at, connected=True, first=False)


def reachable() -> set[Both]:
    start: Both = (Side(Position(State.IDLE), connected=True), Side(Position(State.IDLE), connected=True))
    seen, frontier = {start}, [start]
    while frontier:
        for following in steps(frontier.pop()):
            if following not in seen:
                seen.add(following)
                frontier.append(following)
    return seen


def test_every_interleaving_keeps_the_guest_in_one_place_and_can_be_settled() -> None:
    seen = reachable()
    for source, target in seen:
        assert source.at.committed or not target.at.committed, (source, target)

    # All positions are met, but for the one a target has only without its memory of the session.
    for index, role in enumerate(ROLES):
        met = {both[index].at for both in seen}
        assert set(transitions.TABLE[role]) - met <= {Position(State.REFUSING)}

    ends = {(source.lost(Role.SOURCE).at.state, target.lost(Role.TARGET).at.state) for source, target in seen}
    for source_state, target_state in ends:
        pair = Pair(
            {
                Role.SOURCE: Session(Role.SOURCE, state=source_state, hello=HELLO, ready=READY)
                if source_state in transitions.RESUMABLE[Role.SOURCE]
                else over(source_state),
                Role.TARGET: Session(Role.TARGET, state=target_state, hello=HELLO, ready=READY),
            }
        )
        pair.settle()


def over(state: State) -> Session:
    """A source that has come to an end."""
    pair = Pair()
    if state is State.CLOSED:
        pair.advance(State.DONE)
    pair.cut()
    assert pair.source.state is state
    return pair.source
