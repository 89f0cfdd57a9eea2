"""Writes metric families in Prometheus' text format 0.0.4 and in OpenMetrics 1.0.

Everything but the numbers of a sample line is built once: rendering then costs about 0.2 us a line, against
7-30 us with ``prometheus_client``, whose scrape would stall every query on the event loop for as long.
Which families there are is ``metrics``' business.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, chain
from math import isnan
from operator import add
from typing import Final, Generic, Literal, TypeVar

from sidecar.observe.histogram import Histogram

Kind = Literal["counter", "gauge", "histogram", "summary"]

_LONGEST_EXEMPLAR: Final = 128
"""Characters, of names and values of its labels together (OpenMetrics 1.0, "Exemplars")."""

Source = TypeVar("Source")
"""What the values are read from at a scrape."""


class Format(Enum):
    """The formats; the value is the Content-Type."""

    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family(Generic[Source]):
    """One metric: its sample lines, read at a scrape, and what is said about it.

    ``help`` is written as it is: no backslash, quote or newline. ``with_exemplars`` are the lines in
    OpenMetrics, where they have some; the text format knows none.
    """

    name: str
    kind: Kind
    help: str
    lines: Callable[[Source], Iterable[str]]
    with_exemplars: Callable[[Source], Iterable[str]] | None = None


class Exposition(Generic[Source]):
    """The families of one page, in their order."""

    def __init__(self, families: Iterable[Family[Source]]) -> None:
        self.families = tuple(families)
        names = {family.name for family in self.families}
        self._headers = {
            Format.TEXT: [_header(family, family.name, family.kind) for family in self.families],
            Format.OPENMETRICS: [_openmetrics_header(family, names) for family in self.families],
        }

    def render(self, format: Format, source: Source) -> Iterator[str]:
        """The text of each family, without the ``# EOF`` that ends an OpenMetrics page."""
        for header, family in zip(self._headers[format], self.families, strict=True):
            if format is Format.OPENMETRICS and family.with_exemplars is not None:
                lines = family.with_exemplars(source)
            else:
                lines = family.lines(source)
            yield "\n".join([header, *lines, ""])


def prefix(name: str, labels: Mapping[str, str]) -> str:
    """A sample line up to its number."""
    if not labels:
        return f"{name} "
    written = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
    return f"{name}{{{written}}} "


def histogram_prefixes(
    name: str, labels: Mapping[str, str], bounds: Iterable[float]
) -> Iterable[str]:
    """The prefixes of one histogram's lines, in the order of ``histogram_values``.

    ``le`` is a float (``5.0``): Prometheus 3 makes it one, and a rule with ``le="5"`` finds nothing.
    """
    for bound in chain(map(repr, bounds), ["+Inf"]):
        yield prefix(f"{name}_bucket", {**labels, "le": bound})
    yield prefix(f"{name}_sum", labels)
    yield prefix(f"{name}_count", labels)


def exemplar(labels: Mapping[str, str], value: float, at: float) -> str:
    """What follows the number of a bucket: of one of the events it counts. Empty if the labels are longer
    than OpenMetrics allows; ``at`` is Unix time."""
    if sum(map(len, chain(labels.keys(), labels.values()))) > _LONGEST_EXEMPLAR:
        return ""
    written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f" # {{{written}}} {value!r} {at:.3f}"


def histogram_values(histogram: Histogram) -> list[float]:
    values: list[float] = list(accumulate(histogram.counts))
    values += (histogram.total, values[-1])
    return values


def fixed(
    prefixes: Iterable[str],
    values: Callable[[Source], Iterable[float]],
    number: Callable[[float], str] = repr,
) -> Callable[[Source], Iterable[str]]:
    """The lines of a family whose label sets never change; ``values`` in the order of ``prefixes``.

    ``repr`` writes every int in full and every float so that it reads back the same.
    """
    prefixes = tuple(prefixes)
    return lambda source: map(add, prefixes, map(number, values(source)))


def number_or_nan(value: float) -> str:
    """``repr``, but NaN the way both formats spell it."""
    return "NaN" if isnan(value) else repr(value)


def _openmetrics_header(family: Family[Source], names: set[str]) -> str:
    """OpenMetrics names a counter's family without ``_total``.

    Where a gauge has that name already the counter's type is left open: two families of one name are
    forbidden, and its samples would change their name otherwise.
    """
    if family.kind != "counter":
        return _header(family, family.name, family.kind)
    bare = family.name.removesuffix("_total")
    if bare in names:
        return _header(family, family.name, "unknown")
    return _header(family, bare, "counter")


def _header(family: Family[Source], name: str, kind: str) -> str:
    return f"# HELP {name} {family.help}\n# TYPE {name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
