"""Verdicts, from evidence that is made up: what is named, what is not, and how calm it stays."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.events import IncidentKind
from sidecar.observe.evidence import Evidence, Name, Settings, Share
from sidecar.observe.flight import Arrived, Failed
from sidecar.observe.judge import FIGURES, STEPS, judge
from sidecar.observe.verdict import Kind, Verdict
from sidecar.observe.wording import lasting
from sidecar.work import NO_ANSWER, Blocker, Holder, SlowQuery, Statement, Who

NOW = 1000.0
SETTINGS = Settings(server="db:5432", console="psql -h 127.0.0.1 -p 6432 -U admin pgsidecar")

REPORT = Statement("00000000000000aa", "SELECT sum(amount) FROM orders", 0)
CART = Statement("00000000000000bb", "SELECT * FROM carts WHERE id = $1", 0)
INVOICE = Statement("00000000000000cc", "UPDATE invoices SET paid = $1", 2)


def holder(
    application: str,
    statement: Statement | None = CART,
    state: str = "running",
    age: float = 0.01,
    server: int = 1,
    client: int = 1,
) -> Holder:
    who = Who(client, application, "app", "shop", "10.0.0.7:5000")
    open_since = NOW - age if state == "idle in transaction" else 0.0
    return Holder(
        "main", server, 4000 + server, who, statement, state, NOW - age, NOW - age, open_since, ""
    )


def share(
    application: str,
    statement: Statement | None,
    seconds: float,
    age: float = 0.01,
    state: str = "running",
    fresh: float = 0.0,
) -> Share:
    stale = seconds if state != "running" and age >= 1.0 else 0.0
    name = None if statement is None else Name(statement.fingerprint, statement.text)
    return Share(
        application, name, state, seconds, stale, seconds * age, fresh, 3, age * 2, client=17
    )


def evidence(**figures: object) -> Evidence:
    """A pool of 10 that is well, but for these figures."""
    well = Evidence(
        pool="main",
        seconds=10.0,
        max_size=10,
        used=4,
        idle=6,
        transactions=200.0,
        transactions_before=190.0,
        queries=300.0,
        connection_seconds=40.0,
        shares=(share("web", CART, 40.0),),
        arrivals=(0,) * 10,
        arrived_before=0.5,
        failures_before=0.1,
        quiet_for=100.0,
        now=NOW,
        settings=SETTINGS,
    )
    return replace(well, **figures)  # type: ignore[arg-type]


def full(**figures: object) -> Evidence:
    """A pool of 10 that has been full for 10 s, with 31 clients that wait."""
    crowded: dict[str, object] = {
        "used": 10,
        "idle": 0,
        "pending": 31,
        "most_pending": 35,
        "oldest_wait": 2.0,
        "longest_wait": 2.1,
        "waiting_for": 10.0,
        "quiet_for": 0.0,
        "full": 1.0,
        "connection_seconds": 100.0,
        "shares": (
            share("web", CART, 40.0),
            share("shop", INVOICE, 30.0),
            share("api", REPORT, 30.0),
        ),
    }
    return evidence(**{**crowded, **figures})


def left_open(count: int, application: str = "billing-worker", age: float = 132.0) -> list[Holder]:
    return [
        holder(application, INVOICE, "idle in transaction", age - n, n + 1, n + 17)
        for n in range(count)
    ]


def blocker(of: Holder | None, application: str = "", pid: int = 4001) -> Blocker:
    name = application or (of.who.application if of is not None else "")
    return Blocker(pid, (), "idle in transaction", "", name, "app", of is not None, of)


def slow(statement: Statement = REPORT, age: float = 6.0, *blockers: Blocker) -> SlowQuery:
    running = holder("reporting", statement, "running", age, 9, 90)
    return SlowQuery(running, age, None, "Lock:transactionid" if blockers else "", blockers)


# -- nothing is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"used": 10, "idle": 0, "full": 1.0, "connection_seconds": 100.0},  # full, and nobody waits
        {"pending": 3, "longest_wait": 0.3, "waiting_for": 0.4, "quiet_for": 0.0, "full": 1.0},
        {"pending": 3, "longest_wait": 0.05, "waiting_for": 30.0, "quiet_for": 0.0, "full": 1.0},
        {"pending": 3, "longest_wait": 0.3, "waiting_for": 30.0, "quiet_for": 0.0, "full": 0.3},
        {"longest_wait": 3.0, "waiting_for": 30.0, "quiet_for": 2.5, "full": 1.0},  # it is over
        {
            "pending": 9,
            "longest_wait": 9.0,
            "waiting_for": 9.0,
            "quiet_for": 0.0,
            "is_paused": True,
        },
        {"is_up": False, "down_for": 0.5},  # the first connection is being opened
        {"is_up": False, "down_for": 50.0, "is_paused": True},
        {"failures": 4.0, "failures_before": 0.0},
        {"failures": 40.0, "failures_before": 20.0},  # as always
        {"failures": 8.0, "failures_before": 0.0, "queries": 1000.0},  # 0.8 %
        {"arrivals": (30,) * 10},  # many clients, and room for them
        {"holders": tuple(left_open(3, age=30.0))},  # not a leak yet
    ],
    ids=str,
)
def test_calm(figures):
    """What a healthy pool goes through is not commented."""
    assert judge(evidence(**figures)).kind is Kind.HEALTHY


def test_paused_pool_is_told_as_such():
    verdict = judge(full(is_paused=True))
    assert verdict.kind is Kind.HEALTHY
    assert "paused by an administrator" in verdict.headline
    assert "'RESUME main'" in verdict.next_steps[0]


def test_command_that_nobody_may_give_is_told_as_such():
    """With console.admin_users empty, as it is by default."""
    verdict = judge(full(settings=replace(SETTINGS, has_admin=False)))
    assert all(
        "name an ADMIN in console.admin_users first" in step
        for step in verdict.next_steps
        if "psql" in step
    )
    e = full(holders=tuple(left_open(6)), settings=replace(SETTINGS, has_admin=False))
    assert "SELECT pg_terminate_backend(4001) on the server" in judge(e).next_steps[1]


def test_locks_of_a_moment_are_not_commented():
    """Without a slow query or clients that wait, they are daily business."""
    root = blocker(holder("web", CART))
    assert judge(evidence(blocked=((2, root), (3, root)))).kind is Kind.HEALTHY


# -- who holds the pool ----------------------------------------------------------------------------


def test_many_with_short_work_make_the_pool_too_small():
    verdict = judge(full())
    assert (verdict.kind, verdict.application, verdict.statement) == (Kind.POOL_TOO_SMALL, "", None)
    assert "all 10 connections are busy, 31 clients wait" in verdict.headline
    assert any("max_size (now 10)" in step for step in verdict.next_steps)
    assert any("web 40 %" in sentence for sentence in verdict.evidence)


def test_too_small_pool_names_an_application_that_is_alone_only():
    """Who has just come has held nothing yet, and waits as well."""
    alone = (share("web", CART, 100.0),)
    assert judge(full(shares=alone)).application == "web"
    shop = (Arrived("shop", "app", "10.0.0.8", 5),)
    assert judge(full(shares=alone, arrived=shop)).application == ""


def test_connections_that_are_kept_are_not_called_busy():
    """By clients of session mode, pins, or transactions with pauses below a second."""
    shares = (share("web", CART, 80.0, 60.0, "idle"), share("api", REPORT, 20.0))
    verdict = judge(full(shares=shares))
    assert verdict.kind is Kind.POOL_TOO_SMALL
    assert "clients keep its 10 connections, mostly without a query" in verdict.headline
    assert "80 %" in verdict.evidence[1]
    assert "SHOW PINS" in verdict.next_steps[0]
    verdict = judge(full(shares=shares, settings=replace(SETTINGS, mode="session")))
    assert "mode is session" in verdict.next_steps[0]
    verdict = judge(full(shares=(share("web", CART, 80.0, 0.4, "idle in transaction"),)))
    assert "other work" in verdict.next_steps[0]


def test_second_cause_is_told_besides_the_first():
    """It has too little of the pool to be the verdict, and too much to be silent about."""
    shares = (share("reporting", REPORT, 60.0, 3.0), share("web", CART, 40.0))
    busy = [holder("reporting", REPORT, age=3.0, server=n, client=n) for n in range(20, 26)]
    verdict = judge(full(shares=shares, holders=(*busy, *left_open(4))))
    assert verdict.kind is Kind.SLOW_STATEMENT
    assert verdict.evidence[1] == "Besides, billing-worker left 4 transactions open."
    behind = ((3, blocker(holder("shop"), pid=77)), (4, blocker(holder("shop"), pid=77)))
    verdict = judge(full(shares=shares, holders=tuple(busy), blocked=behind))
    assert verdict.evidence[1] == "Besides, 2 connections wait for a lock behind backend 77."
    verdict = judge(full(shares=shares, holders=(*busy, *left_open(1))))
    assert not any("Besides" in sentence for sentence in verdict.evidence)


def test_one_fast_statement_is_not_a_slow_one():
    """However often it runs."""
    verdict = judge(full(shares=(share("web", CART, 100.0, age=0.02),)))
    assert verdict.kind is Kind.POOL_TOO_SMALL


@pytest.mark.parametrize(("seconds", "age", "kind"), [
    (51.0, 0.5, Kind.SLOW_STATEMENT),
    (49.0, 0.5, Kind.POOL_TOO_SMALL),
    (51.0, 0.09, Kind.POOL_TOO_SMALL),
])  # fmt: skip
def test_slow_statement_holds_most_of_the_time_and_is_slow(seconds, age, kind):
    rest = share("web", CART, 100.0 - seconds)
    verdict = judge(full(shares=(share("reporting", REPORT, seconds, age), rest)))
    assert verdict.kind is kind
    if kind is Kind.SLOW_STATEMENT:
        assert verdict.application == "reporting"
        assert verdict.statement == Name(REPORT.fingerprint, REPORT.text)


def test_slow_statement_of_several_applications_is_told_as_that_of_the_first():
    shares = (share("one", REPORT, 35.0, 2.0), share("two", REPORT, 25.0, 2.0))
    verdict = judge(full(shares=(*shares, share("web", CART, 40.0))))
    assert (verdict.kind, verdict.application) == (Kind.SLOW_STATEMENT, "one")
    assert any("60 %" in sentence for sentence in verdict.evidence)


@pytest.mark.parametrize(("count", "age", "kind"), [
    (7, 132.0, Kind.LEAK),
    (5, 132.0, Kind.LEAK),
    (4, 132.0, Kind.POOL_TOO_SMALL),
    (7, 7.5, Kind.LEAK),
])  # fmt: skip
def test_leak_holds_most_connections(count, age, kind):
    verdict = judge(full(holders=tuple(left_open(count, age=age))))
    assert verdict.kind is kind


def test_pauses_within_a_transaction_are_no_leak():
    busy = tuple(holder("web", CART, "idle in transaction", 0.5, n) for n in range(10))
    assert judge(full(holders=busy)).kind is Kind.POOL_TOO_SMALL


def test_leak_is_told_as_a_person_would():
    verdict = judge(full(holders=tuple(left_open(7))))
    assert verdict.headline == (
        "Pool main is full because billing-worker left 7 transactions open (oldest 2 min 12 s):"
        " 31 clients wait."
    )
    assert verdict.statement == Name(INVOICE.fingerprint, INVOICE.text)
    assert any(
        "psql -h 127.0.0.1 -p 6432 -U admin pgsidecar -c 'KILL_CLIENT 17'" in step
        for step in verdict.next_steps
    )
    assert any("idle_in_transaction_timeout (now off)" in step for step in verdict.next_steps)


def test_leak_has_all_the_time_that_it_has_held():
    """From its first second, and of another lease that the application has, nothing."""
    shares = (
        share("billing-worker", INVOICE, 60.0, 0.5, "idle in transaction"),
        share("billing-worker", INVOICE, 40.0, 5.0, "idle"),
    )
    verdict = judge(full(holders=tuple(left_open(6)), shares=shares))
    assert verdict.evidence[1] == "That is 60 % of the connections' time in the last 10 s."


def test_clients_that_waited_until_just_now_are_told():
    """All of them have timed out in this instant, and the pool is as full as before."""
    gone = {"pending": 0, "quiet_for": 0.3, "most_pending": 4, "timeouts": 4}
    verdict = judge(full(holders=tuple(left_open(7)), **gone))
    assert verdict.headline.endswith(": up to 4 clients waited until just now.")


def test_nothing_is_wrong_once_a_long_wait_is_over():
    """The cause is gone and connections are free: nothing else is to be blamed for what was. But
    where waits come and go, the next one is near."""
    over = {"pending": 0, "quiet_for": 0.2, "most_pending": 8, "used": 6, "idle": 4}
    assert judge(full(**over)).kind is Kind.HEALTHY
    assert judge(full(**over, flickers=True)).kind is Kind.POOL_TOO_SMALL


def test_leak_without_clients_that_wait_is_told_once_it_counts_as_one():
    (left,) = left_open(1)
    verdict = judge(evidence(holders=(left,), leaks=(left,)), IncidentKind.LEAK)
    assert (verdict.kind, verdict.application) == (Kind.LEAK, "billing-worker")
    assert verdict.headline.startswith("In pool main billing-worker left 1 transaction open")


def test_lease_that_has_run_a_query_for_long_is_slow_rather_than_leaked():
    """The threshold for leaks is one for leases; but what it does is known."""
    running = holder("reporting", REPORT, "running", 70.0, 9, 90)
    e = evidence(holders=(running,), leaks=(running,), slow=(slow(age=70.0),))
    assert judge(e, IncidentKind.LEAK).kind is Kind.SLOW_STATEMENT


# -- the deeper cause ------------------------------------------------------------------------------


def blocked_by(root: Blocker, count: int) -> tuple[tuple[int, Blocker], ...]:
    return tuple((server, root) for server in range(2, 2 + count))


def test_lock_chain_names_its_root():
    root = blocker(holder("stock-taking", INVOICE, "idle in transaction", 12.0, 1, 17))
    verdict = judge(full(blocked=blocked_by(root, 8)))
    assert (verdict.kind, verdict.application) == (Kind.LOCK_CHAIN, "stock-taking")
    assert verdict.statement == Name(INVOICE.fingerprint, INVOICE.text)
    assert "idle in transaction for 12 s" in verdict.headline
    assert any("KILL_CLIENT 17" in step for step in verdict.next_steps)


def test_lock_chain_is_deeper_than_leak_and_slow_statement():
    """Those who wait for a lock seem slow, and who holds it seems to leak."""
    root = blocker(holder("stock-taking", INVOICE, "idle in transaction", 12.0, 1, 17))
    figures = {"shares": (share("web", CART, 90.0, 5.0),), "holders": tuple(left_open(6))}
    assert judge(full(blocked=blocked_by(root, 8), **figures)).kind is Kind.LOCK_CHAIN
    assert judge(full(**figures)).kind is Kind.LEAK
    del figures["holders"]
    assert judge(full(**figures)).kind is Kind.SLOW_STATEMENT


def test_few_locks_do_not_explain_a_full_pool():
    root = blocker(holder("stock-taking", INVOICE))
    assert judge(full(blocked=blocked_by(root, 3))).kind is Kind.POOL_TOO_SMALL


def test_root_of_the_longest_queue_counts():
    one, two = blocker(holder("one"), pid=1), blocker(holder("two"), pid=2)
    chain = (*blocked_by(one, 2), *[(server, two) for server in range(5, 11)])
    assert judge(full(blocked=chain)).application == "two"


def test_who_blocks_from_outside_is_told_what_helps_there():
    """The sidecar's options do not reach it."""
    outside = replace(blocker(None, "dba-laptop", pid=77), age=5.9)
    verdict = judge(full(blocked=tuple((n, outside) for n in range(8))))
    assert "dba-laptop holds (idle in transaction for 5.9 s, backend 77)" in verdict.headline
    steps = " ".join(verdict.next_steps)
    assert "pg_terminate_backend(77)" in steps
    assert "idle_in_transaction_session_timeout in PostgreSQL" in steps


