"""The lists of ``pgsidecar top``: which columns each has, and its rows made from the answers.

Pure. A column has a width on a narrow terminal and one on a wide one (0: left out there), so that figures
stay where they are from frame to frame; the last column takes the rest.
"""

from collections.abc import Iterator, Sequence
from math import nan
from textwrap import wrap
from typing import Final, NamedTuple

from sidecar.ask.answers import Entry
from sidecar.ask.board import SORTS, Board, Pane
from sidecar.ask.why import headline, is_healthy
from sidecar.units import age, count, rate, seconds

WRONG: Final = "red"
_FULL: Final = "yellow"
_WELL: Final = "green"
_ASIDE: Final = "dim"

REST: Final = -1

LONG: Final = 1.0
"""Seconds of waiting from which on it is wrong: the alert's threshold."""
HIGH: Final = 0.8
"""Saturation from which the bar is yellow; the alert's threshold."""


class Column(NamedTuple):
    title: str
    narrow: int
    wide: int
    is_right: bool = False


class Cell(NamedTuple):
    text: str
    style: str = ""


Row = Sequence[str | Cell]

POOLS: Final = (
    Column("pool", 10, 16),
    Column("", 8, 25),  # the bar
    Column("used", 7, 7, True),
    Column("waiting", 7, 7, True),
    Column("oldest", 7, 7, True),
    Column("query/s", 7, 7, True),
    Column("P50", 7, 7, True),
    Column("P99", 7, 7, True),
    Column("err/s", 5, 6, True),
    Column("leaks", 0, 5, True),
    Column("pins", 0, 5, True),
    Column("in flight", 0, 9, True),
    Column("longest", 0, 7, True),
    Column("", REST, REST),  # what else there is to tell
)


def pools(board: Board, has_blocks: bool, cells: int) -> Iterator[Row]:
    """``cells``: the width of the bar."""
    for pool in board.look.pools:
        name = pool.text("name")
        latency = board.look.details.get(name, Entry()).entry("latency")
        waiting = pool.whole("waiting")
        errors = board.rate(name, "errors_total")
        is_chosen = not board.pool or board.pool == name
        yield (
            Cell(name, "" if is_chosen else _ASIDE),
            Cell(_bar(pool, cells, has_blocks), _color(pool)),
            f"{pool.whole('used')}/{pool.whole('max_size')}",
            Cell(str(waiting), WRONG if waiting else ""),
            Cell(age(pool.number("oldest_wait_seconds")), WRONG) if waiting else "-",
            rate(board.rate(name, "queries_total")),
            seconds(latency.number("p50_seconds")),
            seconds(latency.number("p99_seconds")),
            Cell(rate(errors), WRONG if errors > 0 else ""),
            Cell(count(pool.number("leaked")), WRONG if pool.whole("leaked") else ""),
            count(pool.number("pinned")),
            count(pool.number("queries_in_flight")),
            age(pool.number("longest_query_seconds") or nan),
            _state(pool),
        )


def _state(pool: Entry) -> Cell:
    if pool.flag("is_paused"):
        return Cell("paused", _FULL)
    if not pool.flag("is_up"):
        return Cell("DOWN", WRONG)
    return Cell("disabled", _FULL) if pool.flag("is_disabled") else Cell("up")


