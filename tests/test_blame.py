"""Blame: all waiting is charged, to those who hold the connections."""

from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import AsyncConnection

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.events import AcquireOutcome, Operation
from sidecar.observe.blame import (
    APPLICATIONS,
    FORGOTTEN,
    NOBODY,
    OTHER,
    POOL,
    UNNAMED,
    Blame,
    label_of,
)
from sidecar.observe.recorder import PoolRecorder
from sidecar.observe.statements import StatementTable
from sidecar.work import Blocker, Holder
from tests.sidecar_process import MakeService
from tests.work import blocker, gauges, holder, statement


def charge(
    blame: Blame,
    waited: float,
    holders: Sequence[Holder],
    now: float = 0.0,
    *,
    connecting: int = 0,
    blocked: dict[int, Blocker] | None = None,
) -> None:
    """Clients have waited for so much longer."""
    state = gauges(waited=0.0, holders=holders, connecting=connecting)
    blame.watch(now, blame.waited + waited, state, blocked or {})


def charged(blame: Blame) -> dict[str, float]:
    """By application, what is not 0."""
    return {name: seconds for name, seconds in blame.by_application().items() if seconds}


def test_waiting_is_shared_by_those_who_hold() -> None:
    blame = Blame()
    slow = statement(Operation.SELECT)
    charge(blame, 6.0, [holder(1, "web", slow), holder(2, "web"), holder(3, "batch", slow)])
    assert charged(blame) == {"web": 4.0, "batch": 2.0}
    assert slow.blamed == 4.0
    assert (blame.charged, blame.without_statement) == (6.0, 2.0)


def test_who_waits_for_a_lock_passes_its_share_on() -> None:
    """To the holder of the lock: one of ours with its statement, or another by its application."""
    blame, guilty, innocent = Blame(), statement(Operation.UPDATE, "a"), statement(0, "b")
    root = holder(1, "batch", guilty)
    web = [holder(n, "web", innocent) for n in (2, 3)]
    outside = blocker("psql")
    blocked = {2: blocker("ignored", root), 3: outside}
    charge(blame, 3.0, [root, *web], blocked=blocked)
    assert charged(blame) == {"batch": 2.0, "psql": 1.0}
    assert (guilty.blamed, innocent.blamed) == (2.0, 0.0)
    assert blame.without_statement == 1.0


def test_the_pool_is_charged_for_what_it_does_itself() -> None:
    blame = Blame()
    charge(blame, 4.0, [holder(1), holder(2, user="")], connecting=2)
    assert charged(blame) == {"web": 1.0, POOL: 3.0}


@pytest.mark.parametrize(("connecting", "is_up"), [(0, True), (0, False), (3, False)])
def test_nobody_is_charged_where_there_is_no_connection(connecting: int, is_up: bool) -> None:
    blame = Blame()
    blame.watch(0.0, 2.0, gauges(connecting=connecting, is_up=is_up), {})
    assert charged(blame) == {NOBODY: 2.0}


def test_holders_are_asked_for_only_where_somebody_waits() -> None:
    """Or once a second, for the series that begin at 0."""
    asked: list[float] = []
    now = 0.0

    def holders() -> list[Holder]:
        asked.append(now)
        return [holder(1, "new")]

    state = gauges(holders=[holder(1)])
    object.__setattr__(state, "holders", holders)
    blame = Blame()
    for tick in range(25):
        now = tick / 10
        blame.watch(now, 0.0, state, {})
    assert asked == [0.0, 1.0, 2.0]
    assert blame.by_application()["new"] == 0.0


def test_applications_are_bounded_and_no_series_falls_or_jumps() -> None:
    blame = Blame()
    for number in range(APPLICATIONS + 5):
        charge(blame, 1.0, [holder(1, f"app-{number}")], float(number))
    before = blame.by_application()
    assert len(before) == APPLICATIONS + 4
    assert before[OTHER] == 5.0
    now = FORGOTTEN + 0.5  # only app-0 was not seen for so long
    for name in ("late", "later"):
        charge(blame, 1.0, [holder(1, name)], now)
    after = blame.by_application()
    assert before.keys() - after.keys() == {"app-0"}
    assert after["late"] == 1.0
    assert after[OTHER] == before[OTHER] + 1.0
    for name in before.keys() & after.keys() - {OTHER}:
        assert after[name] == before[name]
    assert blame.charged == blame.waited == APPLICATIONS + 7


@pytest.mark.parametrize(
    ("application", "label"),
    [
        ("web", "web"),
        ("", UNNAMED),
        ("  ", UNNAMED),
        ("a\nb\x00\x7f", "a?b??"),
        ("x" * 100, "x" * 63),
        ("other", '"other"'),
        ("(none)", '"(none)"'),
        ("(pool)", '"(pool)"'),
        ("\u00e9\U0001f600", "\u00e9\U0001f600"),
    ],
)
def test_application_names_make_decent_labels(application: str, label: str) -> None:
    assert label_of(application) == label