def test_root_that_is_nobody_of_ours_is_told_by_pid():
    root = blocker(None, "psql of somebody", pid=777)
    verdict = judge(full(blocked=blocked_by(root, 9)))
    assert (verdict.kind, verdict.application) == (Kind.LOCK_CHAIN, "psql of somebody")
    assert any("pg_terminate_backend(777)" in step for step in verdict.next_steps)


def test_slow_query_behind_a_lock_is_a_lock_chain_without_anyone_waiting():
    root = blocker(holder("stock-taking", INVOICE, "idle in transaction", 12.0, 1, 17))
    verdict = judge(evidence(slow=(slow(CART, 6.0, root),)), IncidentKind.SLOW_QUERY)
    assert (verdict.kind, verdict.application) == (Kind.LOCK_CHAIN, "stock-taking")


def test_slow_query_without_anyone_waiting():
    verdict = judge(evidence(slow=(slow(),)), IncidentKind.SLOW_QUERY)
    assert (verdict.kind, verdict.application) == (Kind.SLOW_STATEMENT, "reporting")
    assert verdict.headline.startswith("A query of reporting in pool main has run for 6.0 s")


def test_database_that_is_down_explains_everything():
    root = blocker(holder("stock-taking"))
    e = full(
        is_up=False, down_for=3.0, why_down="connection refused", blocked=blocked_by(root, 9),
        failures=500.0,
    )  # fmt: skip
    verdict = judge(e)
    assert verdict.kind is Kind.DATABASE_DOWN
    assert verdict.headline == "Pool main cannot reach PostgreSQL at db:5432: connection refused."


