"""Which statements of a pool have series of their own in ``/metrics``, and what these say.

Pure. The most useful ones have; the others together are ``other``. Who is among them changes rarely: once
a minute, and only for one that is twice as useful. Series are counters for ``increase()``, which does
not see what a series has when it begins, and must not see it twice:

- The series of a statement begin at 0 with the first scrape that shows them; what its figures were by
  then is subtracted. So the calls before, the first ones of a new statement too, are in ``other``.
- ``other`` is the total of the pool less all that series of statements have ever shown. It never falls,
  and does not jump when a statement comes or goes.
- A statement that comes back begins at 0 again, which is a reset as any restart is.

Lines are written but for their numbers when a statement comes, some in a tick; its quantiles are computed
in ticks, too: a scrape of 50 statements reads what is there.
"""

from collections.abc import Iterator
from heapq import nlargest
from typing import Final

from sidecar.observe.exposition import number_or_nan, prefix
from sidecar.observe.sketch import QUANTILES
from sidecar.observe.statements import CALL, Kept, StatementTable, errors_of
from sidecar.work import OTHER_STATEMENT

EXPORTED: Final = 50
LONGEST_QUERY: Final = 200
"""Characters of the label ``query``."""

_COUNTERS: Final = tuple(
    f"pgsidecar_statement_{figure}_total" for figure in ("calls", "seconds", "errors", "rows")
)
_LATENCY: Final = "pgsidecar_statement_latency_seconds"
_INFO: Final = "pgsidecar_statement_info"

_FAMILIES: Final = (*_COUNTERS, _LATENCY, _INFO)

Lines = dict[str, list[str]]
"""Sample lines by family."""

Figures = tuple[int, float, int, int]
"""In the order of ``_COUNTERS``."""

_LOOK: Final = 1.0  # s between looks for statements that may come
_REVIEW: Final = 60.0  # s between reviews of who should go for another
_AT_ONCE: Final = 10  # come in one tick; 20 us each
_FRESH: Final = 5.0  # s; quantiles are at most this old, where 50 statements are exported
_REFRESHED: Final = 2  # in one tick; 100 us each


class Series:
    """Those of one statement."""

    __slots__ = (
        "info",
        "is_shown",
        "kept",
        "latency",
        "prefixes",
        "quantiles_at",
        "quantiles_prefixes",
        "shown",
        "start",
    )

    def __init__(self, pool: str, kept: Kept) -> None:
        statement = kept.statement
        labels = {"pool": pool, "fingerprint": statement.fingerprint}
        self.kept: Final = kept
        self.prefixes: Final = _prefixes(labels)
        self.quantiles_prefixes: Final = [
            prefix(_LATENCY, {**labels, "quantile": repr(quantile)}) for quantile in QUANTILES
        ]
        text = {"query": statement.text[:LONGEST_QUERY]}
        self.info: Final = prefix(_INFO, {**labels, **text}) + "1"
        self.is_shown = False
        self.start: Figures = (0, 0.0, 0, 0)
        self.shown: Figures = (0, 0.0, 0, 0)
        self.latency: list[str] = []
        self.quantiles_at = 0.0

    def look(self) -> Figures:
        """What to show now."""
        statement = self.kept.statement
        calls, seconds, rows = statement.calls, statement.seconds, statement.rows
        errors = errors_of(statement) if statement.errors else 0
        start = self.start
        if not self.is_shown:
            self.is_shown = True
            start = self.start = (calls, seconds, errors, rows)
        self.shown = (calls - start[0], seconds - start[1], errors - start[2], rows - start[3])
        return self.shown

    def refresh(self, now: float, quantiles: list[float]) -> None:
        self.quantiles_at = now
        self.latency = [
            written + number_or_nan(value)
            for written, value in zip(self.quantiles_prefixes, quantiles, strict=True)
        ]


