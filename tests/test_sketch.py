"""Rolling quantiles against sorted samples, and windows that forget at the right time."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.observe.sketch import (
    BUCKETS,
    HIGHEST,
    LAST,
    LOWEST,
    RELATIVE_ERROR,
    WINDOWS,
    RollingPeak,
    RollingQuantiles,
    index_of,
    value_of,
)

QUANTILES = (0.5, 0.9, 0.99)
ROUNDING = 1e-9  # of the floats, at the very edge of a bucket

durations = st.floats(LOWEST, HIGHEST)
clustered = st.builds(lambda exponent: 10.0**exponent, st.floats(-6, 3.5))


def nearest_rank(samples: list[float], quantile: float) -> float:
    return sorted(samples)[max(1, math.ceil(quantile * len(samples))) - 1]


def relative_error(estimate: float, true: float) -> float:
    return abs(estimate - true) / true


@given(st.lists(durations | clustered, min_size=1), st.floats(0, 1))
def test_a_quantile_is_at_most_one_percent_off(samples, quantile):
    """The claim the dashboards make, for any values and any quantile."""
    sketch = RollingQuantiles(0.0)
    for sample in samples:
        sketch.record(sample)

    (estimate,), count = sketch.quantiles("1m", 1.0, (quantile,))

    assert count == len(samples)
    true = nearest_rank(samples, quantile)
    assert relative_error(estimate, true) <= RELATIVE_ERROR + ROUNDING


@pytest.mark.parametrize("window", WINDOWS)
def test_a_long_tail_of_queries_is_at_most_one_percent_off(window):
    """20,000 lognormal durations around 4 ms over all slots: where rank-based sketches fail."""
    seed = random.Random(7)
    samples = [seed.lognormvariate(math.log(0.004), 1.2) for _ in range(20_000)]
    sketch = RollingQuantiles(0.0)
    length = 10.0 * WINDOWS[window] - 1
    for number, sample in enumerate(samples):
        sketch.advance(length * number / len(samples))
        sketch.record(sample)

    estimates, count = sketch.quantiles(window, length, QUANTILES)

    assert count == len(samples)
    for estimate, quantile in zip(estimates, QUANTILES, strict=True):
        assert relative_error(estimate, nearest_rank(samples, quantile)) <= RELATIVE_ERROR


@given(durations)
def test_every_duration_has_a_bucket_whose_value_is_near(value):
    assert 0 <= index_of(value) < BUCKETS
    assert relative_error(value_of(index_of(value)), value) <= RELATIVE_ERROR + ROUNDING


@given(durations, durations)
def test_a_longer_duration_is_never_in_a_lower_bucket(one, other):
    assert index_of(min(one, other)) <= index_of(max(one, other))


@pytest.mark.parametrize("value", [0.0, -1.0, -math.inf, 1e-300, LOWEST])
def test_what_is_too_short_counts_as_the_shortest(value):
    """A clock that stands still gives 0; nothing may fail then."""
    assert index_of(value) == 0
    assert value_of(0) == LOWEST


@pytest.mark.parametrize("value", [HIGHEST, 86_400.0, math.inf])
def test_what_is_too_long_counts_as_the_longest(value):
    assert index_of(value) == LAST
    assert relative_error(value_of(LAST), HIGHEST) <= RELATIVE_ERROR + ROUNDING


def test_no_samples_give_nan():
    """Comparisons with NaN are false: an empty window raises no alert."""
    estimates, count = RollingQuantiles(0.0).quantiles("5m", 0.0, QUANTILES)

    assert count == 0
    assert all(map(math.isnan, estimates))


@pytest.mark.parametrize(("window", "seconds"), [("1m", 60.0), ("5m", 300.0)])
def test_a_window_keeps_a_sample_for_its_time_less_a_slot_and_never_longer(window, seconds):
    sketch = RollingQuantiles(1000.0)
    sketch.advance(1009.9)
    sketch.record(0.5)

    _, count = sketch.quantiles(window, 1000.0 + seconds - 0.001, QUANTILES)
    assert count == 1
    _, count = sketch.quantiles(window, 1000.0 + seconds, QUANTILES)
    assert count == 0


def test_the_windows_forget_on_their_own():
    """After a minute the short window is empty while the long one still knows."""
    sketch = RollingQuantiles(0.0)
    sketch.record(0.25)

    assert sketch.quantiles("1m", 100.0, (0.5,))[1] == 0
    (median,), count = sketch.quantiles("5m", 100.0, (0.5,))

    assert count == 1
    assert relative_error(median, 0.25) <= RELATIVE_ERROR


@given(st.lists(st.tuples(st.floats(0, 400), durations), max_size=50))
def test_a_window_counts_what_its_slots_cover(steps):
    """Against a list of (time, value): pauses of any length, also longer than a window."""
    sketch = RollingQuantiles(0.0)
    now = 0.0
    seen: list[tuple[int, float]] = []
    for pause, value in steps:
        now += pause
        sketch.advance(now)
        sketch.record(value)
        seen.append((slot_of(sketch), value))
        for window, length in WINDOWS.items():
            alive = [value for slot, value in seen if slot > slot_of(sketch) - length]
            (median,), count = sketch.quantiles(window, now, (0.5,))
            assert count == len(alive)
            assert relative_error(median, nearest_rank(alive, 0.5)) <= RELATIVE_ERROR + ROUNDING


def slot_of(sketch: RollingQuantiles) -> int:
    """The number of the slot that runs, in tens of seconds since a long pause moved the grid."""
    return round(sketch._ends / 10.0)


def test_a_stalled_loop_does_not_make_a_window_longer():
    """Nobody called advance for 45 s: what is counted after it belongs to now, what came before is old."""
    sketch = RollingQuantiles(0.0)
    sketch.record(0.1)
    sketch.advance(45.0)
    sketch.record(0.2)

    _, count = sketch.quantiles("1m", 59.0, QUANTILES)
    assert count == 2
    (median,), count = sketch.quantiles("1m", 61.0, (0.5,))
    assert count == 1
    assert relative_error(median, 0.2) <= RELATIVE_ERROR


def test_a_pause_of_days_forgets_everything_at_once():
    """A suspended machine: no loop over the slots that nobody saw."""
    sketch = RollingQuantiles(0.0)
    sketch.record(0.1)
    sketch.advance(15.0)
    sketch.record(0.1)

    assert sketch.quantiles("5m", 1e9, QUANTILES)[1] == 0
    sketch.record(0.3)
    assert sketch.quantiles("5m", 1e9 + 9.0, QUANTILES)[1] == 1


def test_the_list_of_the_current_slot_is_never_replaced():
    """The recorder keeps it: it saves a call for every query."""
    sketch = RollingQuantiles(0.0)
    slot = sketch.slot
    for now in (10.0, 75.0, 1e6):
        sketch.advance(now)
    slot[index_of(0.5)] += 1

    assert sketch.quantiles("1m", 1e6, QUANTILES)[1] == 1


def test_a_clock_that_goes_back_changes_nothing():
    sketch = RollingQuantiles(100.0)
    sketch.record(0.5)
    sketch.advance(50.0)

    assert sketch.quantiles("1m", 101.0, QUANTILES)[1] == 1


def test_a_peak_is_remembered_for_a_minute():
    peak = RollingPeak(0.0)
    peak.highest = 25
    peak.advance(59.9, current=1)
    assert peak.value() == 25
    peak.advance(60.0, current=1)
    assert peak.value() == 1


def test_a_peak_starts_each_slot_from_what_is_in_use():
    """A lease held for ten minutes counts in each of them, without any new one."""
    peak = RollingPeak(0.0)
    peak.highest = 3
    for second in range(1, 600):
        peak.advance(float(second), current=3)
    assert peak.value() == 3
    for second in range(600, 661):
        peak.advance(float(second), current=0)
    assert peak.value() == 0


def test_a_peak_survives_a_pause_longer_than_its_window():
    peak = RollingPeak(0.0)
    peak.highest = 9
    peak.advance(1e6, current=2)
    assert peak.value() == 2
    peak.highest = 4
    peak.advance(1e6 + 59.0, current=0)
    assert peak.value() == 4
