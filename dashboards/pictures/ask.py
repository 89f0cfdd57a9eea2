"""What a picture shows: a dashboard's main panels, with what a Prometheus answers to their queries.

Owns: which panels are the main ones, the times and steps that Grafana's data source would take, and the
form in which ``draw.mjs`` gets all of it. Does not own: the drawing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final, Self

from pydantic import BaseModel, Field

from dashboards.pictures.prometheus import Exemplar, PictureError, Prometheus, Series, seconds
from dashboards.queries import EVERYTHING, Json, Panel, Target, panels, substitute

# Those that @grafana/ui has a component for. Heatmaps and state timelines are not among them.
DRAWABLE: Final = frozenset({"row", "timeseries", "stat", "table"})

_COLUMNS: Final = 24
_COLUMN: Final = 59  # pixels of a column of Grafana's grid; it asks for one point in each pixel
_LINE: Final = 38  # pixels of a row of that grid
_HIGHEST: Final = 34  # rows of it: what can be looked at in one piece
_TABLE: Final = (86, 36)  # pixels of a table without rows, its title included, and of a row
_NICE: Final = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 1800, 3600)  # seconds between points
_EXEMPLARS: Final = 40  # diamonds in a panel; more would hide the lines


@dataclass(frozen=True, slots=True)
class View:
    """What one chooses above a dashboard: the time, in seconds since 1970, and the variables."""

    start: float
    end: float
    scrape_interval: float
    variables: Mapping[str, str] = field(default_factory=lambda: EVERYTHING)

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Place:
    """In Grafana's grid."""

    x: int
    y: int
    w: int
    h: int

    @property
    def bottom(self) -> int:
        return self.y + self.h


@dataclass(frozen=True, slots=True)
class Answer:
    target: Target
    step: float
    series: list[Series]

    def description(self) -> Json:
        return {
            "refId": self.target.ref_id,
            "expr": self.target.expr,
            "legendFormat": self.target.legend,
            "format": self.target.format,
            "step": self.step,
            "result": [series.model_dump(exclude_none=True) for series in self.series],
        }


