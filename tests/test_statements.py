"""The table of statements: quantiles, what is kept, what makes room, and that nothing is lost."""

import gc
import math
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import config_file
from sidecar.events import ErrorOrigin, Operation
from sidecar.observe.recorder import PoolRecorder
from sidecar.observe.sketch import BUCKETS, HIGHEST, LOWEST, RELATIVE_ERROR
from sidecar.observe.statements import (
    LONGEST_TEXT,
    MOST,
    OTHER_SQLSTATE,
    SLOT,
    SLOTS,
    SORTS,
    StatementTable,
)
from sidecar.service import Service
from sidecar.work import OTHER_STATEMENT, Statement, Trace
from tests.sidecar_process import configuration
from tests.work import failure

QUANTILES = (0.5, 0.9, 0.99)
ROUNDING = 1e-9  # of the floats, at the very edge of a bucket
SELECT = int(Operation.SELECT)

durations = st.floats(LOWEST, HIGHEST) | st.builds(lambda exp: 10.0**exp, st.floats(-6, 3.5))


def make(limit: int = 10) -> PoolRecorder:
    return PoolRecorder("main", 5.0, 0.0, limit=limit)


def find(pool: PoolRecorder, name: str | int) -> Statement:
    return pool.statement(f"{name}", f"SELECT {name}", SELECT)


def call(pool: PoolRecorder, name: str | int, took: float = 0.001, rows: int = 0) -> Statement:
    """A text that nobody has cached."""
    statement = find(pool, name)
    statement.rows += rows
    pool.query_done(statement, took)
    return statement


def flood(pool: PoolRecorder, count: int, first: int = 0) -> None:
    """Statements that come once and never again."""
    for number in range(first, first + count):
        call(pool, f"flood {number}", 0.0005)


def nearest_rank(samples: list[float], quantile: float) -> float:
    return sorted(samples)[max(1, math.ceil(quantile * len(samples))) - 1]


# -- figures ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 40), durations), min_size=1, max_size=60))
def test_a_quantile_of_the_window_is_at_most_one_percent_off(steps):
    """Against sorted samples, with pauses of any length; a sample counts for as long as its slot."""
    pool = make()
    now = 0.0
    seen: list[tuple[float, float]] = []
    for pause, took in steps:
        now += pause
        pool.tick(now)
        seen.append((now, took))
        call(pool, "a", took)
    found, samples = pool.statements.quantiles(find(pool, "a"), now)

    alive = [took for at, took in seen if now - at < SLOT * (SLOTS - 1)]
    most = [took for at, took in seen if now - at <= SLOT * SLOTS]
    assert len(alive) <= samples <= len(most)
    alive = [took for _, took in seen[len(seen) - samples :]]
    for value, quantile in zip(found, QUANTILES, strict=True):
        true = nearest_rank(alive, quantile)
        assert abs(value - true) / true <= RELATIVE_ERROR + ROUNDING


def test_a_long_tail_over_all_slots_is_at_most_one_percent_off():
    """20,000 lognormal durations around 4 ms, from the hot path to the quantiles."""
    seed = random.Random(7)
    samples = [seed.lognormvariate(math.log(0.004), 1.2) for _ in range(20_000)]
    pool = make()
    for number, took in enumerate(samples):
        if number % 10 == 0:
            pool.tick(295.0 * number / len(samples))
        call(pool, "a", took)
    found, count = pool.statements.quantiles(find(pool, "a"), 295.0)

    assert count == len(samples)
    for value, quantile in zip(found, QUANTILES, strict=True):
        true = nearest_rank(samples, quantile)
        assert abs(value - true) / true <= RELATIVE_ERROR


def test_a_statement_that_rests_forgets_within_five_minutes_and_keeps_nothing():
    pool = make()
    statement = call(pool, "a", 0.25)
    pool.tick(269.0)
    assert pool.statements.quantiles(statement, 269.0)[1] == 1

    found, samples = pool.statements.quantiles(statement, 300.0)
    assert samples == 0
    assert all(map(math.isnan, found))
    (kept,) = pool.statements.kept()
    assert not kept._slots
    assert statement.calls == 1  # what is counted for ever


def test_quantiles_of_a_statement_that_is_not_kept_are_nan():
    found, samples = make().statements.quantiles(Statement("x", "SELECT 1", SELECT), 0.0)
    assert samples == 0
    assert all(map(math.isnan, found))


def test_a_day_without_a_tick_forgets_everything_at_once():
    pool = make()
    statement = call(pool, "a")
    pool.tick(1e9)
    assert pool.statements.quantiles(statement, 1e9)[1] == 0
    call(pool, "a")
    assert pool.statements.quantiles(statement, 1e9 + SLOT - 1)[1] == 1


