"""What the demo shows, from counters to the characters on the terminal: no server needed."""

import io
import re
from dataclasses import replace
from math import nan

import pytest

from sidecar.demo.figures import DemoFigures, FigureReader, PoolFigures
from sidecar.demo.view import View, plain_lines
from sidecar.events import ErrorOrigin, Operation, PinReason, PoolMode, PoolSnapshot
from sidecar.observe.recorder import Recorder
from sidecar.units import seconds
from tests.work import failure, statement

SNAPSHOT = PoolSnapshot(
    name="main",
    mode=PoolMode.TRANSACTION,
    database="shop",
    user="app",
    server="127.0.0.1:5432",
    used=5,
    idle=3,
    connecting=1,
    max_size=25,
    min_idle=5,
    pending=0,
    oldest_wait=0.0,
    waited=0.0,
    is_up=True,
    last_ping=0.0,
    queries_in_flight=0,
    longest_running_query=0.0,
    longest_idle_in_transaction=0.0,
    slow_query_threshold=5.0,
    pinned=dict.fromkeys(PinReason, 0),
    prepared_statements=0,
)
FIGURES = PoolFigures(
    name="main",
    mode="transaction",
    is_up=True,
    was_up=True,
    used=5,
    idle=3,
    connecting=0,
    max_size=25,
    waiting=0,
    oldest_wait=0.0,
    longest_idle_in_transaction=0.0,
    queries_per_second=431.4,
    errors_per_second=0.5,
    error_rate=0.0012,
    quantiles=(0.00071, 0.0123, 0.31),
    queries=1000,
    errors_by_class={"23": 1},
    slow=2,
)


class Terminal(io.StringIO):
    """Text that says it goes to a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """The lines a terminal shows after the last redraw, without colours."""
    frame = re.split(r"\x1b\[\d+F", text)[-1]
    return re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", frame).splitlines()


def show(*pools: PoolFigures, events: tuple[str, ...] = (), elapsed: float = 1.0) -> DemoFigures:
    return DemoFigures(elapsed, pools, events)


def test_rates_are_those_since_the_look_before() -> None:
    """The first look counts from the start, the second only what came since."""
    now = 100.0
    recorder = Recorder([("main", 5.0)], clock=lambda: now)
    reader = FigureReader(recorder, now)
    counted = recorder.pool("main")
    for _ in range(10):
        counted.query_done(statement(Operation.SELECT), 0.001)
    assert reader.read([SNAPSHOT], 101.0).pools[0].queries_per_second == 10
    for _ in range(6):
        counted.query_done(statement(Operation.INSERT), 0.1)
    counted.query_failed(failure(ErrorOrigin.SERVER, "23505"))
    counted.query_failed(failure(ErrorOrigin.SIDECAR, "53300"))
    counted.query_slow(statement(Operation.INSERT))
    (pool,) = reader.read([SNAPSHOT], 103.0).pools
    assert (pool.queries_per_second, pool.errors_per_second, pool.slow) == (3, 1, 1)
    assert pool.error_rate == pytest.approx(2 / 6)
    assert pool.quantiles[0] == pytest.approx(0.001, rel=0.01)
    assert pool.quantiles[2] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("before", "after", "event"),
    [
        ({}, {}, None),
        ({}, {"used": 25, "pending": 3}, "main: 25 of 25 used, 3 clients waiting"),
        ({"pending": 1}, {}, "main: nobody waits any more"),
        ({}, {"is_up": False}, "main: PostgreSQL is down"),
        ({"is_up": False}, {}, "main: PostgreSQL is back"),
        (
            {"longest_idle_in_transaction": 4.9},
            {"longest_idle_in_transaction": 5.9},
            "main: a transaction is open and idle for 6 s: forgotten?",
        ),
    ],
)
def test_change_is_an_event(
    before: dict[str, object], after: dict[str, object], event: str | None
) -> None:
    """Once, when it begins or ends; not as long as it lasts."""
    reader = FigureReader(Recorder([("main", 5.0)], clock=lambda: 0.0), 0.0)
    reader.read([SNAPSHOT], 0.5)
    reader.read([replace(SNAPSHOT, **before)], 1.0)  # type: ignore[arg-type]  # from the table
    changed = replace(SNAPSHOT, **after)  # type: ignore[arg-type]  # from the table
    assert reader.read([changed], 2.0).events == ((event,) if event else ())
    assert reader.read([changed], 3.0).events == ()


def test_first_connection_is_no_event() -> None:
    """The pool connects when the demo begins: nothing was down, nothing is back."""
    reader = FigureReader(Recorder([("main", 5.0)], clock=lambda: 0.0), 0.0)
    for number, is_up in enumerate([False, False, True]):
        assert reader.read([replace(SNAPSHOT, is_up=is_up)], number).events == ()


def test_failed_query_is_an_event_with_its_class() -> None:
    recorder = Recorder([("main", 5.0)], clock=lambda: 0.0)
    reader = FigureReader(recorder, 0.0)
    reader.read([SNAPSHOT], 1.0)
    recorder.pool("main").query_failed(failure(ErrorOrigin.SERVER, "22012"))
    assert reader.read([SNAPSHOT], 2.0).events == ("main: 1 query failed, SQLSTATE 22...",)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00 ms"),
        (0.00071, "0.71 ms"),
        (0.0123, "12 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (5.52, "5.5 s"),
        (nan, "-"),
    ],
)
def test_durations_have_a_fitting_unit(value: float, shown: str) -> None:
    assert seconds(value) == shown


def test_terminal_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second frame begins where the first did, and the cursor is given back."""
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    view = View(out, {})
    view.show(show(FIGURES))
    first = out.getvalue()
    assert first.startswith("\x1b[?25l")
    view.show(show(replace(FIGURES, used=7), events=("main: something",)))
    assert out.getvalue()[len(first) :].startswith(f"\x1b[{first.count(chr(10))}F")
    assert screen(out.getvalue()) == [
        "pgsidecar demo  0:01  (P50 to P99: last minute)  Ctrl-C stops it",
        "main    [███████▒▒▒···············]  7 used  3 idle of 25  0 waiting",
        "  431 queries/s  P50 0.71 ms  P90 12 ms  P99 310 ms  0.12% errors  2 slow",
        "   1.0 s  main: something",
    ]
    view.close()
    view.close()
    assert out.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("used", "waiting", "color"), [(19, 0, "32"), (20, 0, "33"), (25, 0, "33"), (25, 1, "31")]
)
def test_bar_is_colored_by_saturation(used: int, waiting: int, color: str) -> None:
    """Yellow from 80 %, where the alert is; red only when somebody waits for it."""
    out = Terminal()
    View(out, {}).show(show(replace(FIGURES, used=used, idle=0, waiting=waiting)))
    assert f"\x1b[{color}m[{'█' * used}" in out.getvalue()


