"""Figures with their units, as people read them.

Pure. Seven characters at most up to 10,000 days, and so aligned in columns.
"""

from math import isfinite, isnan

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0


def seconds(value: float) -> str:
    """A duration for people: ``0.42 ms``, ``12 ms``, ``5.5 s``; ``-`` for NaN."""
    if isnan(value):
        return "-"
    if value < 0.01:
        return f"{value * 1000:.2f} ms"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s"


def age(value: float) -> str:
    """A duration that may last: as above, then ``12 min``, ``3.2 h``, ``4.1 d``."""
    if not isfinite(value):
        return "-"
    if value < 2 * _MINUTE:
        return seconds(value)
    if value < 2 * _HOUR:
        return f"{value / _MINUTE:.0f} min"
    return f"{value / _HOUR:.1f} h" if value < 2 * _DAY else f"{value / _DAY:.1f} d"


def count(value: float) -> str:
    """A number of things: ``812``, ``45.1k``, ``3.2M``; ``-`` for NaN."""
    if not isfinite(value):
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value / 1e3:.1f}k" if value >= 1e4 else f"{value:.0f}"


def rate(value: float) -> str:
    """So many a second: ``0.3``, ``12``, ``45.1k``; ``-`` for NaN."""
    return f"{value:.1f}" if 0.0 < value < 9.95 else count(value)