def test_database_that_lost_connections_is_down_at_once():
    assert judge(evidence(is_up=False, down_for=0.1, lost=4)).kind is Kind.DATABASE_DOWN


def test_server_that_answers_nothing_is_down():
    """All kinds of statements run, and none ends."""
    shares = (share("web", CART, 40.0, 6.0), share("shop", INVOICE, 40.0, 6.0))
    e = full(shares=shares, connection_seconds=80.0, silent_for=6.0)
    verdict = judge(e)
    assert verdict.kind is Kind.DATABASE_DOWN
    assert "does not answer" in verdict.headline
    assert judge(replace(e, silent_for=4.0)).kind is not Kind.DATABASE_DOWN
    assert judge(replace(e, slow=(slow(),))).kind is not Kind.DATABASE_DOWN


@pytest.mark.parametrize(("cause", "kind"), [
    (NO_ANSWER, Kind.DATABASE_DOWN),
    ("the pool has diagnose: false", Kind.SLOW_STATEMENT),
    ("sorry, too many clients already", Kind.SLOW_STATEMENT),
])  # fmt: skip
def test_one_statement_that_does_not_end_is_the_server_only_if_that_says_nothing(cause, kind):
    """Not if it was not asked at all."""
    shares = (share("reporting", REPORT, 100.0, 6.0),)
    asked = replace(slow(), cause=cause)
    assert judge(full(shares=shares, silent_for=9.0, slow=(asked,))).kind is kind


