"""A whole dashboard: its variables, annotations and links, and where its panels stand.

Variables, annotations and links are the same on all four, so that one leads to another with time and
selection kept. Panels flow from left to right in the order they are given.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import SOURCE, expand

BOARDS: Final = {
    "pgsidecar-overview": "All pools",
    "pgsidecar-pool": "One pool",
    "pgsidecar-statements": "Statements and holders",
    "pgsidecar-slo": "Objectives",
}
"""Titles of the links by uid, which is the name of the file, too."""
OF_ONE_POOL: Final = "pgsidecar-pool"

WIDTH: Final = 24
_ALL: Final = models.VariableOption(text=["All"], value=["$__all"])
_KEPT: Final = (
    "${__url_time_range}&${datasource:queryparam}&${namespace:queryparam}&${job:queryparam}"
)


@dataclass(frozen=True, slots=True)
class Section:
    """A row; collapsed, its panels ask for nothing until it is opened."""

    title: str
    panels: Sequence[models.Panel]
    collapsed: bool = False


def link_to(uid: str, **variables: str) -> str:
    """The board, with time, source, namespace and job kept, and these variables by columns of the table."""
    columns = (f"&var-{name}=${{__data.fields.{column}}}" for name, column in variables.items())
    return f"/d/{uid}/{uid}?{_KEPT}{''.join(columns)}"


def render(uid: str, title: str, about: str, sections: Sequence[Section]) -> str:
    """The JSON of a dashboard, the same every time."""
    board = (
        builders.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["pgsidecar", "postgresql"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .variables([_source(), *_variables(uid)])
        .annotations(_annotations())
        .links([_link(other) for other in BOARDS if other != uid])
        .build()
    )
    board.panels = _laid_out(sections)
    _tidy(board)
    return json.dumps(board, cls=JSONEncoder, sort_keys=True, indent=2) + "\n"


def _tidy(board: models.Dashboard) -> None:
    """Takes out what the SDK sets and we do not want: the menu that hides links and annotations, and
    what belongs to variables of another type."""
    assert board.links is not None
    assert board.annotations.list_val is not None
    assert board.templating.list_val is not None
    for link in board.links:
        link.placement = None  # type: ignore[assignment]  # optional in JSON
    for annotation in board.annotations.list_val:
        annotation.placement = None  # type: ignore[assignment]  # so is this
    for variable in board.templating.list_val:
        variable.auto = variable.auto_min = variable.auto_count = None


def _laid_out(sections: Sequence[Section]) -> list[models.Panel | models.RowPanel]:
    found: list[models.Panel | models.RowPanel] = []
    top = 0
    for section in sections:
        row = builders.Row(section.title).collapsed(section.collapsed).build()
        row.id_val = zlib.crc32(f"row {section.title}".encode()) % 10**6
        row.grid_pos = models.GridPos(h=1, w=WIDTH, x=0, y=top)
        found.append(row)
        bottom = _flow(section.panels, top + 1)
        if section.collapsed:
            row.panels = list(section.panels)
            top += 1
        else:
            found += section.panels
            top = bottom
    return found


def _flow(panels: Sequence[models.Panel], top: int) -> int:
    """Sets their places, from this line on. Returns the line below them."""
    left = height = 0
    for panel in panels:
        place = panel.grid_pos
        assert place is not None
        if left + place.w > WIDTH:
            left, top, height = 0, top + height, 0
        place.x, place.y = left, top
        left += place.w
        height = max(height, place.h)
    return top + height


def _source() -> builders.DatasourceVariable:
    return builders.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _variables(uid: str) -> list[Builder[models.VariableModel]]:
    """All is chosen, but on the board of one pool the first of them, and one at a time.

    All jobs are those of sidecars, one by one: other exporters have metrics of the same names. Series
    have no namespace but on Kubernetes, so all of them are any or none.
    """
    place = 'namespace=~"$namespace",job=~"$job"'
    within: Mapping[str, tuple[str, str]] = {
        "namespace": ("pgsidecar_build_info", ".*"),
        "job": ('pgsidecar_build_info{namespace=~"$namespace"}', ""),
        "instance": (f"pgsidecar_build_info{{{place}}}", ".+"),
        "pool": (f'pgsidecar_pool_connections_max{{{place},instance=~"$instance"}}', ".+"),
    }
    found: list[Builder[models.VariableModel]] = []
    for name, (series, everything) in within.items():
        query = f"label_values({series}, {name})"
        is_one = name == "pool" and uid == OF_ONE_POOL
        variable = (
            builders.QueryVariable(name)
            .label(name.capitalize())
            .datasource(SOURCE)
            .query({"query": query, "qryType": 1, "refId": "PrometheusVariableQueryEditor"})
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_CASE_INSENSITIVE_ASC)
            .multi(not is_one)
            .include_all(True)
        )
        if everything:
            variable = variable.all_value(everything)
        found.append(variable if is_one else variable.current(_ALL))
    return found


def _annotations() -> list[Builder[models.AnnotationQuery]]:
    alerts = 'ALERTS{alertname=~"PgSidecar.*",alertstate="firing",severity="%s",<alert>}'
    restarts = "changes(process_start_time_seconds{<sidecar>}[$__rate_interval]) > 0"
    return [
        *(
            _annotation(name, colour, alerts % severity)
            .enable(severity == "critical")  # a warning may last for days: a tint that says nothing
            .title_format("{{alertname}}")
            .text_format("{{severity}} {{pool}} {{instance}}")
            .tag_keys("severity,pool")
            for name, colour, severity in (
                ("Critical alerts", "red", "critical"),
                ("Warnings", "orange", "warning"),
            )
        ),
        _annotation("Restarts of the sidecar", "blue", restarts)
        .title_format("restarted")
        .text_format("{{instance}}")
        .tag_keys("instance"),
    ]


def _annotation(name: str, colour: str, expr: str) -> builders.AnnotationQuery:
    target = prometheus.Dataquery().expr(expand(expr)).ref_id("Anno").range()
    found = builders.AnnotationQuery().name(name).enable(True).icon_color(colour)
    return found.datasource(SOURCE).target(target)


def _link(uid: str) -> builders.DashboardLink:
    return (
        builders.DashboardLink(BOARDS[uid])
        .type(models.DashboardLinkType.LINK)
        .icon("dashboard")
        .url(f"/d/{uid}/{uid}")
        .include_vars(True)
        .keep_time(True)
    )
