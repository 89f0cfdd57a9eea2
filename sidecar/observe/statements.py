"""The statements of one pool: which ones are kept, and their figures.

Pure. Bounded: when the table is full, the least useful tenth makes room. What counts is recent time
and calls, half as much after five minutes. A statement that had to go stays with whoever holds it
(caches, prepared statements, a query that runs): its figures begin anew, ``is_retired`` says so, and with
its next call it is ``home`` again. Its weight is remembered for a while, so one that is called now and
again gets past a flood of statements that never come back.

Durations are counted by the buckets of ``sketch`` in ``Statement.recent``, on the hot path and without a
call; here they are moved into slots of half a minute, of which ten are the window of the quantiles.
Nothing is kept for buckets, and for statements, without calls.

Memory, for each statement: ``MOST`` bytes if every bucket from a microsecond to an hour is in use in each
slot; some 10 KB in fact. Which statements are exported is ``exported``'s business.
"""

from array import array
from collections import OrderedDict, deque
from math import ceil, nan
from typing import Final, TypeAlias

from sidecar.events import Operation
from sidecar.observe.sketch import QUANTILES, value_of
from sidecar.work import OTHER_STATEMENT, Statement, Trace

LIMIT: Final = 500
LONGEST_TEXT: Final = 4096
"""Characters that are kept of a text. As a label it has 200, in a list fewer."""
MOST: Final = 192 * 1024
"""Bytes for one statement, at most: 100 KB are the dict of the running slot with all its buckets, 60 KB
the nine slots before it, 16 KB the text in the widest script."""

SLOT: Final = 30.0
"""Seconds. The grain in which the window forgets."""
SLOTS: Final = 10
"""The window of five minutes, the current slot included: 4:30 to 5:00, never more."""

CALL: Final = 0.001
"""Seconds: what a call weighs besides its time."""
_FADING: Final = 0.5 ** (1 / SLOTS)
"""The weight of a slot against that of the next one."""
_SHARE: Final = 10
"""One in so many makes room at once: a look at all of them costs each that comes the work for ten."""
_ROTATED: Final = 2
"""Slots that are finished in one tick, at most; of larger tables one in ``_TICKS``. 60 us each."""
_TICKS: Final = 250
"""Of 100 ms, in which every slot of half a minute finds its turn."""

_MOST_STATES: Final = 16
"""SQLSTATEs told apart of one statement: a function may raise any of 60 million."""
OTHER_SQLSTATE: Final = "other"

SORTS: Final = ("seconds", "calls", "rows", "errors", "mean", "longest", "blamed", "p99")

Exemplar = tuple[Trace, float, float]
"""The trace context of a query, how long it took, and the Unix time of its end."""

_Slot: TypeAlias = "tuple[array[int], array[int]]"  # buckets, and how many fell into each
_NOTHING: Final[_Slot] = (array("H"), array("I"))