def test_figures_are_those_of_the_calls():
    pool = make()
    statement = call(pool, "a", 0.1, rows=3)
    call(pool, "a", 0.4, rows=2)
    pool.query_failed(failure(ErrorOrigin.SERVER, "23505", of=statement))

    assert (statement.calls, statement.rows, statement.errors) == (2, 5, {"23505": 1})
    assert statement.seconds == pytest.approx(0.5)
    assert statement.longest == 0.4
    assert pool.statements.failures == 1


def test_an_execution_with_a_trace_counts_for_its_statement():
    pool = make()
    statement = find(pool, "a")
    execution = Statement("a", "SELECT a", SELECT, statement, Trace("1" * 32, "2" * 16))
    execution.rows += 7
    pool.query_failed(failure(ErrorOrigin.SERVER, "57014", of=execution))
    pool.query_done(execution, 0.1)

    assert (statement.calls, statement.rows, statement.errors) == (1, 7, {"57014": 1})
    assert pool.statements.quantiles(statement, 0.0)[1] == 1
    assert pool.statements.rows() == 7


def test_sqlstates_that_functions_invent_are_not_all_told_apart():
    """RAISE takes any five characters: of one statement, 16 are kept."""
    pool = make()
    statement = find(pool, "a")
    for number in range(1000):
        pool.query_failed(failure(ErrorOrigin.SERVER, f"U{number:04}", of=statement))

    assert len(statement.errors) == 17
    assert statement.errors[OTHER_SQLSTATE] == 984
    assert sum(statement.errors.values()) == pool.statements.failures == 1000


@pytest.mark.parametrize("sort", SORTS)
def test_ranked_begins_with_the_most(sort):
    pool = make()
    low, high = call(pool, "low", 0.1), call(pool, "high", 0.2, rows=5)
    call(pool, "high", 0.2)
    find(pool, "never called")
    pool.query_failed(failure(ErrorOrigin.SERVER, "23505", of=high))
    high.blamed = 3.0

    assert pool.statements.ranked(sort, 10) == [high, low]
    assert pool.statements.ranked(sort, 1) == [high]


# -- what is kept ----------------------------------------------------------------------------------


def test_a_full_table_evicts_a_tenth_at_once_and_counts_it():
    pool = make(limit=100)
    flood(pool, 100)
    assert (len(pool.statements), pool.statements.evicted) == (100, 0)
    flood(pool, 1, first=100)
    assert (len(pool.statements), pool.statements.evicted) == (91, 10)


@pytest.mark.parametrize("took", [0.0005, 0.1])
def test_a_flood_of_one_off_statements_pushes_nothing_useful_out(took):
    """100,000 texts that come once, and 60 statements called now and again: these are all there."""
    pool = make(limit=100)
    for second in range(100):
        pool.tick(float(second))
        for number in range(60):
            if (second + number) % 5 == 0:  # every five seconds, 1 ms
                call(pool, f"useful {number}")
        for number in range(1000):
            call(pool, f"{second} {number}", took if second == 50 and number < 20 else 0.0005)

    kept = [pool.statements.get(f"useful {number}") for number in range(60)]
    assert all(kept)
    assert len(pool.statements) <= 100
    # since the first seconds, in which nobody could know
    assert min(each.calls for each in kept if each) >= 15


def test_what_was_useful_an_hour_ago_makes_room():
    pool = make(limit=10)
    for number in range(10):
        call(pool, f"old {number}", 10.0)
    now = 0.0
    while now < 3600:
        now += 1
        pool.tick(now)
    for _ in range(20):
        for number in range(9):
            call(pool, f"new {number}", 0.01)

    assert all(pool.statements.get(f"new {number}") for number in range(9))


def test_a_statement_that_comes_back_in_a_flood_finds_a_place():
    """It is evicted at first, as all are that were called once; its weight is remembered."""
    pool = make(limit=100)
    for number in range(80):
        for _ in range(1000):
            call(pool, f"heavy {number}")
    evicted = 0
    for round in range(50):
        is_there = pool.statements.get("young") is not None
        evicted += round > 0 and not is_there
        call(pool, "young", 0.0005)
        flood(pool, 40, first=round * 40)

    assert evicted < 10
    young = pool.statements.get("young")
    assert young is not None
    assert young.calls > 40


def test_a_retired_statement_is_back_with_its_next_call():
    """A prepared statement holds it: the hot path counts into it, wherever it is."""
    pool = make(limit=10)
    prepared = call(pool, "prepared", 0.0001, rows=2)
    flood(pool, 100)
    assert [prepared.is_retired] == [True]
    assert (prepared.calls, prepared.rows) == (0, 0)
    assert pool.statements.get("prepared") is None

    prepared.rows += 5
    pool.query_done(prepared, 0.001)
    assert pool.statements.get("prepared") is prepared
    assert [prepared.is_retired] == [False]
    assert (prepared.calls, prepared.rows) == (1, 5)


