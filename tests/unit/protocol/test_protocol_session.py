"""The session, step by step: who may say what when, and what follows."""

from __future__ import annotations

import itertools

import pytest

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.protocol import framing, transitions
from migrated.protocol.messages import (
    PROTOCOL_VERSION,
    Aborted,
    AnyMessage,
    Commit,
    Done,
    Lacking,
    LackingEnd,
    Loaded,
    Ping,
    Ready,
    Released,
    Resume,
    Resumed,
    Round,
    Running,
    StaleMap,
    StateChunk,
    StateEnd,
    Switchover,
)
from migrated.protocol.session import Session
from migrated.protocol.transitions import Position, Role, State
from tests.unit.protocol.wired_sessions import (
    ABORT,
    HELLO,
    READY,
    RESUME_ABORTED,
    RESUME_COMMITTED,
    SESSION,
    STRAIGHT,
    TOKEN,
    VOCABULARY,
    Pair,
    other,
)

SOURCE, TARGET = Role.SOURCE, Role.TARGET
BEFORE_LOADED = (State.HELLO, State.PRECOPY, State.SWITCHOVER, State.MAPPED)
AFTER_COMMIT = (State.COMMITTED, State.POSTCOPY)


def session_at(role: Role, position: Position) -> Session:
    """A connected session anywhere, by the shortest way the tables know."""
    start = Session(role)
    ways: dict[Position, list[tuple[str, AnyMessage | None]]] = {start.position: []}
    queue = [start.position]
    while queue:
        before = queue.pop(0)
        steps: list[tuple[str, AnyMessage | None, Position]] = [
            (way, message, after)
            for way, message in itertools.product(("send", "recv"), VOCABULARY)
            if (after := transitions.following(role, before, way, transitions.event(message))) is not None
        ]
        lost = transitions.lost(role, before)
        if lost.state in transitions.RESUMABLE[role]:
            steps.append(("lost", None, lost))
        for way, message, after in steps:
            if after not in ways:
                ways[after] = [*ways[before], (way, message)]
                queue.append(after)
    for way, message in ways[position]:
        if message is None:
            start.connection_lost()
            start = start.resumed()
        elif way == "send":
            start.send(message)
        else:
            list(start.receive(framing.encode(message)))
    assert start.position == position
    return start


ALL = [(role, position) for role in Role for position in transitions.TABLE[role]]


@pytest.mark.parametrize(("role", "position"), ALL)
def test_what_the_table_does_not_know_is_refused_and_changes_nothing(role: Role, position: Position) -> None:
    for message in VOCABULARY:
        word = transitions.event(message)
        session = session_at(role, position)
        wanted = transitions.following(role, position, "send", word)
        assert session.may_send(message) is (wanted is not None)
        if wanted is None:
            with pytest.raises(LocalProtocolError, match=f"cannot send {word} in state {position.state}"):
                session.send(message)
            assert session.position == position
        else:
            assert list(framing.FrameDecoder().feed(session.send(message))) == [message]
            assert session.position == wanted

        session = session_at(role, position)
        wanted = transitions.following(role, position, "recv", word)
        frame = framing.encode(message)
        if wanted is not None:
            assert list(session.receive(frame)) == [message]
            assert session.position == wanted
        elif word in transitions.ABSORBED[role].get(position.state, ()):
            assert list(session.receive(frame)) == []
            assert session.position == position
        else:
            with pytest.raises(RemoteProtocolError, match=f"the peer sent {word} in state {position.state}"):
                list(session.receive(frame))
            assert session.position == position


@pytest.mark.parametrize(("role", "position"), ALL)
def test_every_state_has_a_way_out_and_a_lost_connection_is_final_or_can_be_resumed(
    role: Role, position: Position
) -> None:
    session = session_at(role, position)
    follows = session.connection_lost()
    assert follows is session.connection_lost()
    assert session.settled or session.must_reconnect
    assert session.must_reconnect or follows in {State.ABORTED, State.CLOSED}
    for message in VOCABULARY:
        assert not session.may_send(message)
        with pytest.raises(LocalProtocolError, match="not connected"):
            session.send(message)
    with pytest.raises(LocalProtocolError, match="without a connection"):
        session.receive(b"")


def positions(role: Role, *states: State) -> set[Position]:
    """Those in one of the states, and those that were in one and go on in it once they are resumed."""
    return {at for at in transitions.TABLE[role] if (at.standing or at.state) in states}


def committed(role: Role) -> set[Position]:
    return {at for at in transitions.TABLE[role] if at.committed}


