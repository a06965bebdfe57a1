"""Invariant 2 whatever the link does: lost, cut, doubled, reordered, late, and either side crashing."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migrated.errors import RemoteProtocolError
from migrated.protocol.messages import AnyMessage, Commit, Done
from migrated.protocol.session import Session
from migrated.protocol.transitions import Role, State
from tests.unit.protocol.wired_sessions import STRAIGHT, VOCABULARY, Pair, next_word, other

roles = st.sampled_from(Role)
EVERY = range(len(STRAIGHT))
#: Where the machine begins: the trouble is in the middle, and random steps seldom get there from the start.
STARTS = [State.IDLE, State.PRECOPY, State.MAPPED, State.LOADED, State.COMMITTED, State.POSTCOPY, State.DONE]


def run(pair: Pair, until: int) -> None:
    for role, message in STRAIGHT[:until]:
        pair.tell(role, message)


@pytest.mark.parametrize("index", EVERY)
def test_each_message_lost_with_its_connection(index: int) -> None:
    pair = Pair()
    run(pair, index)
    pair.say(*STRAIGHT[index])
    pair.cut()
    pair.settle()


@pytest.mark.parametrize("index", EVERY)
def test_each_message_torn_by_the_end_of_its_connection(index: int) -> None:
    pair = Pair()
    run(pair, index)
    role, message = STRAIGHT[index]
    frame = pair.sides[role].send(message)
    assert list(pair.sides[other(role)].receive(frame[:-1])) == []
    pair.cut()
    pair.settle()


@pytest.mark.parametrize("index", EVERY)
def test_each_message_missing_from_the_stream(index: int) -> None:
    """A peer that forgets one: whatever it says next is harmless, or ends the connection by name."""
    pair = Pair()
    run(pair, index)
    pair.sides[STRAIGHT[index][0]].send(STRAIGHT[index][1])
    with contextlib.suppress(RemoteProtocolError):
        for role, message in STRAIGHT[index + 1 :]:
            if not pair.sides[role].may_send(message):
                break  # it waits for an answer that will not come: a limit ends that wait
            pair.tell(role, message)
    pair.check()
    pair.cut()
    pair.settle()


@pytest.mark.parametrize("index", EVERY)
def test_each_message_doubled(index: int) -> None:
    pair = Pair()
    run(pair, index)
    role, message = STRAIGHT[index]
    frame = pair.sides[role].send(message)
    receiver = pair.sides[other(role)]
    assert list(receiver.receive(frame)) == [message]
    state = receiver.state
    with contextlib.suppress(RemoteProtocolError):
        list(receiver.receive(frame))
    assert receiver.state is state
    pair.check()
    pair.cut()
    pair.settle()


@pytest.mark.parametrize("index", EVERY[:-1])
def test_each_message_after_the_one_that_follows_it(index: int) -> None:
    pair = Pair()
    run(pair, index)
    role = STRAIGHT[index][0]
    later = next((after for after in range(index + 1, len(STRAIGHT)) if STRAIGHT[after][0] is role), None)
    if later is None or any(not pair.sides[role].may_send(STRAIGHT[after][1]) for after in (index,)):
        return
    first = pair.sides[role].send(STRAIGHT[index][1])
    if not pair.sides[role].may_send(STRAIGHT[later][1]):
        return  # the sender waits for an answer in between: the two cannot be under way at once
    second = pair.sides[role].send(STRAIGHT[later][1])
    with contextlib.suppress(RemoteProtocolError):
        list(pair.sides[other(role)].receive(second + first))
    pair.check()
    pair.cut()
    pair.settle()


@pytest.mark.parametrize("index", EVERY)
def test_each_message_too_late_for_its_connection(index: int) -> None:
    """Its bytes are read only after a new connection has come: they belong to no one."""
    pair = Pair()
    run(pair, index)
    role, message = STRAIGHT[index]
    receiver = pair.sides[other(role)]
    late = receiver.receive(pair.sides[role].send(message))
    pair.cut()
    state = receiver.state
    assert list(late) == []
    assert receiver.state is state
    pair.settle()
    assert list(late) == []


class LossyLink(RuleBasedStateMachine):
    """Both sides say what they may, in any order, over a link that may do anything but change a byte.

    `faithful`: nothing was doubled or reordered on this connection; then no side may ever call the other's words wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.faithful = True

    @initialize(state=st.sampled_from(STARTS), lost=st.sampled_from(["nothing", "everything", "Commit", "Done"]))
    def begin(self, state: State, lost: str) -> None:
        self.pair.advance(state)
        last_word: dict[tuple[State, str], tuple[Role, AnyMessage]] = {
            (State.LOADED, "Commit"): (Role.SOURCE, Commit()),
            (State.POSTCOPY, "Done"): (Role.TARGET, Done()),
        }
        if (state, lost) in last_word:
            self.pair.say(*last_word[state, lost])
        if lost != "nothing":
            self.lose()

    @rule(turns=st.lists(roles, min_size=1, max_size=4))
    def go_on(self, turns: list[Role]) -> None:
        """Say what leads to the end, if anything; what the other side said has arrived before."""
        for role in turns:
            self.arrive(other(role), 1.0)
            message = next_word(self.pair.sides[role])
            if message is not None and self.pair.sides[role].may_send(message):
                self.pair.say(role, message)

    @rule(role=roles, data=st.data())
    def say_something_allowed(self, role: Role, data: st.DataObject) -> None:
        allowed = [message for message in VOCABULARY if self.pair.sides[role].may_send(message)]
        if allowed:
            self.pair.say(role, data.draw(st.sampled_from(allowed)))

    @rule(sender=roles, share=st.floats(0, 1))
    def deliver(self, sender: Role, share: float) -> None:
        self.arrive(sender, share)

    def arrive(self, sender: Role, share: float) -> None:
        """Some of the bytes under way arrive, cut anywhere."""
        waiting = b"".join(self.pair.under_way[sender])
        size = round(len(waiting) * share)
        self.pair.under_way[sender] = [waiting[size:]] if size < len(waiting) else []
        receiver = self.pair.sides[other(sender)]
        if not receiver.connected:
            self.pair.under_way[sender].clear()
            return
        try:
            list(receiver.receive(waiting[:size]))
        except RemoteProtocolError:
            assert not self.faithful, self.pair.states
            self.lose()

    @rule(sender=roles, data=st.data(), reorder=st.booleans())
    def double_or_reorder(self, sender: Role, data: st.DataObject, reorder: bool) -> None:
        frames = self.pair.under_way[sender]
        if not frames:
            return
        self.faithful = False
        if reorder:
            self.pair.under_way[sender] = data.draw(st.permutations(frames))
        else:
            frames.append(data.draw(st.sampled_from(frames)))

    @rule(role=roles, what=st.sampled_from(["cut", "half-open", "crash"]))
    def break_down(self, role: Role, what: str) -> None:
        if what == "cut":
            self.lose()
        elif what == "half-open":
            self.one_side_notices(role)
        else:
            self.crash(role)

    def lose(self) -> None:
        self.pair.cut()
        self.faithful = True

    def one_side_notices(self, role: Role) -> None:
        """The other side goes on talking into the void."""
        self.pair.sides[role].connection_lost()
        self.pair.under_way[other(role)].clear()

    def crash(self, role: Role) -> None:
        """The agent is killed, and comes back with what its journal says."""
        self.one_side_notices(role)
        session = self.pair.sides[role]
        if role is Role.TARGET and session.state is State.ABORTED:
            self.pair.sides[role] = Session(role, state=State.ABORTED)  # nothing to come back to
        elif session.must_reconnect or role is Role.TARGET:
            self.pair.sides[role] = Session(role, state=session.state, hello=session.hello, ready=session.ready)

    @precondition(lambda self: self.pair.source.must_reconnect)
    @rule()
    def reconnect(self) -> None:
        """The source dials; the target lets go of what it had."""
        self.lose()
        self.pair.reconnect()

    @precondition(lambda self: self.pair.source.settled and self.pair.target.settled)
    @rule(state=st.sampled_from(STARTS))
    def begin_again(self, state: State) -> None:
        self.pair = Pair().advance(state)
        self.faithful = True

    @invariant()
    def the_guest_runs_in_at_most_one_place(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        self.lose()
        self.pair.settle()


TestLossyLink = LossyLink.TestCase
TestLossyLink.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