def test_calls_of_a_retired_statement_go_to_the_one_that_has_its_place():
    """Its text has come anew meanwhile; two prepared statements may hold one each for days."""
    pool = make(limit=10)
    before = call(pool, "a", 0.0001)
    flood(pool, 100)
    now = call(pool, "a")
    assert now is not before

    before.rows += 3
    pool.query_failed(failure(ErrorOrigin.SERVER, "40001", of=before))
    pool.query_done(before, 0.2)
    execution = Statement("a", "SELECT a", SELECT, before, Trace("1" * 32, "2" * 16))
    execution.rows += 4
    pool.query_done(execution, 0.3)

    assert (before.calls, before.rows) == (0, 0)
    assert (now.calls, now.rows, now.errors) == (3, 7, {"40001": 1})
    assert now.longest == 0.3


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=200))
def test_nothing_is_lost_whoever_is_evicted(calls):
    """Half of the callers hold the statement that they once found, the others look it up anew."""
    pool = make(limit=10)
    held = {number: find(pool, number) for number in range(0, 30, 2)}
    for number, rows in calls:
        statement = held.get(number) or find(pool, number)
        statement.rows += rows
        pool.query_done(statement, 0.001)

    assert pool.statements.rows() == sum(rows for _, rows in calls)
    assert sum(query.count() for query in pool.queries) == len(calls)
    assert len(pool.statements) <= 10
    for kept in pool.statements.kept():
        assert not kept.statement.is_retired


def test_what_is_not_told_apart_has_its_operation_and_takes_no_place():
    """Where too many new texts come at once, they are ``other``; they count as what they are."""
    pool = make(limit=10)
    for operation in Operation:
        other = pool.statement(OTHER_STATEMENT, "", int(operation))
        other.rows += 2
        pool.query_done(other, 0.001)
        pool.query_failed(failure(ErrorOrigin.SERVER, "23505", of=other))
    flood(pool, 100)

    assert [query.count() for query in pool.queries][1:] == [1] * (len(Operation) - 1)
    assert pool.statements.get(OTHER_STATEMENT) is None
    assert pool.statements.rows() == 2 * len(Operation)
    assert pool.statements.failures == len(Operation)
    assert not pool.statement(OTHER_STATEMENT, "", SELECT).is_retired


# -- memory ----------------------------------------------------------------------------------------


def grown(pool: PoolRecorder, count: int) -> int:
    """The bytes that so many one-off statements leave behind."""
    tracemalloc.start()
    flood(pool, 2000)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    flood(pool, count, first=2000)
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before


def test_twenty_thousand_one_off_statements_take_no_memory():
    """What ghosts and slots remember included: less than a byte for each of them."""
    pool = make(limit=500)
    assert grown(pool, 20_000) < 20_000
    assert len(pool.statements) <= 500
    assert pool.statements.evicted >= 21_500


def test_the_memory_of_a_statement_is_bounded():
    """Every bucket in use in every slot, the longest text in the widest script, SQLSTATEs at random."""
    count = 20
    table = StatementTable(count)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        table.find(f"{number}", "\U0001f418" * 20_000, SELECT)
    for slot in range(SLOTS):
        for _ in range(count):  # some are finished in a tick
            table.tick(slot * SLOT)
        for number in range(count):
            statement = table.find(f"{number}", "", SELECT)
            for bucket in range(BUCKETS):
                statement.recent[bucket] = 1000 + bucket  # no number that Python has already
            for state in range(20):
                table.failed(statement, f"{slot}{state:04}")
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    first = table.find("0", "", SELECT)
    assert len(first.text) == LONGEST_TEXT
    (samples,) = {table.quantiles(table.find(f"{n}", "", SELECT), 271.0)[1] for n in range(count)}
    assert samples > 1000 * BUCKETS * SLOTS
    assert 0.5 * MOST < taken / count < MOST


# -- options ---------------------------------------------------------------------------------------


def test_the_bounds_are_options():
    """``statements.limit`` and ``statements.exported``, for pools of now and of later."""
    text = configuration(
        "postgresql://app@127.0.0.1:1/app", statements={"limit": 20, "exported": 3}
    )
    recorder = Service(config_file.parse(text, {}, "test")).recorder
    recorder.config_read([("main", 5.0), ("later", 5.0)])
    for name in ("main", "later"):
        pool = recorder.pool(name)
        flood(pool, 100)
        assert (pool.statements.limit, len(pool.statements)) == (20, 20)
        pool.tick(recorder.clock() + 5)
        assert len(pool.exported) == pool.exported.limit == 3