@dataclass(frozen=True, slots=True)
class Part:
    """A panel, or the title of a row, which has no panel."""

    json: Json
    place: Place
    panel: Panel | None = None
    answers: tuple[Answer, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()

    @property
    def type(self) -> str:
        return str(self.json["type"])

    def placed(self, **changes: int) -> Self:
        return replace(self, place=replace(self.place, **changes))

    def description(self) -> Json:
        return self.json | {
            "gridPos": asdict(self.place),
            "targets": [answer.description() for answer in self.answers],
            "exemplars": [
                {"time": it.timestamp * 1000, "value": it.value} for it in self.exemplars
            ],
        }


@dataclass(frozen=True, slots=True)
class Picture:
    title: str
    view: View
    parts: list[Part]
    regions: list[Json]

    def description(self) -> Json:
        """What ``draw.mjs`` wants."""
        return {
            "title": self.title,
            "from": self.view.start,
            "to": self.view.end,
            "chosen": [
                f"{name} {value}"
                for name, value in self.view.variables.items()
                if value != EVERYTHING[name]
            ],
            "panels": [part.description() for part in self.parts],
            "annotations": self.regions,
        }

    def remarks(self) -> Iterator[str]:
        """What one would wonder about: nothing where the panel does not say so, NaN."""
        for part in self.parts:
            for answer in part.answers:
                assert part.panel is not None
                place = f"{part.panel.title}, {answer.target.ref_id}"
                values = [value for series in answer.series for _, value in series.samples()]
                if not values and not part.panel.may_be_empty:
                    yield f"{place}: no data"
                if strange := {"NaN", "+Inf", "-Inf"}.intersection(values):
                    yield f"{place}: {', '.join(sorted(strange))}"


def picture(board: Json, prometheus: Prometheus, view: View) -> Picture:
    """The panels of the first open rows, moved together where others are left out."""
    parts: list[Part] = []
    for line in _lines(board):
        drawn = _widened([part for part in line if part.type in DRAWABLE], len(line))
        if not drawn:
            continue
        drawn = _shortened([_answered(part, prometheus, view) for part in drawn])
        if drawn[0].panel is None:
            _drop_title(parts)
        top = max((part.place.bottom for part in parts), default=0)
        up = min(part.place.y for part in drawn) - top
        drawn = [part.placed(y=part.place.y - up) for part in drawn]
        if max(part.place.bottom for part in drawn) > _HIGHEST:
            break
        parts += drawn
    _drop_title(parts)
    if not parts:
        raise PictureError(f"nothing to draw in {board['title']}")
    return Picture(str(board["title"]), view, parts, list(_regions(board, prometheus, view)))


# -- which panels, and where -----------------------------------------------------------------------


class _GridPos(BaseModel):
    x: int
    y: int
    w: int
    h: int


class _Row(BaseModel):
    """Of the parts of a board what tells rows from panels."""

    id: int
    type: str
    title: str = ""
    gridPos: _GridPos
    collapsed: bool | None = False


class _Rows(BaseModel):
    panels: list[_Row]


def _lines(board: Json) -> Iterator[list[Part]]:
    """Parts that stand side by side, from top to bottom; collapsed rows are none."""
    of_id = {panel.id: panel for panel in panels(board)}
    line: list[Part] = []
    for row in _Rows.model_validate(board).panels:
        place = Place(**row.gridPos.model_dump())
        if row.type == "row":
            part = Part({"type": "row", "id": row.id, "title": row.title}, place)
        else:
            part = Part(of_id[row.id].json, place, of_id[row.id])
        if row.collapsed:
            continue
        if line and place.y >= max(part.place.bottom for part in line):
            yield line
            line = []
        line.append(part)
    if line:
        yield line


def _widened(line: list[Part], before: int) -> list[Part]:
    """Over the whole width, if some of ``before`` panels are gone from a simple line of them."""
    if len(line) == before or len({part.place.y for part in line}) != 1:
        return line
    width = sum(part.place.w for part in line)
    x = 0
    wide: list[Part] = []
    for count, part in enumerate(line, 1):
        w = _COLUMNS - x if count == len(line) else round(part.place.w * _COLUMNS / width)
        wide.append(part.placed(x=x, w=w))
        x += w
    return wide


def _shortened(line: list[Part]) -> list[Part]:
    """Tables with nothing but tables beside them, without the empty space below their rows."""
    if any(part.type != "table" for part in line):
        return line
    empty, row = _TABLE
    rows = max((len(answer.series) for part in line for answer in part.answers), default=0)
    height = math.ceil((empty + max(rows, 1) * row) / _LINE)
    return [part.placed(h=min(part.place.h, height)) for part in line]


def _drop_title(parts: list[Part]) -> None:
    """The last one, if nothing came below it."""
    if parts and parts[-1].panel is None:
        parts.pop()


# -- what Prometheus says --------------------------------------------------------------------------


def _answered(part: Part, prometheus: Prometheus, view: View) -> Part:
    if part.panel is None:
        return part
    step = _step(part, view)
    answers = []
    exemplars: list[Exemplar] = []
    for target in part.panel.targets:
        query = _substituted(target.expr, view, step)
        if target.is_instant:
            series = prometheus.instant(query, view.end)
        else:
            series = prometheus.range(query, view.start, view.end, step)
        answers.append(Answer(target, step, series))
        if target.has_exemplars:
            exemplars += prometheus.exemplars(query, view.start, view.end)
    highest = sorted(exemplars, key=lambda exemplar: exemplar.value)[-_EXEMPLARS:]
    return replace(part, answers=tuple(answers), exemplars=tuple(highest))


def _step(part: Part, view: View) -> float:
    """As Grafana's: a point per pixel, but no more than were measured, or than the panel wants."""
    least = seconds(str(part.json.get("interval") or "")) or view.scrape_interval
    return max(least, _nice(view.length / (part.place.w * _COLUMN)))


def _nice(interval: float) -> float:
    return next((nice for nice in _NICE if interval <= nice * 1.5), _NICE[-1])


def _substituted(query: str, view: View, step: float) -> str:
    rate_interval = max(step + view.scrape_interval, 4 * view.scrape_interval)
    return substitute(
        query,
        rate_interval=f"{math.ceil(rate_interval)}s",
        range=f"{round(view.length)}s",
        interval=f"{math.ceil(step)}s",
        variables=view.variables,
    )


# -- annotations -----------------------------------------------------------------------------------


class _Query(BaseModel):
    expr: str = ""


class _Annotation(BaseModel):
    name: str
    enable: bool
    iconColor: str
    target: _Query = Field(default_factory=_Query)


class _Annotations(BaseModel):
    list: Sequence[_Annotation] = ()


class _Annotated(BaseModel):
    annotations: _Annotations = Field(default_factory=_Annotations)


def _regions(board: Json, prometheus: Prometheus, view: View) -> Iterator[Json]:
    """What Grafana makes of an annotation's query: a region for each time in which it is not 0."""
    step = max(view.scrape_interval, _nice(view.length / (_COLUMNS * _COLUMN)))
    for annotation in _Annotated.model_validate(board).annotations.list:
        if not annotation.enable or not annotation.target.expr:
            continue
        query = _substituted(annotation.target.expr, view, step)
        for series in prometheus.range(query, view.start, view.end, step):
            for start, end in _stretches(series.samples(), step):
                times = {"from": start * 1000, "to": end * 1000}
                yield {"name": annotation.name, "color": annotation.iconColor, **times}


def _stretches(samples: Sequence[tuple[float, str]], step: float) -> Iterator[tuple[float, float]]:
    times = [time for time, value in samples if float(value)]
    if not times:
        return
    start = before = times[0]
    for time in times[1:]:
        if time - before > step * 1.5:
            yield start, before
            start = time
        before = time
    yield start, before
