"""Panels in the house style: the SDK's builders, with everything decided that is the same everywhere.

A panel cannot be had without title, description and unit. ``empty`` is what stands there when a query
rightly finds nothing; a panel without it has data whenever a sidecar is scraped. Queries have short
forms: ``<pool>`` stands for the selectors of job, instance and pool, ``<sidecar>`` for those without
the pool, ``<alert>`` for those of alerts, which may lack each of them.
"""

import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

from grafana_foundation_sdk.builders import common as styles
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import (
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import Dataquery as PrometheusQuery
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.table import Options as TableOptions

SOURCE: Final = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
_SIDECAR: Final = 'namespace=~"$namespace",job=~"$job",instance=~"$instance"'
_SHORT: Final = {
    "<pool>": f'{_SIDECAR},pool=~"$pool"',
    "<sidecar>": _SIDECAR,
    "<alert>": 'namespace=~"$namespace|",job=~"$job|",instance=~"$instance|",pool=~"$pool|"',
}

QUANTILES: Final = {"P50": "green", "P90": "yellow", "P99": "red"}
STATES: Final = {"used": "orange", "idle": "green", "connecting": "blue"}
_OUTCOMES: Final = {
    **dict.fromkeys(("ok", "immediate", "accepted", "commit", "reused"), "green"),
    **dict.fromkeys(("waited", "parsed"), "yellow"),
    **dict.fromkeys(("cancelled",), "blue"),
    **dict.fromkeys(("rollback",), "orange"),
    **dict.fromkeys(("error", "timeout", "auth_failed"), "red"),
    **dict.fromkeys(("rejected",), "dark-red"),
}
VERDICTS: Final = {
    "healthy": "green",
    "pool_too_small": "orange",
    "slow_statement": "yellow",
    "leak": "purple",
    "lock_chain": "blue",
    "database_down": "dark-red",
    "connection_storm": "semi-dark-orange",
    "error_burst": "red",
}
"""Kinds of verdicts with their colours; the place of each is its number in a timeline."""

Steps = Sequence[tuple[float, str]]
"""Values from which on another colour holds; on a chart each is a line."""
Colours = Mapping[str, str]
"""By the name of a series."""
Size = tuple[int, int]
"""Columns of 24, and height."""

_TOPS: Final = {"percentunit": 1.0, "short": 1.0, "ops": 1.0, "reqps": 1.0, "s": 0.001}
"""How far an axis reaches at least, by unit. Of zeros alone Grafana makes one from 0 to 100."""
_LAST, _MAX = "lastNotNull", "max"  # figures of a legend
_ROOM: Final = 2
"""Series that a table below a chart of height 8 has room for: Grafana gives it a third of that."""
_WIDE: Final = 12
"""Columns from which on a chart has room for a table on its right."""
_NOTHING: Final = "–"  # noqa: RUF001  # what stands in a cell


def outcomes(*names: str) -> Colours:
    return {name: _OUTCOMES[name] for name in names}


@dataclass(frozen=True, slots=True)
class Query:
    """``legend``: the name of its series; in a listing the heading of its values, none hides them."""

    expr: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """Of a listing: a label, or the values of the query with this legend."""

    name: str
    unit: str = ""
    steps: Steps = ()
    mappings: Mapping[str, tuple[str, str]] | None = None  # by value: text and colour
    colours: bool = False  # by the text of a verdict
    label: str = ""  # if it is not the name
    link: tuple[str, str] | None = None  # title and URL
    decimals: int | None = None
    width: int = 0  # pixels; none: what the others leave


class _Panel(Protocol):
    """What the SDK's builders of panels have in common."""

    def id(self, value: int, /) -> Self: ...
    def title(self, value: str, /) -> Self: ...
    def description(self, value: str, /) -> Self: ...
    def unit(self, value: str, /) -> Self: ...
    def datasource(self, value: common.DataSourceRef, /) -> Self: ...
    def grid_pos(self, value: models.GridPos, /) -> Self: ...
    def with_target(self, value: Builder[Dataquery], /) -> Self: ...
    def no_value(self, value: str, /) -> Self: ...
    def thresholds(self, value: Builder[models.ThresholdsConfig], /) -> Self: ...
    def color_scheme(self, value: Builder[models.FieldColor], /) -> Self: ...
    def mappings(self, value: list[models.ValueMapping], /) -> Self: ...
    def override_by_name(
        self, name: str, properties: list[models.DynamicConfigValue], /
    ) -> Self: ...
    def override_by_regexp(
        self, regexp: str, properties: list[models.DynamicConfigValue], /
    ) -> Self: ...
    def build(self) -> models.Panel: ...


# -- queries ---------------------------------------------------------------------------------------


def expand(expr: str) -> str:
    """Without the short forms."""
    for short, selectors in _SHORT.items():
        expr = expr.replace(short, selectors)
    return expr


def quantile(
    share: float,
    metric: str,
    selector: str = "<pool>",
    by: str = "le",
    window: str = "$__rate_interval",
) -> str:
    """Of a histogram, over all that is selected; without samples there is no series, instead of NaN."""
    rate = f"rate({metric}_bucket{{{selector}}}[{window}])"
    return f"histogram_quantile({share}, sum by ({by}) ({rate})) >= 0"


def quantiles(metric: str, selector: str = "<pool>", exemplars: bool = False) -> list[Query]:
    shares = {"P50": 0.5, "P90": 0.9, "P99": 0.99}
    return [
        Query(quantile(share, metric, selector), name, exemplars) for name, share in shares.items()
    ]


def verdict(by: str) -> str:
    """The number of the verdict that holds: its place in VERDICTS."""
    numbered = (
        f'pgsidecar_verdict{{<pool>,kind="{kind}"}} * {number}'
        for number, kind in enumerate(VERDICTS)
    )
    return f"max by ({by}) ({' or '.join(numbered)})"


# -- kinds of panels -------------------------------------------------------------------------------


def chart(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    size: Size = (12, 8),
    steps: Steps = (),
    colours: Colours | None = None,
    stacked: bool = False,
    bars: bool = False,
    top: float | None = None,
    right: tuple[str, str] | None = None,
    sort: str = "Last *",
    empty: str = "",
) -> models.Panel:
    """Lines over time. A series whose legend ends in ``limit`` is drawn as one. ``top``: the axis
    reaches at least so far, instead of what is usual for the unit. ``right``: the series with an axis
    of its own, and its unit. ``sort``: the figure by which the legend is sorted, if series come and go.
    Bars are for counts. A sample between gaps is drawn as a point."""
    drawn = common.GraphDrawStyle.BARS if bars else common.GraphDrawStyle.LINE
    many = any("{{" in query.legend for query in queries)
    order = common.SortOrder.DESCENDING if many else common.SortOrder.NONE
    panel = (
        timeseries.Panel()
        .draw_style(drawn)
        .line_width(0 if stacked else 2)  # a layer of zeros would cover the one below with its line
        .fill_opacity(60 if bars or stacked else 0)
        .show_points(common.VisibilityMode.AUTO)
        .axis_border_show(False)
        .min(0)
        .legend(_legend(size, len(queries), sort if many else "", bars=bars))
        .tooltip(
            styles.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(order)
            .hide_zeros(stacked)
        )
    )
    if stacked:
        panel.stacking(styles.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if bars:
        panel.decimals(0)
    if (least := _TOPS.get(unit) if top is None else top) is not None:
        panel.axis_soft_max(least)
    if steps:
        dashed = styles.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        panel.thresholds_style(dashed)
    for query in queries:
        panel.with_target(_target(query))
    panel.color_scheme(_colour_mode(models.FieldColorModeId.PALETTE_CLASSIC))
    _colour(panel, colours or {})
    if any(query.legend.endswith("limit") for query in queries):
        panel.override_by_regexp("/limit$/", _as_limit())
    if right is not None:
        name, its_unit = right
        panel.override_by_name(
            name, [_property("unit", its_unit), _property("custom.axisPlacement", "right")]
        )
    return _finish(panel, title, about, unit, size, steps, empty)


def figure(
    title: str,
    about: str,
    unit: str,
    query: Query,
    size: Size = (4, 4),
    steps: Steps = (),
    mappings: Mapping[str, tuple[str, str]] | None = None,
    colours: Colours | None = None,
    decimals: int | None = None,
    shows: common.BigValueTextMode = common.BigValueTextMode.AUTO,
    empty: str = "",
) -> models.Panel:
    """How it is now, in large: no sparkline, since the last value of a series that ended would stay."""
    speaks = bool(steps or mappings or colours)
    panel = (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(
            common.BigValueColorMode.BACKGROUND if speaks else common.BigValueColorMode.NONE
        )
        .text_mode(shows)
        .reduce_options(styles.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .with_target(_target(query, instant=True))
        .color_scheme(_colour_mode(models.FieldColorModeId.THRESHOLDS))
    )
    if mappings:
        panel.mappings(_mappings(mappings))
    if decimals is not None:
        panel.decimals(decimals)
    _colour(panel, colours or {})
    return _finish(panel, title, about, unit, size, steps, empty)


def listing(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    columns: Sequence[Column],
    sort: str = "",
    rising: bool = False,
    size: Size = (24, 8),
    empty: str = "",
) -> models.Panel:
    """A table of what is now: rows are the label sets, which all of the queries have in common."""
    panel = (
        table.Panel()
        .cell_height(common.TableCellHeight.SM)
        .cell_options(common.TableAutoCellOptions())
        .color_scheme(_colour_mode(models.FieldColorModeId.THRESHOLDS))
    )
    if sort:
        panel.sort_by([styles.TableSortByFieldState().display_name(sort).desc(not rising)])
    raw = {column.name: column.label or column.name for column in columns}
    hidden = {"Time": True}
    for letter, query in zip(string.ascii_uppercase, queries, strict=False):
        panel.with_target(_target(query, letter, instant=True, as_table=True))
        value = f"Value #{letter}" if len(queries) > 1 else "Value"
        if query.legend:
            raw[query.legend] = value
        else:
            hidden[value] = True
    renamed = {source: name for name, source in raw.items() if source != name}
    if len(queries) > 1:
        panel.with_transformation(models.DataTransformerConfig("merge", options={}))
    order = {raw[column.name]: place for place, column in enumerate(columns)}
    organized = {"excludeByName": hidden, "indexByName": order, "renameByName": renamed}
    panel.with_transformation(models.DataTransformerConfig("organize", options=organized))
    panel.override_by_regexp("/.*/", [_property("noValue", _NOTHING)])  # ``empty`` is the panel's
    for column in columns:
        if properties := _column(column):
            panel.override_by_name(column.name, properties)
    built = _finish(panel, title, about, unit, size, (), empty)
    assert isinstance(built.options, TableOptions)
    built.options.footer = None  # newer Grafanas know none, older ones show none by default
    return built


def timeline(
    title: str,
    about: str,
    *queries: Query,
    mappings: Mapping[str, tuple[str, str]],
    size: Size = (12, 6),
    empty: str = "",
) -> models.Panel:
    """States over time, a line for each series."""
    panel = (
        statetimeline.Panel()
        .show_value(common.VisibilityMode.AUTO)
        .mappings(_mappings(mappings))
        .color_scheme(_colour_mode(models.FieldColorModeId.THRESHOLDS))
        .legend(styles.VizLegendOptions().show_legend(False))
        .tooltip(styles.VizTooltipOptions().mode(common.TooltipDisplayMode.SINGLE))
    )
    for query in queries:
        panel.with_target(_target(query))
    return _finish(panel, title, about, "none", size, (), empty)


def heat(title: str, about: str, unit: str, query: Query, size: Size = (12, 8)) -> models.Panel:
    """A histogram over time."""
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .fill("dark-orange")
            .exponent(0.5)
            .steps(64)
        )
        .y_axis(heatmap.YAxisConfig().unit(unit).axis_placement(common.AxisPlacement.LEFT))
        .with_target(_target(query, as_heatmap=True))
    )
    return _finish(panel, title, about, unit, size, (), "no queries")


# -- parts of them ---------------------------------------------------------------------------------


def _target(
    query: Query,
    letter: str = "",
    *,
    instant: bool = False,
    as_table: bool = False,
    as_heatmap: bool = False,
) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(SOURCE).expr(expand(query.expr)).ref_id(letter)
    target.instant() if instant else target.range()
    if query.exemplars:
        target.exemplar(True)
    if as_table:
        return target.format(PromQueryFormat.TABLE)
    if as_heatmap:
        target.format(PromQueryFormat.HEATMAP)
    else:
        target.format(PromQueryFormat.TIME_SERIES)
    return target.legend_format(query.legend or "__auto")


def _finish(
    panel: _Panel, title: str, about: str, unit: str, size: Size, steps: Steps, empty: str
) -> models.Panel:
    width, height = size
    panel.title(title).description(about).unit(unit).datasource(SOURCE)
    panel.id(zlib.crc32(title.encode()) % 10**6)  # links to a panel outlive that it moves
    panel.grid_pos(models.GridPos(h=height, w=width))
    panel.thresholds(_thresholds(steps))  # always: Grafana's own default is red from 80 on
    if empty:
        panel.no_value(empty)
    built = panel.build()
    for letter, target in zip(string.ascii_uppercase, built.targets or [], strict=False):
        assert isinstance(target, PrometheusQuery)
        target.ref_id = letter
    return built


def _thresholds(steps: Steps) -> dashboards.ThresholdsConfig:
    found = [models.Threshold(None, "green" if steps else "blue")]
    found += [models.Threshold(value, colour) for value, colour in steps]
    return dashboards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)


