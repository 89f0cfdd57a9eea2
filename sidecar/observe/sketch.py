"""Rolling quantiles with a bounded relative error, and the peak of a gauge over a window.

Pure: time is an argument. A value goes to the bucket whose bounds hold it; neighbouring bounds differ
by about 2 %, so the middle of a bucket is at most 1 % away from any value in it (the indexing of
DDSketch, arXiv 1908.10693). t-digest and KLL bound the rank instead, which leaves the value of a P99
10 % off on the long tails that queries have.

Not here: the buckets Prometheus sees (``recorder``); those are counted exactly.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import ceil, log, nan
from operator import add
from typing import Final

RELATIVE_ERROR: Final = 0.01
LOWEST: Final = 1e-6
"""Seconds. Anything shorter counts as this: no query takes less."""
HIGHEST: Final = 3600.0
"""Seconds. Anything longer counts as this."""

_GAMMA: Final = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)

# Bucket 0 holds LOWEST and less; bucket i > 0 holds LOWEST * gamma^(i-1) < v <= LOWEST * gamma^i.
# The index is int(log(v) * SCALE + SHIFT), for LOWEST < v <= HIGHEST.
SCALE: Final = 1 / log(_GAMMA)
SHIFT: Final = 1 - log(LOWEST) * SCALE
LAST: Final = int(log(HIGHEST) * SCALE + SHIFT)
BUCKETS: Final = LAST + 1

SLOT: Final = 10.0
"""Seconds. The grain in which a window forgets."""
WINDOWS: Final = {"1m": 6, "5m": 30}
"""Windows by name, each with its number of slots."""

QUANTILES: Final = (0.5, 0.9, 0.99)
"""Those that are shown."""

_LONGEST: Final = max(WINDOWS.values())  # slots

PEAK_SLOT: Final = 5.0
"""Seconds."""
PEAK_SLOTS: Final = 12
"""A window of a minute, the current slot included."""

_EMPTY: Final = [0] * BUCKETS


def index_of(value: float) -> int:
    """The bucket of ``value`` (seconds)."""
    if value <= LOWEST:
        return 0
    if value >= HIGHEST:
        return LAST
    return int(log(value) * SCALE + SHIFT)


def value_of(index: int) -> float:
    """The value that stands for bucket ``index``: within 1 % of everything in it."""
    if index == 0:
        return LOWEST
    return LOWEST * float(_GAMMA ** (index - 1)) * (1 + RELATIVE_ERROR)


class RollingQuantiles:
    """Quantiles of the values of the last minute and of the last five minutes.

    Values are counted in ``slot``, the dense list of the ten seconds that run now; its owner may
    increment it directly (``slot[index_of(value)] += 1``; the list is never replaced). Full slots
    are kept as dicts of their non-zero buckets and summed up for each window. A window of a minute
    thus covers the current slot and the five before it: 50 to 60 seconds, never more.
    """

    __slots__ = ("_ends", "_finished", "_totals", "slot")

    def __init__(self, now: float) -> None:
        self.slot = [0] * BUCKETS
        self._ends = now + SLOT
        self._finished: deque[dict[int, int]] = deque(maxlen=_LONGEST)  # newest first
        self._totals = {window: [0] * BUCKETS for window in WINDOWS}

    def record(self, value: float) -> None:
        """Count ``value`` (seconds) at the time of the last ``advance``."""
        self.slot[index_of(value)] += 1

    def advance(self, now: float) -> None:
        """Finish every slot that ended by ``now``: to be called every second or so, and at reads.

        Several slots end at once after the caller was held up: what was counted meanwhile belongs
        to the first of them, so a stall never makes a window longer.
        """
        if now >= self._ends + SLOT * _LONGEST:
            self._forget()
            self._ends = now + SLOT
        while now >= self._ends:
            self._ends += SLOT
            self._finish_slot()

    def quantiles(
        self, window: str, now: float, wanted: Sequence[float]
    ) -> tuple[list[float], int]:
        """The values (seconds) of the quantiles, and how many samples they come from.

        The quantile q of n samples is the ceil(q * n)-th smallest; NaN if there is no sample.
        """
        self.advance(now)
        ranks = list(accumulate(map(add, self._totals[window], self.slot)))
        count = ranks[-1]
        if count == 0:
            return [nan] * len(wanted), 0
        return [value_of(bisect_left(ranks, max(1, ceil(q * count)))) for q in wanted], count

    def _finish_slot(self) -> None:
        """Move the current slot into the windows, and take out of each what is too old for it (90 us)."""
        slot = self.slot
        finished = {index: count for index, count in enumerate(slot) if count}
        slot[:] = _EMPTY
        self._finished.appendleft(finished)
        for window, length in WINDOWS.items():
            total = self._totals[window]
            for index, count in finished.items():
                total[index] += count
            if len(self._finished) >= length:  # the current slot is one of the window's, too
                for index, count in self._finished[length - 1].items():
                    total[index] -= count

    def _forget(self) -> None:
        self.slot[:] = _EMPTY
        self._finished.clear()
        for total in self._totals.values():
            total[:] = _EMPTY


class RollingPeak:
    """The highest value within the last minute, in a grain of five seconds.

    The owner raises ``highest`` itself: ``if used > peak.highest: peak.highest = used``.
    """

    __slots__ = ("_ends", "_finished", "highest")

    def __init__(self, now: float) -> None:
        self.highest = 0
        self._ends = now + PEAK_SLOT
        self._finished: deque[int] = deque(maxlen=PEAK_SLOTS - 1)

    def advance(self, now: float, current: int) -> None:
        """Finish the slots that ended by ``now``; ``current`` is the value a new one starts from."""
        for _ in range(PEAK_SLOTS):
            if now < self._ends:
                return
            self._ends += PEAK_SLOT
            self._finished.append(self.highest)
            self.highest = current
        self._ends = max(self._ends, now + PEAK_SLOT)  # held up for more than a window

    def value(self) -> int:
        return max(self.highest, *self._finished) if self._finished else self.highest
