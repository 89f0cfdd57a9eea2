"""One frame of ``pgsidecar top``: what is on the board, as lines of a given width.

Pure. Restrained like the demo's view: numbers with units in columns that stay where they are, red for
what is wrong. A line never wraps, and there are never more lines than the height.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from sidecar.ask import panes
from sidecar.ask.board import SORTS, Board, Pane
from sidecar.ask.panes import REST, Cell, Column, Row
from sidecar.units import age

WIDE: Final = 140
"""Columns from which a list shows more of them."""
_LEAST: Final = 6
"""Characters of a list's last column, at least."""
PLAIN_ROWS: Final = 10
"""Of each list, where there is no height to fill."""

_WEIGHTS: Final = {Pane.WAITERS: 3, Pane.HOLDERS: 4, Pane.STATEMENTS: 4, Pane.INCIDENTS: 2}
"""How the panes share the lines that are left."""
_KEYS: Final = "q quit  p pool: {pool}  s sort: {sort}  0-5 panes  arrows scroll  ? help"
_HELP: Final = """\

1 2 3 4 5       one pane: why, waiters, holders, statements, incidents
0 Esc           all of them
Tab left right  the next pane, the one before
up down         scroll the pane
p               lists of one pool, the next one, all pools
s               the next order of the statements, now by {sort}
q Ctrl-C        quit

waiters     who waits for a connection, longest first, and why
holders     who has one, oldest lease first; "in state": for how long in that
statements  since the start; P50 and P99 are of the last five minutes
            blamed: how long others waited for the connections that it held
incidents   what the flight recorder kept
red         what is wrong: a full pool with clients waiting, a server that is
            down, a leak, a lock, errors

Any key ends this help."""


def render(board: Board, width: int, height: int | None, *, has_color: bool, is_utf8: bool) -> str:
    """The frame, each line with its end. ``height`` None: as many lines as it takes."""
    lines = _lines(board, max(width, 20), height, is_utf8)
    out = io.StringIO()
    console = Console(
        file=out,
        width=10_000,  # lines are cut already
        force_terminal=has_color,
        color_system="standard" if has_color else None,
        legacy_windows=False,
        _environ={},
    )
    for line in lines[:height]:
        console.print(line, soft_wrap=True, highlight=False)
    return out.getvalue() if is_utf8 else out.getvalue().replace("…", "~")


def _lines(board: Board, width: int, height: int | None, is_utf8: bool) -> list[Text]:
    lines = [_title(board, width)]
    if board.is_helping:
        text = _HELP.format(sort=SORTS[board.sort])
        return lines + [_cut(Text(each), width) for each in text.splitlines()]
    lines += _pools(board, width, is_utf8)
    if board.pane is not Pane.WHY:
        lines += [_cut(Text(each.text, each.style), width) for each in panes.verdicts(board, width)]
    rooms = _rooms(board, None if height is None else height - len(lines) - 1)
    for pane, room in rooms.items():
        lines += _pane(board, pane, room, width)
    if height is not None:
        del lines[max(0, height - 1) :]
        lines += [Text()] * (height - 1 - len(lines))
        keys = _KEYS.format(pool=board.pool or "all", sort=SORTS[board.sort])
        lines.append(_cut(Text(keys, "dim"), width))
    return lines


def _title(board: Board, width: int) -> Text:
    title = Text(f"pgsidecar top  {board.url}", "bold")
    if board.missed:
        title.append(f"  no answer since {age(board.silent)}: {board.missed}", "red")
    return _cut(title, width)


def _pools(board: Board, width: int, is_utf8: bool) -> list[Text]:
    columns = _fitting(panes.POOLS, width)
    rows = panes.pools(board, is_utf8, columns[1][1])
    return [_head(columns, width), *(_row(columns, row, width) for row in rows)]


def _rooms(board: Board, room: int | None) -> dict[Pane, int]:
    """How many lines each pane gets, its headings included; a pane of few rows leaves its own to others."""
    if board.pane is not Pane.ALL:
        return {board.pane: room if room is not None else 10_000}
    wanted = {pane: 2 + len(board.look.items(pane)) for pane in _WEIGHTS}
    wanted = {pane: lines if lines > 2 else 1 for pane, lines in wanted.items()}
    if room is None:
        return {pane: min(lines, 2 + PLAIN_ROWS) for pane, lines in wanted.items()}
    rooms = {pane: min(lines, 1) for pane, lines in wanted.items()}
    while (left := room - sum(rooms.values())) > 0:
        hungry = [pane for pane, lines in wanted.items() if lines > rooms[pane]]
        if not hungry:
            break
        pane = min(hungry, key=lambda each: rooms[each] / _WEIGHTS[each])
        # a heading of columns without a row below it tells nothing
        rooms[pane] += min(left, 2) if rooms[pane] == 1 else 1
    return rooms


def _pane(board: Board, pane: Pane, room: int, width: int) -> list[Text]:
    if pane is Pane.WHY:
        return [_cut(Text(each.text, each.style), width) for each in panes.explained(board, width)][
            :room
        ]
    columns, make = panes.LISTS[pane]
    heading = _cut(Text(panes.heading(board, pane), "bold"), width)
    rows = list(make(board))
    if board.pane is pane:
        del rows[: board.skipped]
    if not rows or room < 3:
        return [heading][:room]
    fitting = _fitting(columns, width)
    shown = [_row(fitting, row, width) for row in rows[: room - 2]]
    return [heading, _head(fitting, width), *shown]


# -- columns ---------------------------------------------------------------------------------------

_Fitting = Sequence[tuple[Column, int]]


def _fitting(columns: Iterable[Column], width: int) -> _Fitting:
    """Each column with its width here, the last one with what is left; 0: it is left out."""
    widths = [(each, each.wide if width >= WIDE else each.narrow) for each in columns]
    taken = sum(cells + _gap(width) for _, cells in widths if cells not in (0, REST))
    # the last column says whether a server is down: others make room, the bar first, then from the right
    spare = [i for i, (each, cells) in enumerate(widths) if i and cells > 0]
    spare.sort(key=lambda i: (bool(widths[i][0].title), -i))
    while spare and width - taken < _LEAST:
        each, cells = widths[spare[0]]
        taken -= cells + _gap(width)
        widths[spare.pop(0)] = (each, 0)
    return [(each, max(0, width - taken) if cells == REST else cells) for each, cells in widths]


def _gap(width: int) -> int:
    return 2 if width >= WIDE else 1


def _head(columns: _Fitting, width: int) -> Text:
    return _row(columns, [Cell(column.title, "dim") for column, _ in columns], width)


def _row(columns: _Fitting, row: Row, width: int) -> Text:
    line = Text()
    for (column, cells), value in zip(columns, row, strict=True):
        if cells == 0:
            continue
        cell = value if isinstance(value, Cell) else Cell(value)
        text = Text(cell.text, cell.style)
        if len(line):
            line.append(" " * _gap(width))
        text.truncate(cells, overflow="ellipsis")
        text.align("right" if column.is_right else "left", cells)
        line.append_text(text)
    return _cut(line, width)


def _cut(line: Text, width: int) -> Text:
    line.rstrip()
    line.truncate(width, overflow="ellipsis")
    return line
