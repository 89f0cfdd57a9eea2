"""The table of failures: what is one entry, what is kept of it, and that it is bounded."""

from sidecar.events import ErrorOrigin
from sidecar.observe.failures import LIMIT, FailureTable
from sidecar.observe.recorder import Recorder
from tests.work import failure, statement

SERVER, NETWORK = ErrorOrigin.SERVER, ErrorOrigin.NETWORK


def test_failures_are_told_apart_and_counted() -> None:
    table = FailureTable()
    select, other = statement(0, "a"), statement(0, "b")
    table.note(failure(SERVER, "23505", "first", "web", select), 1.0)
    table.note(failure(NETWORK, "08006", "lost", "web", select), 2.0)
    table.note(failure(SERVER, "23505", "last", "web", select), 3.0)
    table.note(failure(SERVER, "23505", "", "batch", select), 4.0)
    table.note(failure(SERVER, "23505", "", "web", other), 5.0)
    table.note(failure(SERVER, "23503", "", "web", select), 6.0)
    table.note(failure(SERVER, "42601", "", ""), 7.0)
    assert len(table) == 6
    entry = next(each for each in table.entries() if each.message == "last")
    assert (entry.origin, entry.sqlstate, entry.application) == ("server", "23505", "web")
    assert (entry.count, entry.first_at, entry.last_at) == (2, 1.0, 3.0)
    assert entry.statement is select
    assert [each.last_at for each in table.entries()] == [7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert table.entries()[0].application == "(unnamed)"


def test_the_table_is_bounded_by_who_was_not_seen_for_longest() -> None:
    table = FailureTable(limit=3)
    for number in range(3):
        table.note(failure(SERVER, "23505", application=f"app-{number}"), float(number))
    table.note(failure(SERVER, "23505", application="app-0"), 3.0)
    table.note(failure(SERVER, "23505", application="app-3"), 4.0)
    assert [each.application for each in table.entries()] == ["app-3", "app-0", "app-2"]
    assert table.evicted == 1


def test_hostile_clients_do_not_make_it_grow() -> None:
    """By application names, or by SQLSTATEs that a function raises."""
    table = FailureTable()
    for number in range(10 * LIMIT):
        table.note(failure(SERVER, f"{number:05d}", application=f"{number}" * 100), 0.0)
    assert len(table) == LIMIT
    assert table.evicted == 9 * LIMIT
    assert max(len(each.application) for each in table.entries()) <= 63


def test_failures_of_a_pool_are_noted_with_their_time() -> None:
    recorder = Recorder([("main", 5.0)], clock=lambda: 100.0)
    recorder.tick(101.0)
    recorder.pool("main").query_failed(failure(SERVER, "23505"))
    (entry,) = recorder.pool("main").failures.entries()
    assert (entry.first_at, entry.count) == (101.0, 1)
