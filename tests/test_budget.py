"""One budget for many pools, by any sequence of events: who gets the next connection.

The pools here are real in what they decide (``PoolState``); connections open, close and are released
when the test says so, and time passes when it says so.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sidecar.pool.budget import GRACE, PATIENCE, Budget
from sidecar.pool.state import ConnectionState, PoolState

CONNECTING, IDLE, ACTIVE, CHECKING, CLOSING = ConnectionState


ALARMS: list[tuple[object, float]] = []
"""When which budget wants to be asked again."""


class Connection:
    def __init__(self, pool: "Pool") -> None:
        self.state = CONNECTING
        self.status_since = 0.0
        self.pool = pool

    def __repr__(self) -> str:
        return f"<{self.state.name.lower()} of {self.pool.name}>"


class Waiter:
    def __init__(self, now: float) -> None:
        self.waiting_since = now
        self.deadline = now + 1000.0


class Pool:
    """As ``pool.Pool`` calls state and budget, without its sockets."""

    def __init__(self, name: str, budget: "Budget[Connection, Pool]", min_idle: int = 0) -> None:
        self.name = name
        self.budget = budget
        self.state: PoolState[Connection, Waiter] = PoolState(budget.limit, min_idle, 0)
        self.is_refused = False  # a backoff runs
        self.served: list[Waiter] = []

    def __repr__(self) -> str:
        return f"<{self.name} {self.state!r}>"

    def waits_since(self) -> float | None:
        first = next(iter(self.state.waiters), None)
        return None if first is None else first.waiting_since

    def wanted(self, now: float) -> int:
        return 0 if self.is_refused else self.state.missing()

    # as Pool.acquire, release, lost ...

    def acquire(self, now: float) -> None:
        connection = self.state.take_idle()
        if connection is None:
            self.state.enqueue(Waiter(now))
            self.share(now)

    def release(self, connection: Connection, now: float) -> None:
        if self.budget.yields(self, now):
            self.state.move(connection, CLOSING)
        else:
            self.hand_over(connection, now)
            if connection.state is IDLE:
                share(self.budget, now)

    def hand_over(self, connection: Connection, now: float) -> None:
        waiter = self.state.next_waiter()
        if waiter is None:
            connection.status_since = now
            self.state.move(connection, IDLE)
            return
        self.served.append(waiter)
        if connection.state is not ACTIVE:
            self.state.move(connection, ACTIVE)

    def opened(self, connection: Connection, now: float) -> None:
        self.hand_over(connection, now)
        self.share(now)

    def gone(self, connection: Connection, now: float) -> None:
        self.state.remove(connection)
        self.budget.remove(connection)
        self.share(now)

    def share(self, now: float) -> None:
        if self.waits_since() is not None or self.wanted(now):
            self.budget.asks(self)
        share(self.budget, now)


def share(budget: "Budget[Connection, Pool]", now: float) -> None:
    plan = budget.share(now)
    for pool in plan.opening:
        connection = Connection(pool)
        pool.state.add(connection)
        budget.add(connection, pool)
    if plan.again is not None:
        assert plan.again > now
        ALARMS.append((budget, plan.again))
    for pool, connection in plan.closing:
        assert connection.state is IDLE, "only who works for nobody is told to go"
        pool.state.move(connection, CLOSING)


class ManyPools(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    @initialize(
        limit=st.integers(1, 5),
        idle=st.lists(st.integers(0, 1), min_size=2, max_size=5),
    )
    def create(self, limit: int, idle: list[int]) -> None:
        self.budget: Budget[Connection, Pool] = Budget(limit)
        self.pools = [
            Pool(f"pool {number}", self.budget, min(limit, least))
            for number, least in enumerate(idle)
        ]
        for pool in self.pools:
            pool.share(0.0)

    def all(self, *states: ConnectionState) -> list[Connection]:
        return [c for pool in self.pools for state in states for c in pool.state.by_state[state]]

    def draw(self, data: st.DataObject, *states: ConnectionState) -> Connection:
        return data.draw(st.sampled_from(self.all(*states)))

    @rule(which=st.integers(0, 4), crowd=st.integers(1, 4))
    def clients_ask(self, which: int, crowd: int) -> None:
        for _ in range(crowd):
            self.pools[which % len(self.pools)].acquire(self.now)

    @rule(which=st.integers(0, 4))
    def client_gives_up(self, which: int) -> None:
        state = self.pools[which % len(self.pools)].state
        if state.waiters:
            state.abandon(next(reversed(state.waiters)))

    @rule(took=st.sampled_from([0.001, GRACE, PATIENCE / 2, PATIENCE, 1.0]))
    def time_passes(self, took: float) -> None:
        """With no janitor: an alarm is enough for nobody to be forgotten."""
        end = self.now + took
        while due := [at for budget, at in ALARMS if budget is self.budget and at <= end]:
            self.now = max(self.now, min(due))
            ALARMS.remove((self.budget, min(due)))
            share(self.budget, self.now)
        self.now = end

    @precondition(lambda self: self.all(CONNECTING))
    @rule(data=st.data())
    def connection_opens(self, data: st.DataObject) -> None:
        connection = self.draw(data, CONNECTING)
        connection.pool.opened(connection, self.now)

    @precondition(lambda self: self.all(CONNECTING))
    @rule(data=st.data())
    def connection_is_refused(self, data: st.DataObject) -> None:
        connection = self.draw(data, CONNECTING)
        connection.pool.is_refused = True
        connection.pool.gone(connection, self.now)

    @rule()
    def backoff_ends(self) -> None:
        for pool in self.pools:
            pool.is_refused = False
        share(self.budget, self.now)

    @precondition(lambda self: self.all(ACTIVE))
    @rule(data=st.data())
    def lease_ends(self, data: st.DataObject) -> None:
        connection = self.draw(data, ACTIVE)
        connection.pool.release(connection, self.now)

    @precondition(lambda self: self.all(CLOSING, IDLE, ACTIVE))
    @rule(data=st.data())
    def connection_ends(self, data: st.DataObject) -> None:
        connection = self.draw(data, CLOSING, IDLE, ACTIVE)
        connection.pool.gone(connection, self.now)

    # what must hold

    @invariant()
    def budget_is_kept(self) -> None:
        if hasattr(self, "budget"):
            there = sum(pool.state.size for pool in self.pools)
            assert there == self.budget.used <= self.budget.limit

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Where somebody waits, no room is left unused, and a connection that has been idle for a
        moment only if enough others are about to end."""
        if not hasattr(self, "budget"):
            return
        needs = sum(pool.wanted(self.now) for pool in self.pools if pool.state.waiters)
        if not needs:
            return
        assert self.budget.room == 0, "there is room, and somebody waits"
        idle = [c for c in self.all(IDLE) if not c.pool.state.waiters]
        if needs <= len(self.all(CLOSING)):
            return
        assert all(self.now - c.status_since < GRACE for c in idle), "an idle one, and one waits"
        assert not idle or any(budget is self.budget for budget, _ in ALARMS), "a lost wake-up"

    def teardown(self) -> None:
        """Everybody is served in the end, as long as connections open, close and are released."""
        if not hasattr(self, "budget"):
            return
        self.backoff_ends()
        for _ in range(1000):
            if not any(pool.state.waiters for pool in self.pools):
                return
            self.now += PATIENCE / 3
            for connection in self.all(CLOSING):
                connection.pool.gone(connection, self.now)
            for connection in self.all(CONNECTING):
                connection.pool.opened(connection, self.now)
            for connection in self.all(ACTIVE):
                connection.pool.release(connection, self.now)
            share(self.budget, self.now)
        raise AssertionError(f"they wait for ever: {self.pools}")