def test_pool_that_the_server_keeps_small():
    """There is no use in raising max_size."""
    verdict = judge(full(used=6, refused=5, full=0.0, why_down="sorry, too many clients already"))
    assert verdict.kind is Kind.POOL_TOO_SMALL
    assert "6 of 10 connections" in verdict.headline
    assert not any("raise max_size" in step for step in verdict.next_steps)


# -- crowds and errors -----------------------------------------------------------------------------

FLEET = (Arrived("cron-fleet", "app", "10.0.0.9", 350), Arrived("web", "app", "10.0.0.7", 20))


@pytest.mark.parametrize(("arrivals", "before", "kind"), [
    ((0,) * 7 + (30, 40, 35), 0.5, Kind.CONNECTION_STORM),
    ((0,) * 8 + (30, 40), 0.5, Kind.POOL_TOO_SMALL),  # a pool of clients starts
    ((0,) * 9 + (350,), 0.5, Kind.CONNECTION_STORM),
    ((35,) * 10, 10.0, Kind.POOL_TOO_SMALL),  # always so, more or less
    ((35,) * 10, None, Kind.CONNECTION_STORM),
])  # fmt: skip
def test_storm_is_far_above_the_usual_and_lasts(arrivals, before, kind):
    verdict = judge(full(arrivals=arrivals, arrived_before=before, arrived=FLEET))
    assert verdict.kind is kind
    if kind is Kind.CONNECTION_STORM:
        assert verdict.application == "cron-fleet"
        assert any(
            "350 of them are cron-fleet, user app, from 10.0.0.9" in s for s in verdict.evidence
        )