class Kept:
    """A statement of the table, and what its own figures do not tell."""

    __slots__ = ("_calls", "_p99", "_seconds", "_slots", "_weight", "ends", "is_gone", "statement")

    def __init__(self, statement: Statement, ends: float, weight: float) -> None:
        self.statement: Final = statement
        self.ends = ends  # the slot that runs
        self.is_gone = False  # out of the table; the statement may be back, as another one
        self._weight = weight  # before this slot
        self._calls = statement.calls  # at its beginning
        self._seconds = statement.seconds
        self._slots: deque[_Slot] = deque(maxlen=SLOTS - 1)  # finished; newest first
        self._p99 = -1.0  # as of the end of the last slot; -1: there were no samples

    def weight(self) -> float:
        """How useful it is to keep it."""
        statement = self.statement
        calls = statement.calls - self._calls
        return self._weight + statement.seconds - self._seconds + CALL * calls

    def advance(self, now: float) -> None:
        """Finish every slot that ended by ``now``. What was counted meanwhile is the first one's."""
        if now >= self.ends + SLOT * SLOTS:
            self._finish_slot()
            self._slots.clear()
            self._weight *= 0.5
            self.ends = now + SLOT
        while now >= self.ends:
            self.ends += SLOT
            self._finish_slot()

    def quantiles(self) -> tuple[list[float], int]:
        """The ``QUANTILES`` of the window (seconds), and the samples they come from; 20 to 100 us."""
        counts: dict[int, int] = dict(self.statement.recent)
        for slot in self._slots:
            for bucket, count in zip(slot[0], slot[1], strict=True):
                counts[bucket] = counts.get(bucket, 0) + count
        samples = sum(counts.values())
        if samples == 0:
            return [nan] * len(QUANTILES), 0
        ranks = [max(1, ceil(quantile * samples)) for quantile in QUANTILES]
        found: list[float] = []
        passed = 0
        for bucket in sorted(counts):
            passed += counts[bucket]
            while len(found) < len(ranks) and passed >= ranks[len(found)]:
                found.append(value_of(bucket))
        return found, samples

    def p99(self) -> float:
        """Seconds, as of the end of the last slot: to sort by. -1 without samples."""
        if self._p99 < 0 and self.statement.recent:
            self._p99 = self.quantiles()[0][-1]
        return self._p99

    def _finish_slot(self) -> None:
        statement = self.statement
        self._weight = self.weight() * _FADING
        self._calls = statement.calls
        self._seconds = statement.seconds
        recent = statement.recent
        if recent:
            self._slots.appendleft((array("H", recent.keys()), array("I", recent.values())))
            statement.recent = {}
        elif self._slots:
            self._slots.appendleft(_NOTHING)
            if not any(slot[0] for slot in self._slots):
                self._slots.clear()
        if self._slots:
            self._p99 = self.quantiles()[0][-1]
        else:
            self._p99 = -1.0