def test_a_statement_that_had_to_go_is_charged_where_it_is_seen() -> None:
    """Who idles in a transaction for long is not called meanwhile, and makes room in the table."""
    table = StatementTable(limit=10)
    blame = Blame(table.charge)
    leaking = table.find("leaking", "SELECT $1", 0)
    for number in range(50):
        table.find(str(number), "SELECT $1", 0).calls += 5
    assert leaking.is_retired
    charge(blame, 3.0, [holder(1, "web", leaking)])
    assert table.ranked("blamed", 1) == [leaking]
    assert leaking.blamed == 3.0


Wait = tuple[float, float, bool]
"""Begins after so many seconds, lasts so long; whether it is served."""


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 2), st.booleans()), max_size=30),
    st.lists(st.tuples(st.floats(0.001, 0.5), st.integers(0, 3), st.integers(0, 2)), max_size=40),
)
def test_all_waiting_is_charged(waits: list[Wait], ticks: list[tuple[float, int, int]]) -> None:
    """Also what begins and ends between two ticks, or is given up; and no counter ever falls."""
    pool = PoolRecorder("main", 5.0, 0.0)
    statements = [statement(Operation.SELECT, str(n)) for n in range(3)]
    ended: set[int] = set()
    now = 0.0
    before = pool.blame.by_application()
    for step, held, connecting in [*ticks, (10.0, 1, 0)]:
        now += step
        for number, (begin, length, is_served) in enumerate(waits):
            if begin + length <= now and number not in ended:
                ended.add(number)
                outcome = AcquireOutcome.WAITED if is_served else AcquireOutcome.CANCELLED
                pool.acquired(outcome, length, 1)
        waiting = [
            now - begin
            for number, (begin, _, _) in enumerate(waits)
            if begin <= now and number not in ended
        ]
        holders = [holder(n, f"app-{n}", statements[n]) for n in range(held)]
        pool.watch(now, gauges(waited=sum(waiting), holders=holders, connecting=connecting))
        after = pool.blame.by_application()
        assert all(after[name] >= seconds for name, seconds in before.items())
        before = after
    total = sum(length for begin, length, _ in waits if begin + length <= now)
    assert len(ended) == len(waits)
    assert pool.blame.charged == pytest.approx(total)
    assert sum(before.values()) == pytest.approx(total)
    by_statement = sum(each.blamed for each in statements)
    assert by_statement + pool.blame.without_statement == pytest.approx(total)


def test_held_counts_the_leases_by_application() -> None:
    """Of this instant, not of the last tick; who has held something has a 0."""
    blame = Blame()
    assert sum(blame.held().values()) == 0
    holders = [holder(1), holder(2), holder(3, "batch"), holder(4, user=""), holder(5, "other")]
    charge(blame, 0.0, holders)
    ours = {POOL: 1, UNNAMED: 0, OTHER: 0}
    assert blame.held() == {"web": 2, "batch": 1, '"other"': 1} | ours
    charge(blame, 0.0, [holder(1, "")])
    ours = {POOL: 0, UNNAMED: 1, OTHER: 0}
    assert blame.held() == {"web": 0, "batch": 0, '"other"': 0} | ours


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=10))
def test_held_adds_up_however_many_applications_there_are(ticks: list[list[int]]) -> None:
    blame = Blame(applications=3)
    for number, applications in enumerate(ticks):
        holders = [holder(n, f"app-{each}") for n, each in enumerate(applications)]
        charge(blame, 0.0, holders, now=number * FORGOTTEN / 2)
        held = blame.held()
        assert sum(held.values()) == len(holders)
        assert len(held) <= 3 + 3


async def test_held_is_what_is_used(postgres: EmbeddedPostgres, make_service: MakeService) -> None:
    """By real clients, on the page."""
    sidecar = await make_service(postgres.dsn(), max_size=4)
    async with AsyncExitStack() as stack:
        for application in ("web", "web", "billing", ""):
            conn = await AsyncConnection.connect(sidecar.dsn(application_name=application))
            await stack.enter_async_context(conn)
            await conn.execute("SELECT 1")
        page = await sidecar.until(
            lambda now: now.total("pgsidecar_pool_connections_held") == now.used  # after a tick
        )
        held = page.above_zero("pgsidecar_pool_connections_held", "application")
        assert held == {("web",): 2, ("billing",): 1, (UNNAMED,): 1}
        assert sum(held.values()) == page.used
        assert page.value("pgsidecar_verdict", pool="main", kind="healthy") == 1