def test_storm_explains_the_statement_that_all_newcomers_run():
    crowd = {"arrivals": (35,) * 10, "arrived": FLEET}
    assert judge(full(shares=(share("cron", CART, 90.0, 0.3),), **crowd)).kind is (
        Kind.CONNECTION_STORM
    )


def test_statement_of_seconds_is_no_storms_doing():
    """Clients that time out come back: that is the effect, not the cause."""
    crowd = {"arrivals": (35,) * 10, "arrived": FLEET}
    assert judge(full(shares=(share("cron", CART, 90.0, 3.0),), **crowd)).kind is (
        Kind.SLOW_STATEMENT
    )


def test_clients_that_are_turned_away_are_a_storm_although_nobody_waits():
    e = evidence(rejected=50.0, arrivals=(12,) * 10, arrived=FLEET)
    assert judge(e).kind is Kind.CONNECTION_STORM


def failed(times: int, application: str = "importer") -> Failed:
    return Failed("server", "23505", application, INVOICE, times, "duplicate key value")


@pytest.mark.parametrize(("rate", "before", "queries", "kind"), [
    (5.0, 0.0, 300.0, Kind.ERROR_BURST),
    (4.9, 0.0, 300.0, Kind.HEALTHY),
    (50.0, 11.0, 300.0, Kind.HEALTHY),
    (50.0, 10.0, 300.0, Kind.ERROR_BURST),
    (50.0, None, 300.0, Kind.ERROR_BURST),
    (50.0, 0.0, 6000.0, Kind.HEALTHY),
])  # fmt: skip
def test_burst_of_errors(rate, before, queries, kind):
    e = evidence(
        failures=rate, failures_before=before, queries=queries, failed=(failed(240), failed(9, "x"))
    )
    verdict = judge(e)
    assert verdict.kind is kind
    if kind is Kind.ERROR_BURST:
        assert (verdict.application, verdict.statement) == (
            "importer",
            Name(INVOICE.fingerprint, INVOICE.text),
        )
        assert "importer with 23505 (duplicate key value)" in verdict.headline
        assert f"{rate:.0f} errors per second in the last 5 s" in verdict.evidence[0]