class ExportedStatements:
    """Those of one pool; at most ``limit`` besides ``other``."""

    __slots__ = (
        "_left",
        "_look_at",
        "_other",
        "_other_prefixes",
        "_pool",
        "_review_at",
        "_series",
        "_table",
        "_turns",
        "limit",
    )

    def __init__(self, pool: str, table: StatementTable, limit: int, now: float) -> None:
        self.limit = limit
        self._pool: Final = pool
        self._table: Final = table
        self._series: dict[str, Series] = {}  # by fingerprint
        self._other_prefixes: Final = _prefixes({"pool": pool, "fingerprint": OTHER_STATEMENT})
        self._left: Figures = (0, 0.0, 0, 0)  # shown by series that are gone
        self._other: Figures = (0, 0.0, 0, 0)  # shown last
        self._look_at = now
        self._review_at = now + _REVIEW
        self._turns: Iterator[Series] = iter(())  # whose quantiles come next

    def __len__(self) -> int:
        return len(self._series)

    def tick(self, now: float) -> None:
        """Every 100 ms: see who comes and who goes, and compute some quantiles."""
        if now >= self._look_at:
            self._look_at = now + _LOOK
            self._drop_gone()
            if self._fill(now):
                self._look_at = now  # there are more
        if now >= self._review_at:
            self._review_at = now + (_LOOK if self._review(now) else _REVIEW)
        for _ in range(min(_REFRESHED, len(self._series))):
            self._refresh_next(now)

    def scrape(self, totals: Figures) -> Lines:
        """What to show now; ``totals`` of the pool."""
        self._drop_gone()
        calls: list[str] = []
        seconds: list[str] = []
        errors: list[str] = []
        rows: list[str] = []
        latency: list[str] = []
        info: list[str] = []
        all_calls, all_seconds, all_errors, all_rows = self._left
        for series in self._series.values():
            shown = series.look()
            all_calls += shown[0]
            all_seconds += shown[1]
            all_errors += shown[2]
            all_rows += shown[3]
            prefixes = series.prefixes
            calls.append(prefixes[0] + repr(shown[0]))
            seconds.append(prefixes[1] + repr(shown[1]))
            errors.append(prefixes[2] + repr(shown[2]))
            rows.append(prefixes[3] + repr(shown[3]))
            latency += series.latency
            info.append(series.info)
        before = self._other
        self._other = (
            totals[0] - all_calls,
            max(before[1], totals[1] - all_seconds),  # sums of floats may differ in the last digit
            totals[2] - all_errors,
            totals[3] - all_rows,
        )
        counters = (calls, seconds, errors, rows)
        for lines, written, value in zip(counters, self._other_prefixes, self._other, strict=True):
            lines.append(written + repr(value))
        return dict(zip(_FAMILIES, (*counters, latency, info), strict=True))

    # -- who comes and goes ------------------------------------------------------------------------

    def _drop_gone(self) -> None:
        gone = [series for series in self._series.values() if series.kept.is_gone]
        for series in gone:
            self._leave(series)

    def _fill(self, now: float) -> bool:
        """Let others come while there is room. Returns whether there are more of them."""
        room = self.limit - len(self._series)
        if room <= 0 or len(self._table) == len(self._series):
            return False
        others = self._others()
        for kept in nlargest(min(room, _AT_ONCE), others, key=Kept.weight):
            self._come(kept, now)
        return min(room, len(others)) > _AT_ONCE

    def _review(self, now: float) -> bool:
        """Replace those that others are clearly ahead of. Returns whether there may be more of them."""
        if len(self._series) < self.limit:
            return False
        others = nlargest(_AT_ONCE, self._others(), key=Kept.weight)
        least = sorted(self._series.values(), key=lambda series: series.kept.weight())
        replaced = 0
        for kept, series in zip(others, least, strict=False):
            if kept.weight() < 2 * series.kept.weight() + CALL:
                break
            self._leave(series)
            self._come(kept, now)
            replaced += 1
        return replaced == _AT_ONCE

    def _others(self) -> list[Kept]:
        """Those without series, as far as they may have some."""
        series = self._series
        return [
            kept
            for kept in self._table.kept()
            if kept.statement.calls and kept.statement.fingerprint not in series
        ]

    def _come(self, kept: Kept, now: float) -> None:
        series = Series(self._pool, kept)
        self._series[kept.statement.fingerprint] = series
        self._refresh(series, now)

    def _leave(self, series: Series) -> None:
        """What has not been shown yet is in ``other`` from now on."""
        del self._series[series.kept.statement.fingerprint]
        calls, seconds, errors, rows = self._left
        shown = series.shown
        self._left = (calls + shown[0], seconds + shown[1], errors + shown[2], rows + shown[3])

    # -- quantiles ---------------------------------------------------------------------------------

    def _refresh_next(self, now: float) -> None:
        series = next(self._turns, None)
        if series is None:  # the round is over
            self._turns = iter(list(self._series.values()))
        elif now >= series.quantiles_at + _FRESH and not series.kept.is_gone:
            self._refresh(series, now)

    def _refresh(self, series: Series, now: float) -> None:
        quantiles, _ = self._table.quantiles(series.kept.statement, now)
        series.refresh(now, quantiles)


def _prefixes(labels: dict[str, str]) -> tuple[str, ...]:
    return tuple(prefix(name, labels) for name in _COUNTERS)