#: How far a side has come: the positions beyond each mark.
FAR: dict[Role, dict[str, set[Position]]] = {
    SOURCE: {"commit": committed(SOURCE), "end": {Position(State.DONE), Position(State.CLOSED)}},
    TARGET: {
        "loaded": positions(TARGET, State.LOADED, State.WAITING) | committed(TARGET),
        "commit": committed(TARGET),
        "end": positions(TARGET, State.DONE, State.CLOSED),
    },
}
#: The only words that lead there, and those that lead back (the source withdrew before it committed).
CROSSING: dict[Role, dict[str, tuple[set[str], set[str]]]] = {
    SOURCE: {"commit": ({"send commit"}, set()), "end": ({"recv done", "recv lacking-end"}, set())},
    TARGET: {
        "loaded": ({"send loaded"}, {"recv abort", "recv resume-aborted"}),
        "commit": ({"recv commit"}, set()),
        "end": ({"send done"}, set()),
    },
}


@pytest.mark.parametrize(("role", "mark"), [(role, mark) for role in Role for mark in FAR[role]])
def test_how_far_it_came_is_never_forgotten_and_never_made_up(role: Role, mark: str) -> None:
    """No step but the named ones crosses the line, either way, and no lost connection does."""
    beyond = FAR[role][mark]
    there, back = CROSSING[role][mark]
    for before, steps in transitions.TABLE[role].items():
        for step, after in steps.items():
            crosses = (before in beyond) - (after in beyond)
            assert crosses == 0 or step in (back if crosses > 0 else there), (before, step, after)
        after = transitions.lost(role, before)
        assert (after in beyond) is (before in beyond), (before, "lost", after)


def test_a_migration_without_trouble() -> None:
    pair = Pair()
    for role, message in STRAIGHT:
        assert pair.tell(role, message) == [message]
    assert pair.states == (State.CLOSED, State.CLOSED)
    assert (pair.source.guest_may_run_here, pair.target.guest_may_run_here) == (False, True)
    assert pair.source.settled
    assert pair.target.settled


@pytest.mark.parametrize("sender", Role)
@pytest.mark.parametrize("state", BEFORE_LOADED)
def test_either_side_may_abort_before_loaded(state: State, sender: Role) -> None:
    pair = Pair().advance(state)
    assert pair.sides[sender].abort_allowed
    assert pair.tell(sender, ABORT) == [ABORT]
    assert pair.tell(TARGET, Aborted()) == [Aborted()]
    assert pair.states == (State.ABORTED, State.ABORTED)
    assert (pair.source.guest_may_run_here, pair.target.guest_may_run_here) == (True, False)


def test_after_loaded_only_the_source_may_abort() -> None:
    pair = Pair().advance(State.LOADED)
    assert pair.source.abort_allowed
    assert not pair.target.abort_allowed
    with pytest.raises(LocalProtocolError, match="cannot send abort in state loaded"):
        pair.target.send(ABORT)
    pair.tell(SOURCE, ABORT)
    pair.tell(TARGET, Aborted())
    assert pair.states == (State.ABORTED, State.ABORTED)


@pytest.mark.parametrize("state", [*AFTER_COMMIT, State.DONE])
def test_after_commit_nobody_may_abort(state: State) -> None:
    pair = Pair().advance(state)
    for role in Role:
        assert not pair.sides[role].abort_allowed
        with pytest.raises(LocalProtocolError, match="cannot send abort"):
            pair.sides[role].send(ABORT)
        with pytest.raises(RemoteProtocolError, match=f"the peer sent abort in state {state}"):
            list(pair.sides[role].receive(framing.encode(ABORT)))
    assert pair.states == (state, state)


def test_aborts_that_cross_meet_as_one() -> None:
    pair = Pair().advance(State.MAPPED)
    pair.say(SOURCE, ABORT)
    pair.say(TARGET, ABORT)
    assert pair.deliver(SOURCE) == []
    assert pair.deliver(TARGET) == []
    assert pair.states == (State.WITHDRAWING, State.ABORTING)
    pair.tell(TARGET, Aborted())
    assert pair.states == (State.ABORTED, State.ABORTED)


def test_what_an_abort_overtook_is_dropped() -> None:
    pair = Pair().advance(State.PRECOPY)
    pair.say(TARGET, ABORT)
    pair.say(SOURCE, Round(2, 0))
    pair.say(SOURCE, Switchover(3))
    pair.say(SOURCE, StateChunk(b"x"))
    pair.say(SOURCE, StaleMap(0, 0, b"\x01"))
    pair.say(SOURCE, Ping(3))
    assert pair.deliver(SOURCE) == [Ping(3)]
    assert pair.deliver(TARGET) == [ABORT]
    pair.tell(TARGET, Aborted())
    assert pair.states == (State.ABORTED, State.ABORTED)


@pytest.mark.parametrize("state", BEFORE_LOADED)
def test_connection_lost_before_loaded_aborts_both(state: State) -> None:
    pair = Pair().advance(state)
    source, target = pair.cut()
    # The source cannot know whether a Loaded was lost: from mapped on it has to tell the target.
    assert source is (State.UNSETTLED if state is State.MAPPED else State.ABORTED)
    assert target is State.ABORTED
    assert pair.source.guest_may_run_here