def test_what_happened_is_looked_into_first():
    """Two things at once, and nobody waits."""
    (left,) = left_open(1)
    e = evidence(
        failures=50.0, failed=(failed(240),), slow=(slow(),), holders=(left,), leaks=(left,)
    )
    assert judge(e, IncidentKind.ERROR_BURST).kind is Kind.ERROR_BURST
    assert judge(e, IncidentKind.SLOW_QUERY).kind is Kind.SLOW_STATEMENT
    assert judge(e, IncidentKind.LEAK).kind is Kind.LEAK


# -- whatever there is -----------------------------------------------------------------------------

texts = st.sampled_from(["", "x" * 3000, "SELECT 1", "a\nb\x1b[31m\ud800"]) | st.text(max_size=5)
seconds = st.sampled_from([0.0, 0.5, 2.0, 9.0, 1e6]) | st.floats(0, 20)
counts = st.sampled_from([0, 1, 5, 100_000])
names = st.sampled_from(["", "web", "(unnamed)", "(pool)", "x" * 64, "\n\x1b[31m", "ünï"])
statements = st.none() | st.builds(Statement, st.just("00000000000000dd"), texts, st.just(0))
named = st.none() | st.builds(Name, st.just("00000000000000dd"), texts)
states = st.sampled_from(["running", "idle in transaction", "idle"])
whos = st.builds(Who, counts, texts, names, names, names)
holders = st.builds(
    Holder, st.just("main"), counts, counts, whos, statements, states, seconds, seconds, seconds,
    names,
)  # fmt: skip
blockers = st.builds(
    Blocker, counts, st.lists(counts, max_size=3).map(tuple), names, names, texts,
    names, st.booleans(), st.none() | holders,
)  # fmt: skip
slows = st.builds(
    SlowQuery, holders, seconds, st.none(), names, st.lists(blockers, max_size=3).map(tuple), names
)
shares = st.builds(
    Share, names, named, states, seconds, seconds, seconds, seconds, counts, seconds, counts
)
anything = st.builds(
    Evidence,
    pool=st.just("main"),
    seconds=st.floats(2, 10),
    max_size=st.integers(0, 1000),
    used=st.integers(0, 1000),
    pending=counts,
    oldest_wait=seconds,
    is_up=st.booleans(),
    is_paused=st.booleans(),
    why_down=texts,
    down_for=seconds,
    waiting_for=seconds,
    quiet_for=st.sampled_from([0.0, 1.0, 100.0]),
    longest_wait=seconds,
    full=st.floats(0, 1),
    timeouts=counts,
    lost=counts,
    refused=counts,
    transactions=seconds,
    transactions_before=st.none() | seconds,
    queries=seconds,
    connection_seconds=seconds,
    shares=st.lists(shares, max_size=5).map(tuple),
    arrivals=st.lists(counts, max_size=10).map(tuple),
    arrived_before=st.none() | seconds,
    rejected=seconds,
    arrived=st.lists(st.builds(Arrived, names, names, names, counts), max_size=3).map(tuple),
    failures=seconds,
    failures_before=st.none() | seconds,
    failed=st.lists(
        st.builds(Failed, st.just("server"), st.just("23505"), names, statements, counts, names),
        max_size=3,
    ).map(tuple),
    holders=st.lists(holders, max_size=5).map(tuple),
    leaks=st.lists(holders, max_size=5).map(tuple),
    blocked=st.lists(st.tuples(counts, blockers), max_size=5).map(tuple),
    slow=st.lists(slows, max_size=3).map(tuple),
    now=seconds,
)


@settings(max_examples=150, deadline=None)
@given(anything, st.none() | st.sampled_from(IncidentKind))
def test_there_is_always_a_short_verdict(e: Evidence, about: IncidentKind | None):
    verdict: Verdict = judge(e, about)
    assert 0 < len(verdict.headline) < 500
    assert verdict.headline.isprintable()
    assert len(verdict.evidence) <= FIGURES
    assert len(verdict.next_steps) <= STEPS
    assert all(0 < len(each) < 500 for each in (*verdict.evidence, *verdict.next_steps))
    assert verdict.to_json()["kind"] == verdict.kind.value


@pytest.mark.parametrize(("given", "told"), [
    (0.04, "0.0 s"), (9.94, "9.9 s"), (45.4, "45 s"), (132.0, "2 min 12 s"), (120.0, "2 min"),
    (11100.0, "3 h 5 min"), (7200.0, "2 h"),
])  # fmt: skip
def test_durations_are_told_shortly(given, told):
    assert lasting(given) == told
