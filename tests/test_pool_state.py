"""The pool's decisions, by any sequence of events: what must hold, holds after each of them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from sidecar.pool.state import ConnectionState, PoolState

CONNECTING, IDLE, ACTIVE, CHECKING, CLOSING = ConnectionState

ALLOWED = {
    CONNECTING: {IDLE, ACTIVE, CLOSING},
    IDLE: {ACTIVE, CHECKING, CLOSING},
    ACTIVE: {IDLE, CHECKING, CLOSING},
    CHECKING: {IDLE, ACTIVE, CLOSING},
    CLOSING: set(),
}
"""By the design: what is told to go does not come back, and nobody connects twice."""


class Connection:
    def __init__(self) -> None:
        self.state = CONNECTING


class Waiter:
    def __init__(self, now: float, patience: float) -> None:
        self.waiting_since = now
        self.deadline = now + patience


State = PoolState[Connection, Waiter]


def contents(state: State) -> tuple[list[list[Connection]], list[Waiter]]:
    """All collections, in order."""
    return [list(connections) for connections in state.by_state], list(state.waiters)


class AnyEvents(RuleBasedStateMachine):
    """A pool, and beside it what a reader of its documentation would expect."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[Connection, ConnectionState] = {}
        self.queue: list[Waiter] = []
        self.now = 0.0

    connections = Bundle("connections")

    @initialize(
        max_size=st.integers(1, 6), min_idle=st.integers(0, 6), max_waiting=st.integers(0, 3)
    )
    def create(self, max_size: int, min_idle: int, max_waiting: int) -> None:
        self.state = State(max_size, min(min_idle, max_size), max_waiting)

    # connections

    @precondition(lambda self: self.state.size < self.state.max_size)
    @rule(target=connections)
    def add(self) -> Connection:
        connection = Connection()
        self.state.add(connection)
        self.open[connection] = CONNECTING
        return connection

    @rule(target=connections)
    def grow(self):
        """As the pool does: all that is missing."""
        made = [Connection() for _ in range(self.state.missing())]
        for connection in made:
            self.state.add(connection)
            self.open[connection] = CONNECTING
        assert self.state.missing() == 0
        return multiple(*made)

    @precondition(lambda self: self.state.size == self.state.max_size)
    @rule()
    def add_to_a_full_pool(self) -> None:
        before = contents(self.state)
        with pytest.raises(AssertionError):
            self.state.add(Connection())
        assert contents(self.state) == before

    @rule(connection=connections, to=st.sampled_from(ConnectionState))
    def move(self, connection: Connection, to: ConnectionState) -> None:
        if connection not in self.open:
            return
        before = contents(self.state)
        if to in ALLOWED[self.open[connection]]:
            self.state.move(connection, to)
            self.open[connection] = to
        else:
            with pytest.raises(ValueError, match=f"from {connection.state.name} to {to.name}"):
                self.state.move(connection, to)
            assert contents(self.state) == before

    @rule(connection=connections)
    def give_back(self, connection: Connection) -> None:
        if self.open.get(connection) is ACTIVE:
            self.state.give_back(connection)
            self.open[connection] = IDLE
            assert list(self.state.idle)[-1] is connection

    @rule(connection=consumes(connections))
    def remove(self, connection: Connection) -> None:
        assert self.state.remove(connection) == (connection in self.open)
        self.open.pop(connection, None)
        before = contents(self.state)
        assert not self.state.remove(connection)
        assert contents(self.state) == before

    # waiters

    @rule(patience=st.sampled_from([10.0, 0.1, 3.3]))
    def acquire(self, patience: float) -> None:
        """The most recently used connection, but not before those who wait."""
        idle = list(self.state.idle)
        taken = self.state.take_idle()
        if idle and not self.queue:
            assert taken is idle[-1]
            self.open[taken] = ACTIVE
            return
        assert taken is None
        is_full = self.state.max_waiting and len(self.queue) >= self.state.max_waiting
        assert self.state.can_wait() is not is_full
        if not is_full:
            waiter = Waiter(self.now, patience)
            self.state.enqueue(waiter)
            self.queue.append(waiter)

    @rule()
    def serve(self) -> None:
        first = self.queue.pop(0) if self.queue else None
        assert self.state.next_waiter() is first

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.queue))
        assert self.state.abandon(waiter)
        self.queue.remove(waiter)
        assert not self.state.abandon(waiter)

    @rule(passed=st.floats(0, 15), most=st.integers(1, 3))
    def time_passes(self, passed: float, most: int) -> None:
        """Each has its own patience, so that those behind may be overdue first."""
        self.now += passed
        while overdue := [waiter for waiter in self.queue if waiter.deadline <= self.now]:
            assert self.state.overdue(self.now, most) == overdue[:most]
            self.queue = [waiter for waiter in self.queue if waiter not in overdue[:most]]
        assert self.state.overdue(self.now, most) == []

    # what must hold

    @invariant()
    def each_connection_is_where_its_state_says(self) -> None:
        for state, connections in zip(ConnectionState, self.state.by_state, strict=True):
            assert set(connections) == {c for c, known in self.open.items() if known is state}
            assert all(connection.state is state for connection in connections)

    @invariant()
    def the_counts_are_those_of_the_collections(self) -> None:
        closing = sum(state is CLOSING for state in self.open.values())
        connecting = sum(state is CONNECTING for state in self.open.values())
        assert self.state.size == len(self.open) <= self.state.max_size
        assert self.state.established == len(self.open) - closing - connecting

    @invariant()
    def waiters_are_in_the_order_of_their_coming(self) -> None:
        assert list(self.state.waiters) == self.queue

    @invariant()
    def what_is_missing_has_room_and_a_use(self) -> None:
        missing = self.state.missing()
        room = self.state.max_size - self.state.size
        serving = sum(state in (CONNECTING, IDLE, CHECKING) for state in self.open.values())
        assert 0 <= missing <= room
        assert missing == min(room, max(0, max(len(self.queue), self.state.min_idle) - serving))

    @invariant()
    def surplus_leaves_the_minimum(self) -> None:
        surplus = self.state.surplus()
        assert 0 <= surplus <= len(self.state.idle)
        assert not surplus or len(self.state.idle) - surplus == self.state.min_idle


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("state", ConnectionState)
@pytest.mark.parametrize("to", ConnectionState)
def test_moves_are_those_of_the_table(state: ConnectionState, to: ConnectionState) -> None:
    """Every pair, also those that chance leaves out."""
    pool = State(max_size=1, min_idle=0, max_waiting=0)
    connection = Connection()
    pool.add(connection)
    if state is CHECKING:
        pool.move(connection, IDLE)
    if state is not CONNECTING:
        pool.move(connection, state)
    if to in ALLOWED[state]:
        pool.move(connection, to)
        assert connection.state is to
    else:
        with pytest.raises(ValueError, match="cannot go"):
            pool.move(connection, to)
        assert connection.state is state
        assert connection in pool.by_state[state]


def test_repr_tells_the_counts() -> None:
    """What a developer sees in a debugger, and in a failed assertion of the tests."""
    pool = State(max_size=3, min_idle=0, max_waiting=0)
    pool.add(Connection())
    pool.enqueue(Waiter(0, 1.0))
    assert repr(pool) == (
        "<PoolState connecting=1 idle=0 active=0 checking=0 closing=0 waiting=1 max=3>"
    )