def _bar(pool: Entry, cells: int, has_blocks: bool) -> str:
    """Used, idle (with those being opened) and free places, in proportion."""
    full, half, empty = "█▒·" if has_blocks else "#=."
    size = max(1, pool.whole("max_size"))
    idle = pool.whole("idle") + pool.whole("connecting")
    taken = min(cells, -(-pool.whole("used") * cells // size))  # rounded up: one in use is seen
    ready = min(cells - taken, -(-idle * cells // size))
    return full * taken + half * ready + empty * (cells - taken - ready)


def _color(pool: Entry) -> str:
    if pool.whole("waiting") and pool.whole("used") >= pool.whole("max_size"):
        return WRONG
    return _FULL if pool.number("saturation") >= HIGH else _WELL


# -- lists -----------------------------------------------------------------------------------------

WAITERS: Final = (
    Column("pool", 8, 12),
    Column("waited", 7, 7, True),
    Column("left", 7, 7, True),
    Column("ahead", 5, 5, True),
    Column("application", 16, 24),
    Column("user", 0, 12),
    Column("client", 0, 21),
    Column("why", REST, REST),
)


def _waiters(board: Board) -> Iterator[Row]:
    for wait in board.look.items(Pane.WAITERS):
        who, waited = wait.entry("who"), wait.number("waited_seconds")
        yield (
            wait.text("pool"),
            Cell(age(waited), WRONG if waited >= LONG else ""),
            age(wait.number("timeout_seconds")),
            str(wait.whole("ahead")),
            _application(who),
            who.text("user"),
            who.text("address"),
            wait.text("reason"),
        )


HOLDERS: Final = (
    Column("pool", 8, 12),
    Column("held", 7, 7, True),
    Column("in state", 8, 8, True),
    Column("state", 10, 10),
    Column("application", 16, 24),
    Column("user", 0, 12),
    Column("client", 0, 21),
    Column("pid", 0, 7, True),
    Column("statement", REST, REST),
)
_STATES: Final = {"idle in transaction": "idle in tx"}


def _holders(board: Board) -> Iterator[Row]:
    for holder in board.look.items(Pane.HOLDERS):
        who, state = holder.entry("who"), holder.text("state")
        note, wrong = _note(holder)
        text = holder.entry("statement").text("text")
        yield (
            holder.text("pool"),
            Cell(age(holder.number("held_seconds")), wrong),
            age(holder.number("state_seconds")),
            Cell(_STATES.get(state, state), wrong),
            _application(who),
            who.text("user"),
            who.text("address"),
            str(holder.whole("backend_pid")),
            Cell(f"{note}: {text}" if note else text, wrong),
        )


def _note(holder: Entry) -> tuple[str, str]:
    """What is to be known before the statement, and its style."""
    blocker = holder.entry("blocked_by")
    if blocker:
        name = _application(blocker.entry("who")) if blocker.entry("who") else ""
        name = name or blocker.text("application") or "?"
        return f"[locked by {name}, pid {blocker.whole('backend_pid')}]", WRONG
    if holder.flag("is_leak"):
        return "[leak]", WRONG
    pin = holder.text("pin")
    return (f"[pin: {pin}]" if pin else ""), ""


STATEMENTS: Final = (
    Column("pool", 0, 12),
    Column("fingerprint", 0, 16),
    Column("calls", 7, 7, True),
    Column("total", 7, 7, True),
    Column("mean", 7, 7, True),
    Column("P50", 0, 7, True),
    Column("P99", 7, 7, True),
    Column("longest", 0, 7, True),
    Column("rows", 0, 7, True),
    Column("errors", 6, 6, True),
    Column("blamed", 7, 7, True),
    Column("statement", REST, REST),
)


def _statements(board: Board) -> Iterator[Row]:
    for statement in board.look.items(Pane.STATEMENTS):
        latency = statement.entry("latency")
        errors = statement.number("errors_total")
        blamed = statement.number("blamed_wait_seconds_total")
        yield (
            statement.text("pool"),
            statement.text("fingerprint"),
            count(statement.number("calls_total")),
            age(statement.number("seconds_total")),
            seconds(statement.number("mean_seconds")),
            seconds(latency.number("p50_seconds")),
            seconds(latency.number("p99_seconds")),
            age(statement.number("longest_seconds")),
            count(statement.number("rows_total")),
            Cell(count(errors), WRONG if errors > 0 else ""),
            age(blamed) if blamed else "-",
            statement.text("text"),
        )


INCIDENTS: Final = (
    Column("began (UTC)", 14, 14),
    Column("pool", 8, 12),
    Column("begun by", 14, 16),
    Column("verdict", REST, REST),
)


def _incidents(board: Board) -> Iterator[Row]:
    for incident in board.look.items(Pane.INCIDENTS):
        began = incident.text("began_at")[5:19].replace("T", " ")
        verdict = incident.entry("verdict")
        is_going_on = not incident.text("ended_at")
        yield (
            Cell(began, "" if is_going_on else _ASIDE),
            incident.text("pool"),
            incident.text("kind").replace("_", " "),
            Cell(
                verdict.text("headline") or verdict.text("kind").replace("_", " "),
                WRONG if is_going_on else "",
            ),
        )


def _application(who: Entry) -> str:
    return who.text("application") or f"({who.text('user')})"


LISTS: Final = {
    Pane.WAITERS: (WAITERS, _waiters),
    Pane.HOLDERS: (HOLDERS, _holders),
    Pane.STATEMENTS: (STATEMENTS, _statements),
    Pane.INCIDENTS: (INCIDENTS, _incidents),
}

_EMPTY: Final = {
    Pane.WAITERS: "nobody waits",
    Pane.HOLDERS: "no connection is in use",
    Pane.STATEMENTS: "no statement has run",
    Pane.INCIDENTS: "nothing has happened",
}


def heading(board: Board, pane: Pane) -> str:
    """What the list shows, of which pool, and how many there are."""
    total = board.look.total(pane)
    of = f" of {board.pool}" if board.pool else ""
    if not total:
        return f"{pane.name.lower()}{of}: {_EMPTY[pane]}"
    by = f" by {SORTS[board.sort]}" if pane is Pane.STATEMENTS else ""
    return f"{pane.name.lower()}{of}{by}: {total}"


# -- verdicts --------------------------------------------------------------------------------------


def verdicts(board: Board, width: int) -> Iterator[Cell]:
    """For each pool with something wrong a line; for a single one two, and its most telling figure."""
    wrong = [each for each in board.look.verdicts if not is_healthy(each[1])]
    if not wrong:
        yield Cell("healthy", _WELL)
    for pool, verdict in wrong:
        told = headline(pool, verdict)
        if len(wrong) > 1:
            yield Cell(told, WRONG)
            continue
        for line in _wrapped(told, width, "", most=2):
            yield Cell(line, WRONG)
        for line in verdict.texts("evidence")[:1]:
            yield Cell(f"  {line}")


def explained(board: Board, width: int) -> Iterator[Cell]:
    """All of each verdict."""
    for pool, verdict in board.look.verdicts:
        if board.pool and board.pool != pool:
            continue
        style = _WELL if is_healthy(verdict) else WRONG
        yield from (Cell(line, style) for line in _wrapped(headline(pool, verdict), width, ""))
        for text in verdict.texts("evidence"):
            yield from (Cell(line) for line in _wrapped(text, width, "  "))
        for text in verdict.texts("next_steps"):
            yield from (Cell(line) for line in _wrapped(f"next: {text}", width, "  "))


def _wrapped(text: str, width: int, indent: str, most: int | None = None) -> list[str]:
    return wrap(
        text,
        max(width, len(indent) + 10),
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        max_lines=most,
        placeholder="…",
    )
