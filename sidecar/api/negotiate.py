"""What a client of ``/metrics`` can read: Accept and Accept-Encoding (RFC 9110, section 12.5).

``prometheus_client`` takes the first known type and ignores q-values; Prometheus orders its list by
them.
"""

from collections.abc import Iterator, Mapping

from sidecar.observe.exposition import Format

_VERSIONS = {Format.TEXT: "0.0.4", Format.OPENMETRICS: "1.0.0"}
_TYPES = {Format.TEXT: "text/plain", Format.OPENMETRICS: "application/openmetrics-text"}


def choose_format(accept: str) -> Format:
    """OpenMetrics where it is preferred; text 0.0.4 else, which everything understands."""
    openmetrics = _preference(accept, Format.OPENMETRICS)
    text = _preference(accept, Format.TEXT)
    return Format.OPENMETRICS if openmetrics > text else Format.TEXT


def accepts_gzip(accept_encoding: str) -> bool:
    weights = {coding: _weight(parameters) for coding, parameters in _entries(accept_encoding)}
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def _preference(accept: str, format: Format) -> tuple[float, int]:
    """The weight of ``format`` and how specific the entry is that says so; (0, 0) if none does."""
    main = _TYPES[format].partition("/")[0]
    ranges = {"*/*": 1, f"{main}/*": 2, _TYPES[format]: 3}
    best = (0, 0.0)  # the most specific entry decides, whatever its weight
    for media_type, parameters in _entries(accept):
        if parameters.get("version", _VERSIONS[format]) != _VERSIONS[format]:
            continue
        best = max(best, (ranges.get(media_type, 0), _weight(parameters)))
    specificity, weight = best
    return (weight, specificity) if specificity and weight else (0.0, 0)


def _entries(header: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The entries of a list with their parameters, all in lower case."""
    for entry in header.lower().split(","):
        value, *parameters = (part.strip() for part in entry.split(";"))
        pairs = (parameter.partition("=") for parameter in parameters)
        yield value, {name.strip(): text.strip(' "') for name, _, text in pairs}


def _weight(parameters: Mapping[str, str]) -> float:
    """The q-value, 1 where there is none; what is not a number of 0 to 1 counts as a refusal."""
    try:
        weight = float(parameters.get("q", "1"))
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0
