"""Who waits for whom, from rows of the server's answer: circles, cut chains, words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.pool import chains
from sidecar.work import Blocker, Holder, Statement, Who

NOBODY_OURS = lambda pid: (False, None)  # noqa: E731


def row(pid: int, *by: int, **told: str | None) -> list[bytes | None]:
    """As the server says it of a backend that waits for these."""
    fields: dict[str, str | None] = {
        "there": "t",
        "hidden": "f",
        "kind": "Lock" if by else None,
        "event": "tuple" if by else None,
        "state": "active",
        "application": f"app {pid}",
        "user": "u",
        "address": "10.0.0.1:5",
        "age": "1.5",
        "by": "{" + ",".join(map(str, by)) + "}" if by else None,
        **told,
    }
    return [None if each is None else each.encode() for each in (str(pid), *fields.values())]


def pids(chain: tuple[Blocker, ...]) -> list[int]:
    return [each.backend_pid for each in chain]


def chain(pid: int, *rows: list[bytes | None]) -> tuple[Blocker, ...]:
    return chains.blockers(pid, chains.backends(rows), NOBODY_OURS)


def test_nearest_first_and_each_once():
    found = chain(1, row(1, 2, 3), row(2, 4), row(3, 4), row(4))
    assert pids(found) == [2, 3, 4]
    assert chains.root(found).backend_pid == 4


def test_circle_ends():
    """A deadlock before deadlock_timeout: the asked one is no blocker of its own."""
    found = chain(1, row(1, 2), row(2, 3), row(3, 1, 2))
    assert pids(found) == [2, 3]
    assert chains.root(found).backend_pid == 3


def test_blocker_that_the_answer_lacks_is_the_end_of_the_chain():
    (found,) = chain(1, row(1, 9))
    assert (found.backend_pid, found.waits_for, found.state) == (9, (), "")
    assert "state not told" in chains.describe((found,), "main", 0.0)


def test_worker_of_a_parallel_query_counts_once():
    """``pg_blocking_pids`` names the leader for each of its workers."""
    assert pids(chain(1, row(1, 2, 2, 2), row(2))) == [2]


def test_backend_without_blockers_has_no_chain():
    assert chain(1, row(1)) == ()
    assert chain(2, row(1)) == ()


def test_words_for_ours_without_a_client_and_for_many():
    found = chains.blockers(
        1, chains.backends([row(1, *range(2, 15))]), lambda pid: (pid == 2, None)
    )
    words = chains.describe(found, "main", 0.0).split(" <- ")
    assert words[0] == 'pid 2 application="" user=, of this sidecar, its client is gone'
    assert (len(words), words[-1]) == (9, "5 more")


def test_long_statements_and_odd_names_stay_one_short_line():
    statement = Statement("0" * 16, "SELECT " + "x, " * 500, 0)
    who = Who(7, 'a" <- pid 1\n', "app", "main", "10.0.0.9:1")
    holder = Holder("other", 3, 2, who, statement, "running", 1.0, 2.0, 1.0, "")
    found = chains.blockers(1, chains.backends([row(1, 2), row(2)]), lambda _: (True, holder))
    words = chains.describe(found, "main", 5.0)
    assert words.startswith(
        'pid 2 application="a\\" <- pid 1\\n" user=app 10.0.0.9:1 pool=other running for 3.0 s,'
        " statement 0000000000000000: SELECT x, x"
    )
    assert words.endswith("...")
    assert len(words) < 400
    assert "\n" not in words


@pytest.mark.parametrize(
    "rows",
    [
        [[b"1"]],
        [row(1)[:-1]],
        [[None, *row(1)[1:]]],
        [[b"one", *row(1)[1:]]],
        [row(1, age="soon")],
        [row(1, age="\xff")],
        [row(1, by="{" + "9" * 5000 + "}")],
    ],
)
def test_answer_that_is_none_is_refused(rows: list[list[bytes | None]]):
    with pytest.raises(ValueError):  # noqa: PT011  whatever is wrong
        chains.backends(rows)


@given(st.dictionaries(st.integers(1, 12), st.lists(st.integers(0, 12), max_size=4), max_size=12))
def test_any_graph_ends_and_names_nobody_twice(graph: dict[int, list[int]]):
    known = chains.backends([row(pid, *by) for pid, by in graph.items()])
    for pid in graph:
        found = pids(chains.blockers(pid, known, NOBODY_OURS))
        assert len(set(found)) == len(found)
        assert pid not in found
        assert {*graph[pid]} - {pid} <= set(found)