def test_connection_lost_at_loaded_is_settled_by_the_source() -> None:
    pair = Pair().advance(State.LOADED)
    assert pair.cut() == (State.UNSETTLED, State.WAITING)
    assert (pair.source.guest_may_run_here, pair.target.guest_may_run_here) == (True, False)
    assert pair.source.must_reconnect
    assert pair.target.must_reconnect
    pair.reconnect()
    with pytest.raises(LocalProtocolError, match="cannot send resume-committed in state unsettled"):
        pair.source.send(RESUME_COMMITTED)
    pair.tell(SOURCE, RESUME_ABORTED)
    pair.tell(SOURCE, ABORT)
    pair.tell(TARGET, Aborted())
    assert pair.states == (State.ABORTED, State.ABORTED)


def test_a_lost_commit_leaves_both_paused_and_is_said_again() -> None:
    pair = Pair().advance(State.LOADED)
    pair.say(SOURCE, Commit())
    assert pair.cut() == (State.PAUSED, State.WAITING)
    assert not pair.source.guest_may_run_here
    assert not pair.target.guest_may_run_here
    pair.reconnect()
    pair.tell(SOURCE, RESUME_COMMITTED)
    pair.tell(TARGET, Resumed("loaded", 3))
    pair.tell(TARGET, Lacking(1, 0, b"\x07"))
    pair.tell(TARGET, LackingEnd())
    assert pair.states == (State.RECOMMITTING, State.LOADED)
    pair.tell(SOURCE, Commit())
    pair.tell(TARGET, Running())
    assert pair.states == (State.POSTCOPY, State.POSTCOPY)


def test_a_lost_running_and_a_lost_done_are_told_by_resumed() -> None:
    pair = Pair().advance(State.COMMITTED)
    pair.say(TARGET, Running())
    assert pair.cut() == (State.PAUSED, State.PAUSED)
    pair.reconnect()
    pair.tell(SOURCE, RESUME_COMMITTED)
    with pytest.raises(LocalProtocolError, match="cannot send resumed-loaded"):
        pair.target.send(Resumed("loaded", 3))
    pair.tell(TARGET, Resumed("running", 3))
    pair.tell(TARGET, LackingEnd())
    assert pair.states == (State.POSTCOPY, State.POSTCOPY)
    pair.say(TARGET, Done())
    assert pair.cut() == (State.PAUSED, State.CLOSED)
    pair.reconnect()
    pair.tell(SOURCE, RESUME_COMMITTED)
    pair.tell(TARGET, Resumed("done", 0))
    pair.tell(TARGET, LackingEnd())
    pair.tell(SOURCE, Released())
    assert pair.states == (State.CLOSED, State.CLOSED)


def test_a_target_that_cannot_go_on_refuses_and_may_be_asked_again() -> None:
    pair = Pair().advance(State.POSTCOPY)
    pair.cut()
    pair.reconnect()
    pair.tell(SOURCE, RESUME_COMMITTED)
    assert not pair.target.abort_allowed
    assert pair.tell(TARGET, ABORT) == [ABORT]
    assert pair.states == (State.REFUSED, State.PAUSED)
    assert not pair.source.guest_may_run_here
    assert pair.cut() == (State.PAUSED, State.PAUSED)
    pair.settle()


def test_a_session_the_target_does_not_know_is_answered() -> None:
    pair = Pair().advance(State.MAPPED)
    pair.cut()
    pair.sides[TARGET] = Session(TARGET, state=State.ABORTED)
    pair.settle()
    assert pair.states == (State.ABORTED, State.ABORTED)

    pair = Pair().advance(State.POSTCOPY)
    pair.cut()
    pair.sides[TARGET] = Session(TARGET, state=State.ABORTED)
    pair.reconnect()
    pair.tell(SOURCE, RESUME_COMMITTED)
    assert pair.target.state is State.REFUSING
    pair.tell(TARGET, ABORT)
    assert pair.states == (State.REFUSED, State.ABORTED)
    assert not pair.source.guest_may_run_here


@pytest.mark.parametrize("which", ["session", "token"])
def test_a_resume_of_another_session_is_refused(which: str) -> None:
    pair = Pair().advance(State.POSTCOPY)
    pair.cut()
    pair.reconnect()
    session, token = (bytes(16), TOKEN) if which == "session" else (SESSION, bytes(32))
    stranger = Resume(PROTOCOL_VERSION, session, token, committed=True)
    with pytest.raises(LocalProtocolError, match="not those of this migration"):
        pair.source.send(stranger)
    with pytest.raises(RemoteProtocolError, match="not those of this migration"):
        list(pair.target.receive(framing.encode(stranger)))
    assert pair.states == (State.PAUSED, State.PAUSED)


