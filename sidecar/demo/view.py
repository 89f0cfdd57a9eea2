"""The demo's view: redrawn in place on a terminal, else a line every two seconds.

Owns: layout, colours and the terminal's state. Does not own: the figures (``figures``). Colours only
on a terminal, and not with ``NO_COLOR`` set (no-color.org).
"""

import os
import shutil
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from sidecar.demo.figures import DemoFigures, PoolFigures
from sidecar.units import seconds

BAR = 25  # cells: one for each connection of the default pool
HIGH = 0.8  # saturation from which the bar is yellow; the alert's threshold
LINE_EVERY = 2.0  # seconds between two lines where there is no terminal
EVENTS = 4  # shown on the terminal

_GREEN, _YELLOW, _RED, _DIM, _BOLD = "32", "33", "31", "2", "1"
SHOW_CURSOR = "\x1b[?25h"
_HIDE_CURSOR = "\x1b[?25l"
_TO_START_OF_LINE_ABOVE, _CLEAR_BELOW = "\x1b[{}F", "\x1b[J"


class View:
    """Shows ``DemoFigures``. ``close()`` gives the terminal back as it was; a second is harmless."""

    def __init__(self, out: TextIO, environ: Mapping[str, str] = os.environ) -> None:
        self._out = out
        self._redraws = out.isatty() and environ.get("TERM") != "dumb"
        self._has_color = self._redraws and not environ.get("NO_COLOR")
        has_blocks = "utf" in (out.encoding or "").lower()
        self._full, self._half, self._empty = ("█", "▒", "·") if has_blocks else ("#", "=", ".")
        self._drawn = 0  # lines of ours above the cursor
        self._next_line = 0.0
        self._events: deque[str] = deque(maxlen=EVENTS)

    def show(self, figures: DemoFigures) -> None:
        events = [f"{figures.elapsed:6.1f} s  {event}" for event in figures.events]
        if self._redraws:
            self._events.extend(events)
            self._draw(figures)
            return
        for event in events:
            self._out.write(f"{event}\n")
        # half a look early rather than late: looks are not exactly a second apart
        if figures.elapsed >= self._next_line - 0.5:
            self._next_line = figures.elapsed + LINE_EVERY
            for line in plain_lines(figures):
                self._out.write(f"{line}\n")
        self._out.flush()

    def close(self) -> None:
        if self._drawn:
            self._out.write(SHOW_CURSOR)
            self._out.flush()
            self._drawn = 0

    def _draw(self, figures: DemoFigures) -> None:
        # one column less: a line that fills the last one wraps on some terminals
        width, height = (size - 1 for size in shutil.get_terminal_size())
        title = (
            f"pgsidecar demo  {_clock(figures.elapsed)}  (P50 to P99: last minute)  Ctrl-C stops it"
        )
        lines = [self._paint(_BOLD, title)]
        for pool in figures.pools:
            lines += self._pool(pool)
        lines += [self._paint(_DIM, event) for event in self._events]
        del lines[height:]  # what has scrolled out cannot be redrawn
        above = _TO_START_OF_LINE_ABOVE.format(self._drawn) if self._drawn else _HIDE_CURSOR
        text = "".join(f"{_cut(line, width)}\x1b[K\n" for line in lines)
        self._out.write(above + text + _CLEAR_BELOW)
        self._out.flush()
        self._drawn = len(lines)

    def _pool(self, pool: PoolFigures) -> list[str]:
        bar = self._paint(_color(pool), self._bar(pool))
        state = "" if pool.is_up else self._paint(_RED, "  DOWN")
        waiting = f"{pool.waiting} waiting"
        if pool.waiting:
            waiting = self._paint(_RED, f"{waiting} ({seconds(pool.oldest_wait)})")
        p50, p90, p99 = map(seconds, pool.quantiles)
        line = f"{pool.name:<8}{bar} {pool.used:>2} used {pool.idle:>2} idle of {pool.max_size}"
        if not pool.queries:
            return [f"{line}  {waiting}{state}"]
        return [
            f"{line}  {waiting}{state}",
            f"  {pool.queries_per_second:.0f} queries/s  P50 {p50}  P90 {p90}  P99 {p99}"
            f"  {pool.error_rate:.2%} errors  {pool.slow} slow",
        ]

    def _bar(self, pool: PoolFigures) -> str:
        """Used, idle (with those being opened) and free places; one cell each up to 25."""
        cells = min(pool.max_size, BAR)
        used = -(-pool.used * cells // pool.max_size)  # rounded up: one in use is seen
        idle = min(cells - used, -(-(pool.idle + pool.connecting) * cells // pool.max_size))
        drawn = self._full * used + self._half * idle + self._empty * (cells - used - idle)
        return f"[{drawn}]".ljust(BAR + 2)

    def _paint(self, style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._has_color else text


def _color(pool: PoolFigures) -> str:
    if pool.is_full and pool.waiting:
        return _RED
    return _YELLOW if pool.saturation >= HIGH else _GREEN


def plain_lines(figures: DemoFigures) -> list[str]:
    """A line for the first pool and for each other that has something to tell."""
    return [
        f"{figures.elapsed:6.1f} s  {_plain(pool)}"
        for number, pool in enumerate(figures.pools)
        if number == 0 or pool.used or pool.waiting or pool.queries_per_second or not pool.is_up
    ]


def _plain(pool: PoolFigures) -> str:
    p50, p90, p99 = map(seconds, pool.quantiles)
    oldest = f" (oldest {seconds(pool.oldest_wait)})" if pool.waiting else ""
    return (
        f"{pool.name}{'' if pool.is_up else ' DOWN'}: {pool.used}/{pool.max_size} used, {pool.idle} idle,"
        f" {pool.waiting} waiting{oldest}, {pool.queries_per_second:.0f} queries/s,"
        f" P50 {p50}, P90 {p90}, P99 {p99},"
        f" {pool.errors_per_second:.1f} errors/s ({pool.error_rate:.2%}), {pool.slow} slow"
    )


def _clock(elapsed: float) -> str:
    minutes, rest = divmod(int(elapsed), 60)
    return f"{minutes}:{rest:02}"


def _cut(line: str, width: int) -> str:
    """The first ``width`` visible characters; colour codes take no room and are kept."""
    shown, visible, position = [], 0, 0
    while position < len(line):
        end = position + 1
        if line[position] == "\x1b":
            end = line.index("m", position) + 1
        elif visible == width:
            position = end
            continue
        else:
            visible += 1
        shown.append(line[position:end])
        position = end
    return "".join(shown)
