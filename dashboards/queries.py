"""Reads dashboards: their panels with what they ask, and expressions as a Prometheus takes them.

For tests and tools. It reads the JSON as Grafana does, so it needs neither the SDK nor the modules that
generated it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

Json = dict[str, object]

FOLDER: Final = Path(__file__).parent
EVERYTHING: Final[Mapping[str, str]] = {
    "namespace": ".*",
    "job": "pgsidecar",
    "instance": ".+",
    "pool": ".+",
}
"""What Grafana puts in for All, where the sidecars are scraped as job pgsidecar."""

_VARIABLE: Final = re.compile(r"\$(?:\{([a-z_]\w*)(?::\w+)?\}|([a-z_]\w*))")  # $1 is PromQL


@dataclass(frozen=True, slots=True)
class Target:
    ref_id: str
    expr: str
    legend: str
    format: str  # time_series, table or heatmap
    is_instant: bool
    has_exemplars: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """``may_be_empty``: it has a text for the case that its queries find nothing, which is no fault."""

    uid: str  # of the dashboard
    row: str
    id: int
    title: str
    description: str
    type: str
    unit: str
    targets: tuple[Target, ...]
    steps: tuple[float, ...]  # values of its thresholds
    may_be_empty: bool
    json: Json

    def __str__(self) -> str:
        return f"{self.uid}: {self.title}"


def files() -> list[Path]:
    return sorted(FOLDER.glob("pgsidecar-*.json"))


def load(path: Path) -> Json:
    return cast(Json, json.loads(path.read_text()))


def panels(board: Json) -> Iterator[Panel]:
    """In the order of the file, those in collapsed rows included; rows are none."""
    uid, row = str(board.get("uid", "")), ""
    for each in _list(board, "panels"):
        if each.get("type") == "row":
            row = str(each.get("title", ""))
            for nested in _list(each, "panels"):
                yield _panel(nested, uid, row)
        else:
            yield _panel(each, uid, row)


def all_panels() -> list[Panel]:
    """Of all dashboards."""
    return [panel for path in files() for panel in panels(load(path))]


def substitute(
    expr: str,
    *,
    rate_interval: str = "1m",
    range: str = "1h",
    interval: str = "15s",
    variables: Mapping[str, str] = EVERYTHING,
) -> str:
    """The expression with Grafana's macros and the variables put in. KeyError: there is no such."""
    values = {
        **variables,
        "__rate_interval": rate_interval,
        "__range": range,
        "__interval": interval,
    }
    return _VARIABLE.sub(lambda found: values[found[1] or found[2]], expr)


def _panel(raw: Json, uid: str, row: str) -> Panel:
    defaults = _dict(_dict(raw, "fieldConfig"), "defaults")
    steps = (step.get("value") for step in _list(_dict(defaults, "thresholds"), "steps"))
    return Panel(
        uid=uid,
        row=row,
        id=cast(int, raw.get("id", 0)),
        title=str(raw.get("title", "")),
        description=str(raw.get("description", "")),
        type=str(raw.get("type", "")),
        unit=str(defaults.get("unit", "")),
        targets=tuple(map(_target, _list(raw, "targets"))),
        steps=tuple(step for step in steps if isinstance(step, int | float)),
        may_be_empty=bool(defaults.get("noValue")),
        json=raw,
    )


def _target(raw: Json) -> Target:
    return Target(
        ref_id=str(raw.get("refId", "")),
        expr=str(raw.get("expr", "")),
        legend=str(raw.get("legendFormat", "")),
        format=str(raw.get("format", "time_series")),
        is_instant=raw.get("instant") is True,
        has_exemplars=raw.get("exemplar") is True,
    )


def _dict(parent: Mapping[str, Any], key: str) -> Json:
    return cast(Json, parent.get(key) or {})


def _list(parent: Mapping[str, Any], key: str) -> list[Json]:
    return cast(list[Json], parent.get(key) or [])