def _legend(size: Size, count: int, sort: str, *, bars: bool) -> styles.VizLegendOptions:
    """A table below the chart; of more series than that has room for, or of any number, on its right,
    or, where that would leave no room for the chart, a list with one figure each."""
    legend = styles.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    is_long = bool(sort) or count > _ROOM
    if is_long and size[0] < _WIDE:
        return legend.display_mode(common.LegendDisplayMode.LIST).calcs([_MAX if bars else _LAST])
    legend.display_mode(common.LegendDisplayMode.TABLE).calcs([_LAST, _MAX])
    if is_long:
        legend.placement(common.LegendPlacement.RIGHT)
    return legend.sort_by(sort).sort_desc(True) if sort else legend


def _mappings(texts: Mapping[str, tuple[str, str]]) -> list[models.ValueMapping]:
    results = {
        value: models.ValueMappingResult(text=text, color=colour, index=place)
        for place, (value, (text, colour)) in enumerate(texts.items())
    }
    return [models.ValueMap(results)] if results else []


def _colourless() -> models.SpecialValueMap:
    """A cell without a value would have the colour of the best one."""
    result = models.ValueMappingResult(text=_NOTHING, color="transparent")
    nothing = models.SpecialValueMatch.NULL_AND_NAN
    return models.SpecialValueMap(models.DashboardSpecialValueMapOptions(nothing, result))