@pytest.mark.parametrize("role", Role)
def test_no_guest_state_after_its_end(role: Role) -> None:
    pair = Pair().advance(State.PRECOPY)
    pair.tell(role, StateEnd())
    for late in (StateChunk(b"x"), StateEnd()):
        assert not pair.sides[role].may_send(late)
        with pytest.raises(LocalProtocolError, match="after state-end"):
            pair.sides[role].send(late)
        assert pair.sides[other(role)].may_send(late)
    with pytest.raises(RemoteProtocolError, match="after state-end"):
        list(pair.sides[other(role)].receive(framing.encode(StateEnd())))


def test_page_numbers_are_held_against_the_regions() -> None:
    pair = Pair().advance(State.SWITCHOVER)
    beyond = StaleMap(1, 0, b"\x08")
    with pytest.raises(LocalProtocolError, match="bits beyond the last page of region 1"):
        pair.source.send(beyond)
    with pytest.raises(RemoteProtocolError, match="bits beyond the last page of region 1"):
        list(pair.target.receive(framing.encode(beyond)))
    assert pair.states == (State.SWITCHOVER, State.SWITCHOVER)


def test_ready_must_answer_the_hello() -> None:
    pair = Pair().advance(State.HELLO)
    short = Ready((4096,))
    with pytest.raises(LocalProtocolError, match="page sizes for 1 regions"):
        pair.target.send(short)
    with pytest.raises(RemoteProtocolError, match="page sizes for 1 regions"):
        list(pair.source.receive(framing.encode(short)))


def test_messages_before_the_offending_one_are_given_out_and_it_makes_no_step() -> None:
    pair = Pair().advance(State.LOADED)
    arriving = pair.target.receive(framing.encode(Ping(1)) + framing.encode(Commit()) + framing.encode(HELLO))
    assert next(arriving) == Ping(1)
    assert pair.states == (State.LOADED, State.LOADED)
    assert next(arriving) == Commit()
    with pytest.raises(RemoteProtocolError, match="the peer sent hello in state committed: expected "):
        next(arriving)
    assert pair.states == (State.LOADED, State.COMMITTED)
    with pytest.raises(RemoteProtocolError, match="the peer sent hello in state committed"):
        list(pair.target.receive(framing.encode(Ping(2))))


def test_bytes_of_an_earlier_connection_do_not_reach_a_later_one() -> None:
    pair = Pair().advance(State.LOADED)
    late = pair.target.receive(framing.encode(Commit()))
    pair.cut()
    assert list(late) == []
    pair.reconnect()
    assert list(late) == []
    assert pair.target.state is State.WAITING


def test_an_answer_may_be_sent_between_two_messages() -> None:
    pair = Pair().advance(State.MAPPED)
    pair.say(TARGET, Loaded())
    pair.say(TARGET, Ping(1))
    data = b"".join(pair.under_way[TARGET])
    pair.under_way[TARGET].clear()
    for message in pair.source.receive(data):
        if isinstance(message, Loaded):
            pair.say(SOURCE, Commit())
    assert pair.source.state is State.COMMITTED
    assert pair.deliver(SOURCE) == [Commit()]


@pytest.mark.parametrize(
    ("role", "state"), [(SOURCE, State.POSTCOPY), (SOURCE, State.WAITING), (TARGET, State.UNSETTLED)]
)
def test_a_session_is_taken_up_only_where_a_crash_can_leave_it(role: Role, state: State) -> None:
    with pytest.raises(ValueError, match="cannot be taken up"):
        Session(role, state=state)


def test_a_session_taken_up_again_knows_its_regions_and_secrets() -> None:
    target = Session(TARGET, state=State.PAUSED, hello=HELLO, ready=READY)
    assert not target.connected
    assert target.guest_may_run_here
    target = target.resumed()
    with pytest.raises(LocalProtocolError, match="resumed in state paused: the session is connected"):
        target.resumed()
    list(target.receive(framing.encode(RESUME_COMMITTED)))
    target.send(Resumed("running", 1))
    with pytest.raises(LocalProtocolError, match="beyond region 0"):
        target.send(Lacking(0, 32, b"\x01"))


def test_what_is_over_cannot_be_reconnected_by_the_source() -> None:
    pair = Pair().advance(State.DONE)
    assert pair.cut() == (State.CLOSED, State.CLOSED)
    with pytest.raises(LocalProtocolError, match="the session is over"):
        pair.source.resumed()


def test_done_before_running_is_not_heard() -> None:
    pair = Pair().advance(State.COMMITTED)
    with pytest.raises(RemoteProtocolError, match=r"the peer sent done in state committed: expected .*running"):
        list(pair.source.receive(framing.encode(Done())))