class StatementTable:
    """The statements of one pool by fingerprint."""

    __slots__ = (
        "_ghosts",
        "_gone_rows",
        "_known",
        "_now",
        "_others",
        "evicted",
        "exemplars",
        "failures",
        "limit",
    )

    def __init__(self, limit: int = LIMIT, now: float = 0.0) -> None:
        self.limit = limit
        self.evicted = 0
        self.failures = 0  # errors of all statements there ever were
        self.exemplars: list[dict[int, Exemplar]] = [{} for _ in Operation]
        """By operation and bucket of the histogram, the last one of each."""
        self._now = now  # of the last tick
        # ordered by the end of the slot that runs
        self._known: OrderedDict[str, Kept] = OrderedDict()
        self._ghosts: OrderedDict[str, float] = OrderedDict()  # weights of those evicted last
        self._gone_rows = 0  # of those evicted
        # what is not told apart, by operation: never in the table, never evicted
        self._others: Final = [Statement(OTHER_STATEMENT, "", int(each)) for each in Operation]

    def __len__(self) -> int:
        return len(self._known)

    def find(self, fingerprint: str, text: str, operation: int) -> Statement:
        """The statement of this fingerprint; a new one if there is none."""
        kept = self._known.get(fingerprint)
        if kept is not None:
            return kept.statement
        if fingerprint == OTHER_STATEMENT:
            return self._others[operation]
        return self._keep(Statement(fingerprint, text[:LONGEST_TEXT], operation))

    def home(self, statement: Statement, took: float, bucket: int, unix: float) -> Statement:
        """Where the figures of a call go that has ended, at Unix time ``unix``: of an execution with a
        trace, which becomes the exemplar of its bucket, or of a retired statement."""
        shared = statement.shared
        if shared is None:
            return self._back(statement)
        if statement.trace is not None:
            self.exemplars[statement.operation][bucket] = (statement.trace, took, unix)
        give(statement, shared)
        return self._back(shared) if shared.is_retired else shared

    def _back(self, statement: Statement) -> Statement:
        """A retired statement was called: it is back in the table, or another one has its place."""
        kept = self._known.get(statement.fingerprint)
        if kept is None:
            return self._keep(statement)
        give(statement, kept.statement)
        return kept.statement

    def charge(self, statement: Statement, seconds: float) -> None:
        """Clients have waited so long because of it. One that holds a lease for long, and is not called
        meanwhile, may have been retired."""
        home = self._back(statement) if statement.is_retired else statement
        home.blamed += seconds

    def failed(self, statement: Statement, sqlstate: str) -> None:
        """Count an error of the statement, or of an execution of it."""
        shared = statement.shared or statement
        if shared.is_retired:
            shared = self._back(shared)
        self.failures += 1
        errors = shared.errors
        if sqlstate not in errors and len(errors) >= _MOST_STATES:
            sqlstate = OTHER_SQLSTATE
        errors[sqlstate] = errors.get(sqlstate, 0) + 1

    def get(self, fingerprint: str) -> Statement | None:
        kept = self._known.get(fingerprint)
        return None if kept is None else kept.statement

    def kept(self) -> list[Kept]:
        return list(self._known.values())

    def rows(self) -> int:
        """Of all statements there ever were."""
        rows = self._gone_rows + sum([other.rows for other in self._others])
        return rows + sum([kept.statement.rows for kept in self._known.values()])

    def ranked(self, sort: str, limit: int) -> list[Statement]:
        """The first of those that were called, by one of ``SORTS``; or blamed, which one may be that runs
        for the first time."""
        is_blame = sort == "blamed"
        called = [
            kept
            for kept in self._known.values()
            if kept.statement.calls or (is_blame and kept.statement.blamed)
        ]
        called.sort(key=_KEYS[sort], reverse=True)
        return [kept.statement for kept in called[:limit]]

    def quantiles(self, statement: Statement, now: float) -> tuple[list[float], int]:
        """The ``QUANTILES`` of the last five minutes (seconds), and the samples behind them: NaN and 0
        of a statement that is not kept."""
        kept = self._known.get(statement.fingerprint)
        if kept is None:
            return [nan] * len(QUANTILES), 0
        self._advance(kept, now)
        return kept.quantiles()

    def tick(self, now: float) -> None:
        """Finish the slots that ended by ``now``, some at once; the others' turn is with the next tick."""
        self._now = now
        for other in self._others:
            if other.recent:
                other.recent = {}  # they have no quantiles
        known = self._known
        for _ in range(max(_ROTATED, len(known) // _TICKS)):
            if not known:
                return
            kept = next(iter(known.values()))
            if now < kept.ends:
                return
            self._advance(kept, now)

    def _advance(self, kept: Kept, now: float) -> None:
        if now >= kept.ends:
            kept.advance(now)
            self._known.move_to_end(kept.statement.fingerprint)

    def _keep(self, statement: Statement) -> Statement:
        if len(self._known) >= self.limit:
            self._make_room()
        fingerprint = statement.fingerprint
        # what is new has the weight of a call more than what is older
        weight = self._ghosts.pop(fingerprint, CALL)
        self._known[fingerprint] = Kept(statement, self._now + SLOT, weight)
        statement.is_retired = False
        return statement

    def _make_room(self) -> None:
        by_weight = sorted(self._known.values(), key=Kept.weight)
        for kept in by_weight[: max(1, self.limit // _SHARE)]:
            self._evict(kept)

    def _evict(self, kept: Kept) -> None:
        statement = kept.statement
        del self._known[statement.fingerprint]
        self.evicted += 1
        self._ghosts[statement.fingerprint] = kept.weight()
        if len(self._ghosts) > self.limit:
            self._ghosts.popitem(last=False)
        kept.is_gone = True
        self._gone_rows += statement.rows
        statement.is_retired = True
        statement.calls = 0
        statement.seconds = 0.0
        statement.longest = 0.0
        statement.rows = 0
        statement.blamed = 0.0
        statement.errors = {}
        statement.recent = {}


def give(statement: Statement, to: Statement) -> None:
    """Pass on what others than the recorder have counted."""
    to.rows += statement.rows
    to.blamed += statement.blamed
    statement.rows = 0
    statement.blamed = 0.0


def errors_of(statement: Statement) -> int:
    """Calls that failed."""
    return sum(statement.errors.values())


def mean_of(statement: Statement) -> float:
    """Seconds a call took; 0 without calls."""
    return statement.seconds / statement.calls if statement.calls else 0.0


_KEYS: Final = {
    "seconds": lambda kept: kept.statement.seconds,
    "calls": lambda kept: kept.statement.calls,
    "rows": lambda kept: kept.statement.rows,
    "errors": lambda kept: errors_of(kept.statement),
    "mean": lambda kept: mean_of(kept.statement),
    "longest": lambda kept: kept.statement.longest,
    "blamed": lambda kept: kept.statement.blamed,
    "p99": Kept.p99,
}