def _column(column: Column) -> list[models.DynamicConfigValue]:
    found = []
    if column.unit:
        found.append(_property("unit", column.unit))
    if column.width:
        found.append(_property("custom.width", column.width))
    if column.decimals is not None:
        found.append(_property("decimals", column.decimals))
    mappings = column.mappings or {}
    if column.colours:
        mappings = {kind: (kind, colour) for kind, colour in VERDICTS.items()}
    if column.steps:
        found.append(_property("thresholds", _thresholds(column.steps).build()))
    if column.steps or mappings:
        found.append(_property("mappings", [*_mappings(mappings), _colourless()]))
        background = {"type": "color-background", "mode": "basic"}
        found.append(_property("custom.cellOptions", background))
    if column.link is not None:
        title, url = column.link
        found.append(_property("links", [{"title": title, "url": url}]))
    return found


def _as_limit() -> list[models.DynamicConfigValue]:
    return [
        _fixed("dark-red"),
        _property("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
        _property("custom.lineWidth", 2),
        _property("custom.fillOpacity", 0),
        _property("custom.stacking", {"mode": "none", "group": "limit"}),
    ]


def _colour(panel: _Panel, colours: Colours) -> None:
    for name, colour in colours.items():
        panel.override_by_name(name, [_fixed(colour)])


def _colour_mode(mode: models.FieldColorModeId) -> dashboards.FieldColor:
    return dashboards.FieldColor().mode(mode)


def _fixed(colour: str) -> models.DynamicConfigValue:
    return _property("color", {"mode": "fixed", "fixedColor": colour})


def _property(name: str, value: object) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(name, value)
