"""The series of statements: what Prometheus makes of them is what happened."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import ErrorOrigin, Operation
from sidecar.observe.exported import LONGEST_QUERY
from sidecar.observe.metrics import statement_lines
from sidecar.observe.recorder import PoolRecorder
from sidecar.observe.statements import SLOT
from tests.work import failure

SELECT = int(Operation.SELECT)

_SAMPLE = re.compile(r'pgsidecar_(\w+)\{pool="main",fingerprint="([^"]*)".*\} (\S+)')


class Watched:
    """A pool, and a Prometheus that remembers what it has seen: ``increase`` by its rules."""

    def __init__(self, limit: int = 100, exported: int = 5) -> None:
        self.now = 0.0
        self.pool = PoolRecorder("main", 5.0, 0.0, limit=limit, exported=exported)
        self.last: dict[tuple[str, str], float] = {}  # by name and fingerprint
        self.increases: dict[tuple[str, str], float] = {}
        self.present: set[str] = set()  # fingerprints at the last scrape

    def call(self, name: str, count: int = 1, took: float = 0.001, rows: int = 0) -> None:
        for _ in range(count):
            statement = self.pool.statement(name, f"SELECT {name}", SELECT)
            statement.rows += rows
            self.pool.query_done(statement, took)

    def fail(self, name: str) -> None:
        statement = self.pool.statement(name, f"SELECT {name}", SELECT)
        self.pool.query_failed(failure(ErrorOrigin.SERVER, "23505", of=statement))
        self.pool.query_done(statement, 0.001)

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            self.pool.tick(self.now)

    def scrape(self) -> dict[str, float]:
        """The calls by fingerprint, a second after the scrape before at least."""
        self.wait(1)
        calls = {}
        self.present = set()
        for family, lines in statement_lines(self.pool).items():
            for line in lines:
                found = _SAMPLE.fullmatch(line)
                assert found is not None, line
                name, fingerprint, value = found[1], found[2], float(found[3])
                if not family.endswith("_total"):
                    continue
                self.present.add(fingerprint)
                assert value >= 0
                self._see((name, fingerprint), value)
                if name == "statement_calls_total":
                    calls[fingerprint] = value
        return calls

    def _see(self, key: tuple[str, str], value: float) -> None:
        if key in self.last:
            before = self.last[key]
            grown = value - before if value >= before else value  # a reset
            self.increases[key] = self.increases.get(key, 0) + grown
        self.last[key] = value

    def increase(self, figure: str) -> float:
        """Of all series together."""
        name = f"statement_{figure}_total"
        return sum(value for (each, _), value in self.increases.items() if each == name)


def test_the_first_scrape_has_other_at_zero():
    assert Watched().scrape() == {"other": 0}


def test_a_new_statement_begins_at_zero_and_its_first_calls_are_in_other():
    """``increase()`` would not see them: a series that begins at 7 has grown by nothing."""
    watched = Watched()
    watched.scrape()
    watched.call("a", 7)
    assert watched.scrape() == {"a": 0, "other": 7}
    watched.call("a", 3)
    assert watched.scrape() == {"a": 3, "other": 7}
    assert watched.increase("calls") == 10


def test_all_figures_of_a_statement_are_shown():
    watched = Watched()
    watched.call("a")
    watched.scrape()
    watched.call("a", 2, took=0.25, rows=3)
    watched.fail("a")
    watched.scrape()

    assert watched.last["statement_calls_total", "a"] == 3
    assert watched.last["statement_seconds_total", "a"] == pytest.approx(0.501)
    assert watched.last["statement_rows_total", "a"] == 6
    assert watched.last["statement_errors_total", "a"] == 1
    assert watched.last["statement_errors_total", "other"] == 0


def test_only_the_most_useful_have_series():
    watched = Watched(exported=3)
    for number in range(10):
        watched.call(f"{number}", number + 1)
    watched.wait(1)
    watched.scrape()
    assert watched.present == {"7", "8", "9", "other"}


@pytest.mark.parametrize("exported", [0, 1])
def test_few_or_no_series_are_allowed(exported):
    watched = Watched(exported=exported)
    watched.scrape()
    watched.call("a", 5)
    watched.call("b", 1)
    watched.scrape()
    watched.call("a", 5)
    calls = watched.scrape()
    assert calls == ({"other": 11} if exported == 0 else {"a": 5, "other": 6})


def test_who_has_series_keeps_them_until_another_is_twice_as_useful():
    """Each change is a new series in Prometheus, and a gap in a panel."""
    watched = Watched(exported=2)
    for _ in range(5):
        watched.call("a", 100)
        watched.call("b", 100)
        watched.call("c", 10)
        watched.wait(60)
        watched.scrape()
    assert watched.present == {"a", "b", "other"}
    for _ in range(5):  # a little more than b
        watched.call("a", 100)
        watched.call("b", 100)
        watched.call("c", 150)
        watched.wait(60)
        watched.scrape()
        assert watched.present == {"a", "b", "other"}
    for _ in range(10):  # far more
        watched.call("a", 100)
        watched.call("c", 500)
        watched.wait(60)
        watched.scrape()
    assert watched.present == {"a", "c", "other"}
    assert watched.increase("calls") == sum(q.count() for q in watched.pool.queries) - 210


def test_an_evicted_statement_takes_what_was_not_shown_to_other():
    watched = Watched(limit=10, exported=10)
    watched.call("a", took=0.0001)
    watched.scrape()
    watched.call("a", took=0.0001)
    assert watched.scrape()["a"] == 1
    watched.call("a", took=0.0001)  # never shown as its own
    for number in range(40):
        watched.call(f"flood {number}", took=0.01)
    calls = watched.scrape()
    assert "a" not in calls
    assert calls["other"] == 1 + 1 + 40
    watched.call("a")
    watched.wait(120)
    watched.call("a", 4)
    watched.scrape()
    assert watched.increase("calls") == sum(q.count() for q in watched.pool.queries) - 1


NAMES = [f"{number}" for number in range(12)]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from(NAMES), st.integers(1, 50)),
        st.tuples(st.just("fail"), st.sampled_from(NAMES), st.just(1)),
        st.tuples(st.just("wait"), st.just(""), st.sampled_from([1, 5, 61])),
        st.tuples(st.just("scrape"), st.just(""), st.just(1)),
    ),
    max_size=80,
)


@given(STEPS)
def test_increases_of_all_series_together_are_what_happened(steps):
    """Whoever comes, goes, is evicted or returns: nothing twice, nothing lost, ``other`` never falls."""
    watched = Watched(limit=10, exported=3)
    watched.scrape()
    rows = errors = 0
    other: dict[str, float] = {}
    for step, name, count in [*steps, ("scrape", "", 1)]:
        if step == "call":
            watched.call(name, count, took=0.001 * count, rows=2)
            rows += 2 * count
        elif step == "fail":
            watched.fail(name)
            errors += 1
        elif step == "wait":
            watched.wait(count)
        else:
            watched.scrape()
            for (family, fingerprint), value in watched.last.items():
                if fingerprint == "other":
                    assert value >= other.get(family, 0)
                    other[family] = value

    queries = watched.pool.queries
    assert watched.increase("calls") == sum(query.count() for query in queries)
    assert watched.increase("seconds") == pytest.approx(sum(query.total for query in queries))
    assert watched.increase("rows") == rows
    assert watched.increase("errors") == errors
    assert len(watched.present) <= 4


def test_quantiles_are_a_few_seconds_old_at_most():
    """They are computed between scrapes, some in a tick."""
    watched = Watched(exported=50)
    for number in range(50):
        watched.call(f"{number}", took=0.1)
    watched.wait(10)
    for number in range(50):
        watched.call(f"{number}", 10, took=0.2)
    for _ in range(80):  # as many ticks as in 8 s
        watched.now += 0.1
        watched.pool.tick(watched.now)
    lines = statement_lines(watched.pool)["pgsidecar_statement_latency_seconds"]

    assert len(lines) == 150
    for line in lines:
        assert float(line.rpartition(" ")[2]) == pytest.approx(0.2, rel=0.01)


def test_quantiles_without_samples_are_nan():
    watched = Watched()
    watched.call("a")
    watched.scrape()
    watched.wait(300 + SLOT)
    lines = statement_lines(watched.pool)["pgsidecar_statement_latency_seconds"]
    assert {line.rpartition(" ")[2] for line in lines} == {"NaN"}


def test_the_text_is_a_label_of_its_first_characters():
    pool = PoolRecorder("main", 5.0, 0.0)
    text = 'SELECT "a\\b" FROM t ' + "x" * 1000
    pool.query_done(pool.statement("0123", text, SELECT), 0.1)
    pool.tick(1.0)
    (line,) = statement_lines(pool)["pgsidecar_statement_info"]

    written = text[:LONGEST_QUERY].replace("\\", "\\\\").replace('"', '\\"')
    assert line == (
        f'pgsidecar_statement_info{{pool="main",fingerprint="0123",query="{written}"}} 1'
    )


def test_what_is_not_told_apart_stays_in_other():
    """A text that cannot be read has the fingerprint ``other`` itself: no series twice."""
    watched = Watched()
    watched.scrape()
    watched.call("other", 3)
    assert watched.scrape() == {"other": 3}