def test_any_events():
    run_state_machine_as_test(
        ManyPools, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_pool_starves_while_others_are_busy(limit: int):
    """Two pools whose clients come back at once never leave their connections idle, and a third
    with one client gets one nevertheless."""
    budget: Budget[Connection, Pool] = Budget(limit)
    busy, busier, quiet = (Pool(name, budget) for name in ("busy", "busier", "quiet"))
    pools = [busy, busier, quiet]
    now = 0.0
    for pool in [busy, busier] * 10:
        pool.acquire(now)
    waits: list[float] = []
    for step in range(2000):
        now += 0.002
        if step % 100 == 50:
            quiet.acquire(now)
        for pool in pools:
            states = pool.state.by_state
            for connection in list(states[CLOSING]):
                pool.gone(connection, now)
            for connection in list(states[CONNECTING]):
                pool.opened(connection, now)
            for connection in list(states[ACTIVE]):
                pool.release(connection, now)
                if pool is not quiet:
                    pool.acquire(now)
        first = next(iter(quiet.state.waiters), None)
        if first is not None:
            waits.append(now - first.waiting_since)
    # with one connection the others have their turns first
    assert max(waits) <= (2.5 if limit == 1 else 1.0) * PATIENCE + 0.05
    assert len(quiet.served) > 10
    # the two share what there is: neither has less than a third of it
    done = [len(pool.served) for pool in (busy, busier)]
    assert min(done) > sum(done) / 3, done
    # and the connections are used more than they are replaced
    assert sum(done) > 600, done


def test_a_client_that_comes_back_soon_finds_its_connection():
    """Two clients who pause for 1 ms between queries of 1 ms take turns of some length: a turn each
    query would be a login each query."""
    budget: Budget[Connection, Pool] = Budget(1)
    pools = [Pool("one", budget), Pool("two", budget)]
    opened = 0
    for step in range(2000):
        now = step * 0.001
        for pool in pools:
            states = pool.state.by_state
            for connection in list(states[CLOSING]):
                pool.gone(connection, now)
            for connection in list(states[CONNECTING]):
                opened += 1
                pool.opened(connection, now)
            if step % 2:
                for connection in list(states[ACTIVE]):
                    pool.release(connection, now)
            elif not pool.state.active and not pool.state.waiters:
                pool.acquire(now)
        share(budget, now)
    one, two = (len(pool.served) for pool in pools)
    assert opened < 2.0 / PATIENCE * 1.5
    assert abs(one - two) <= 2, "turns are equal"


def test_the_longest_idle_connection_goes():
    budget: Budget[Connection, Pool] = Budget(3)
    one, two, three = (Pool(name, budget) for name in ("one", "two", "three"))
    for pool in (one, two, one):
        pool.acquire(0.0)
        (connection,) = pool.state.by_state[CONNECTING]
        pool.opened(connection, 0.0)
    for pool, now in ((two, 1.0), (one, 2.0)):
        for connection in list(pool.state.active):
            pool.release(connection, now)
    three.acquire(4.0)
    assert [c.pool for c in [*one.state.by_state[CLOSING], *two.state.by_state[CLOSING]]] == [two]


def test_one_closing_connection_is_enough_for_one_who_waits():
    """What is on its way is not asked for again, with each release."""
    budget: Budget[Connection, Pool] = Budget(3)
    full, other = Pool("full", budget), Pool("other", budget)
    for _ in range(3):
        full.acquire(0.0)
    for connection in list(full.state.by_state[CONNECTING]):
        full.opened(connection, 0.0)
    other.acquire(1.0)
    for connection in list(full.state.active):
        full.release(connection, 2.0)
    assert len(full.state.by_state[CLOSING]) == 1
    assert len(full.state.idle) == 2


def test_a_pool_that_is_refused_keeps_no_room():
    """While its backoff runs, others have the place."""
    budget: Budget[Connection, Pool] = Budget(1)
    refused, other = Pool("refused", budget), Pool("other", budget)
    refused.acquire(0.0)
    other.acquire(1.0)
    (attempt,) = refused.state.by_state[CONNECTING]
    refused.is_refused = True
    refused.gone(attempt, 2.0)
    assert len(other.state.by_state[CONNECTING]) == 1


def test_idle_connections_are_kept_from_what_is_left_over():
    """``min_idle`` takes nothing from clients that wait, and no idle connection of another pool."""
    budget: Budget[Connection, Pool] = Budget(2)
    one, two, three = (Pool(name, budget, min_idle=1) for name in ("one", "two", "three"))
    for pool in (one, two, three):
        pool.share(0.0)
    assert [len(pool.state.by_state[CONNECTING]) for pool in (one, two, three)] == [1, 1, 0]
    for pool in (one, two):
        for connection in list(pool.state.by_state[CONNECTING]):
            pool.opened(connection, 1.0)
    share(budget, 2.0)
    assert [len(pool.state.idle) for pool in (one, two, three)] == [1, 1, 0]
    (first,) = one.state.idle
    one.gone(first, 3.0)
    assert budget.used == 2