def test_no_color_is_honoured() -> None:
    out = Terminal()
    View(out, {"NO_COLOR": "1"}).show(show(replace(FIGURES, used=25, waiting=3, is_up=False)))
    assert not re.search(r"\x1b\[\d*m", out.getvalue())


@pytest.mark.parametrize("max_size", [1, 3, 24, 25, 26, 1000])
def test_bar_has_a_cell_for_whatever_is_used(
    max_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell a connection up to 25, then in proportion; never empty when one is in use."""
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    pool = replace(FIGURES, max_size=max_size, used=1, idle=0)
    View(out, {}).show(show(pool))
    bar = screen(out.getvalue())[1][8:35].rstrip()
    assert bar == f"[█{'·' * (min(max_size, 25) - 1)}]"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_lines_never_wrap(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapped line is two on the screen: the next redraw would start too low."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "5")
    out = Terminal()
    busy = replace(FIGURES, used=25, waiting=117, oldest_wait=29.9, queries_per_second=12345.0)
    view = View(out, {})
    view.show(show(busy, busy, busy, events=("x" * 200,)))
    assert all(len(line) < columns for line in screen(out.getvalue()))
    assert len(screen(out.getvalue())) < 5


def test_without_a_terminal_a_line_every_two_seconds() -> None:
    """For logs and pipes: no escape sequence, events at once, figures every other look."""
    out = io.StringIO()
    view = View(out, {})
    for number in range(1, 6):
        events = ("main: something",) if number == 4 else ()
        view.show(show(FIGURES, elapsed=number * 1.001, events=events))
    view.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1.0", "3.0", "4.0", "5.0"]
    assert "\x1b" not in out.getvalue()
    assert lines[0] == (
        "   1.0 s  main: 5/25 used, 3 idle, 0 waiting, 431 queries/s,"
        " P50 0.71 ms, P90 12 ms, P99 310 ms, 0.5 errors/s (0.12%), 2 slow"
    )


def test_quiet_pools_have_no_line() -> None:
    """Except the first: the line is the sign of life."""
    quiet = replace(FIGURES, used=0, queries_per_second=0.0)
    assert len(plain_lines(show(quiet, quiet))) == 1
    assert len(plain_lines(show(quiet, replace(quiet, is_up=False)))) == 2
