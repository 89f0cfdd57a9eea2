"""The rules that a dashboard has to keep: those of Grafana's dashboard-linter, and some of our own.

Each is a function that says what is wrong with a dashboard. What metrics, labels and rules there are is
read from the sidecar and from alerts/. ``test_dashboards`` tries each of them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dashboards import limits
from dashboards.queries import panels
from tests.test_docs import emitted

RULES = Path(__file__).parent.parent / "alerts/pgsidecar.rules.yml"
UIDS = ("pgsidecar-overview", "pgsidecar-pool", "pgsidecar-slo", "pgsidecar-statements")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMN, UNSIZED = 59, 150
"""Pixels of a column of Grafana's grid on a screen of 1440, and of a table's column without a width."""

Board = dict[str, Any]
Rule = Callable[[Board], Iterator[str]]


def raw_panels(board: Board) -> Iterator[Board]:
    """Those that Grafana draws, those in collapsed rows included."""
    for each in board["panels"]:
        yield from each["panels"] if each["type"] == "row" else [each]


# -- what can be asked for -------------------------------------------------------------------------


@cache
def recorded() -> dict[str, str]:
    """Expressions of the recording rules by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = (rule for group in groups for rule in group["rules"] if "record" in rule)
    return {rule["record"]: rule["expr"] for rule in rules}


@cache
def alerts() -> dict[str, str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = (rule for group in groups for rule in group["rules"] if "alert" in rule)
    return {rule["alert"]: rule["expr"] for rule in rules}


@cache
def series() -> dict[str, dict[str, set[str]]]:
    """Labels with their values (none: any) of every series that a panel may ask for."""
    found: dict[str, dict[str, set[str]]] = {}
    for name, metric in emitted().items():
        labels = metric.labels
        if metric.kind == "histogram":
            found[f"{name}_bucket"] = labels | {"le": set()}
            found[f"{name}_sum"] = found[f"{name}_count"] = labels
        else:
            found[name] = labels
    found |= {name: {"pool": set()} for name in recorded()}
    found["up"] = {}
    found["ALERTS"] = {label: set() for label in ("alertname", "alertstate", "severity", "pool")}
    return found


def is_counter(name: str) -> bool:
    family = re.sub(r"_(bucket|sum|count)$", "", name)
    metric = emitted().get(name) or emitted().get(family)
    return metric is not None and metric.kind in ("counter", "histogram")


GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right) *\([^)]*\)")
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)(\{[^}]*\})?(?!\w| *\()")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
WORDS = {"and", "or", "unless", "bool", "offset"}


def selectors(expr: str) -> Iterator[tuple[str, str, str]]:
    """Of each series in an expression: its name, its matchers, and what stands before it."""
    plain = re.sub(r"\[[^\]]*\]", "[]", GROUPING.sub(" ", expr))
    for found in SELECTOR.finditer(plain):
        if found[1] not in WORDS and not plain[: found.start()].endswith('"'):
            yield found[1], found[2] or "", plain[: found.start()]


def operands(expr: str) -> Iterator[str]:
    """What stands on the right of each division."""
    plain = re.sub(r'"[^"]*"', lambda quoted: "_" * len(quoted[0]), expr)
    for slash in re.finditer(r" / ", plain):
        rest, depth = plain[slash.end() :], 0
        for place, character in enumerate(rest):
            depth += (character == "(") - (character == ")")
            if depth < 0 or (depth == 0 and character == ")"):
                yield expr[slash.end() : slash.end() + place + (depth == 0)]
                break
        else:
            yield rest


# -- the rules -------------------------------------------------------------------------------------


def source_is_a_variable(board: Board) -> Iterator[str]:
    variables = board["templating"]["list"]
    if not any(v["name"] == "datasource" and v["type"] == "datasource" for v in variables):
        yield "there is no variable for the data source"
    asking = [v for v in variables if v["type"] == "query"] + board["annotations"]["list"]
    for panel in raw_panels(board):
        asking += [panel, *panel["targets"]]
    for each in asking:
        if each.get("datasource") != SOURCE:
            yield f"{each.get('title', each)} has a data source of its own"


PLACE = {"namespace", "job", "instance"}
"""Labels by which Prometheus tells sidecars apart."""


def variables_offer_all(board: Board) -> Iterator[str]:
    variables = {v["name"]: v for v in board["templating"]["list"]}
    everything = {"namespace": ".*", "job": None, "instance": ".+", "pool": ".+"}
    for name, all_of_them in everything.items():
        found = variables.get(name, {})
        wanted = {
            "type": "query",
            "multi": True,
            "includeAll": True,
            "allValue": all_of_them,
            "refresh": 2,
        }
        if name == "pool" and board["uid"] == "pgsidecar-pool":
            wanted |= {"multi": False, "current": None}  # the sum of several pools is not one
        wrong = [key for key, value in wanted.items() if found.get(key) != value]
        if wrong:
            yield f"variable {name}: {wrong}"


def texts_are_there(board: Board) -> Iterator[str]:
    for panel in panels(board):
        if not panel.title or not panel.unit:
            yield f"{panel} has no title or no unit"
        if len(panel.description) < 40 or not re.search(r"[.?]$", panel.description):
            yield f"{panel}: a description is a sentence or two"


def panels_ask(board: Board) -> Iterator[str]:
    for panel in panels(board):
        if not panel.targets or not all(target.expr for target in panel.targets):
            yield f"{panel} asks for nothing"


def ranges_follow_the_zoom(board: Board) -> Iterator[str]:
    """$__rate_interval, but not in what is asked for once: it may be seconds there, so that is over 5 m,
    or a total of the time shown. That is also what the choice of a chart's series may depend on."""
    for panel in panels(board):
        for target in panel.targets:
            asked = re.findall(r"(\w+)\([^()]*\[([^\]]*)\]( @ end\(\))?", target.expr)
            for function, window, at_end in asked:
                once = "$__range" if function == "increase" else "5m"
                wanted = once if target.is_instant else "$__rate_interval"
                if window != ("$__range" if at_end else wanted):
                    yield f"{panel}: {function} over {window}"


def variables_select(board: Board) -> Iterator[str]:
    asking = [(str(panel), target.expr) for panel in panels(board) for target in panel.targets]
    asking += [(each["name"], each["target"]["expr"]) for each in board["annotations"]["list"]]
    for who, expr in asking:
        for name, matchers, _ in selectors(expr):
            found = {
                label: value for label, sign, value in MATCHER.findall(matchers) if sign in "=~"
            }
            wanted = PLACE | ({"pool"} & series().get(name, {}).keys())
            for label in wanted:
                may_lack = f"${label}|" if name == "ALERTS" else f"${label}"
                is_without = label == "pool" and found.get("pool") == ""
                if found.get(label) != may_lack and not is_without:
                    yield f"{who}: {name} is not selected by {label}"


def series_exist(board: Board) -> Iterator[str]:
    for panel in panels(board):
        for target in panel.targets:
            for name, matchers, _ in selectors(target.expr):
                labels = series().get(name)
                if labels is None:
                    yield f"{panel}: there is no {name}"
                    continue
                for label, sign, value in MATCHER.findall(matchers):
                    if label not in labels.keys() | PLACE:
                        yield f"{panel}: {name} has no label {label}"
                    elif "$" not in value and labels.get(label) and label != "fingerprint":
                        values = set(value.split("|")) if "~" in sign else {value}
                        if not values <= labels[label]:
                            yield f"{panel}: {name} has no {label}={value}"


def groups_exist(board: Board) -> Iterator[str]:
    """Labels in by() and in legends are those of some series in the query."""
    for panel in panels(board):
        for target in panel.targets:
            names = [name for name, _, _ in selectors(target.expr)]
            known = {"le"}.union(PLACE, *(series().get(name, {}) for name in names))
            grouped = re.findall(r"\bby \(([^)]*)\)", target.expr)
            asked = {label for each in grouped for label in re.split(r", *", each)}
            asked |= set(re.findall(r"\{\{(\w+)\}\}", target.legend))
            if asked - known:
                yield f"{panel}: no series has {asked - known}"


def counters_are_rated(board: Board) -> Iterator[str]:
    for panel in panels(board):
        for target in panel.targets:
            for name, _, before in selectors(target.expr):
                inside = re.search(r"\b(rate|irate|increase|changes|resets)\($", before)
                if is_counter(name) and not inside:
                    yield f"{panel}: {name} is a counter"
                if inside and not is_counter(name) and inside[1] in ("rate", "irate", "increase"):
                    yield f"{panel}: {name} is no counter"


def nothing_is_nan(board: Board) -> Iterator[str]:
    for panel in panels(board):
        for target in panel.targets:
            for divisor in operands(target.expr):
                if not re.fullmatch(r"[\d.]+|(scalar)?\(.* > 0\)", divisor, re.DOTALL):
                    yield f"{panel}: {divisor} may be 0"
            if "histogram_quantile" in target.expr and not target.expr.endswith(">= 0"):
                yield f"{panel}: the quantile of nothing is NaN"


def worst_quantile_counts(board: Board) -> Iterator[str]:
    """Quantiles of several sidecars cannot be averaged or summed."""
    for panel in panels(board):
        for target in panel.targets:
            plain = re.sub(r" by \([^)]*\)", "", target.expr)
            if re.search(r"\bavg\b", plain):
                yield f"{panel}: avg"
            for found in re.finditer(
                r"(\w*) ?\(pgsidecar_(query|statement)_latency_seconds", plain
            ):
                if found[1] != "max":
                    yield f"{panel}: {found[1]} of a quantile"
            if "latency_seconds{" in plain and "max" not in plain:
                yield f"{panel}: a quantile as it is"


def nobody_edits(board: Board) -> Iterator[str]:
    if board.get("editable") is not False:
        yield "it can be edited in Grafana"
    if not 36 <= board["schemaVersion"] <= 42:
        yield "Grafana 11 may not read it"


def ids_are_unique(board: Board) -> Iterator[str]:
    ids = [panel["id"] for panel in raw_panels(board)]
    ids += [each["id"] for each in board["panels"] if each["type"] == "row"]
    yield from (f"two panels have id {id}" for id, count in Counter(ids).items() if count > 1)
    for panel in panels(board):
        letters = [target.ref_id for target in panel.targets]
        if len({*letters}) < len(letters) or not all(letters):
            yield f"{panel}: queries {letters}"


def places_do_not_overlap(board: Board) -> Iterator[str]:
    """On the open board, and within each collapsed row."""
    rows = (row for row in board["panels"] if row["type"] == "row" and row["collapsed"])
    for group in (board["panels"], *(row["panels"] for row in rows)):
        taken: dict[tuple[int, int], str] = {}
        for each in group:
            place = each["gridPos"]
            if place["x"] < 0 or place["w"] < 1 or place["x"] + place["w"] > 24:
                yield f"{each['title']} is wider than the board"
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    if (x, y) in taken:
                        yield f"{each['title']} covers {taken[x, y]}"
                    taken[x, y] = each["title"]


def links_lead_somewhere(board: Board) -> Iterator[str]:
    for link in board["links"]:
        if not (link["keepTime"] and link["includeVars"]):
            yield f"{link['title']} loses time or variables"
    if {link["url"].split("/")[-1] for link in board["links"]} != {*UIDS} - {board["uid"]}:
        yield "the other boards are not linked"
    for url in re.findall(r'"url": "([^"]*)"', json.dumps(board)):
        found = re.match(r"/d/([\w-]+)/", url)
        if found is None or found[1] not in UIDS:
            yield f"{url} leads nowhere"
        if "?" in url and "${__url_time_range}" not in url:
            yield f"{url} loses the time"


def usage_has_its_limit(board: Board) -> Iterator[str]:
    """A chart of connections in use has the limit as a dashed line, one of shares a threshold."""
    usage = re.compile(r"pgsidecar_(pool_connections|pool_connections_held|client_connections)\{")
    for panel in panels(board):
        exprs = [target.expr for target in panel.targets]
        if panel.type != "timeseries" or not any(map(usage.search, exprs)):
            continue
        overrides = panel.json["fieldConfig"]["overrides"]  # type: ignore[index]  # JSON
        dashed = any(
            each["matcher"]["options"] == "/limit$/"
            and any(p["id"] == "custom.lineStyle" for p in each["properties"])
            for each in overrides
        )
        has_limit = any(target.legend.endswith("limit") for target in panel.targets)
        if not (dashed and has_limit):
            yield f"{panel} has no line for the limit"


def traces_are_shown(board: Board) -> Iterator[str]:
    for panel in panels(board):
        for target in panel.targets:
            is_latency = "quantile(" in target.expr and "query_duration_seconds_b" in target.expr
            if is_latency and panel.type == "timeseries" and not target.has_exemplars:
                yield f"{panel}: exemplars are off"


def thresholds_are_the_alerts(board: Board) -> Iterator[str]:
    """Where a panel shows what an alert looks at, it changes colour where the alert fires."""
    utilization, latency = (limits.NEARLY_FULL, limits.FULL), (0.1, limits.SLOW_QUERY)
    wanted = {
        "instance_pool:pgsidecar_pool_utilization:ratio": utilization,
        "pgsidecar_pool_connections_used_peak": utilization,
        "instance_pool:pgsidecar_connection_errors:ratio_rate5m": (limits.ERROR_RATE,),
        "pgsidecar_query_latency_seconds": latency,
    }
    for panel in panels(board):
        if panel.type not in ("timeseries", "stat") or board["uid"] == "pgsidecar-slo":
            continue
        for name in {name for target in panel.targets for name, _, _ in selectors(target.expr)}:
            if panel.steps != wanted.get(name, panel.steps):
                yield f"{panel}: {panel.steps}"
        if panel.type == "timeseries" and panel.steps:
            custom = panel.json["fieldConfig"]["defaults"]["custom"]  # type: ignore[index]  # JSON
            if custom.get("thresholdsStyle") != {"mode": "dashed"}:
                yield f"{panel}: no lines at its thresholds"


def events_are_marked(board: Board) -> Iterator[str]:
    """Warnings on demand only: one that stands would tint all charts for as long."""
    is_shown = {each["target"]["expr"]: each["enable"] for each in board["annotations"]["list"]}
    for severity, wanted in (("critical", True), ("warning", False)):
        alerts = f'ALERTS{{alertname=~"PgSidecar.*",alertstate="firing",severity="{severity}"'
        if [shown for expr, shown in is_shown.items() if expr.startswith(alerts)] != [wanted]:
            yield f"alerts that are {severity}: they are to be marked: {wanted}"
    restarts = [expr for expr in is_shown if expr.startswith("changes(process_start_time_seconds")]
    if not restarts or not is_shown[restarts[0]]:
        yield "restarts are not marked"


def legends_are_whole(board: Board) -> Iterator[str]:
    """Below a chart a table has room for two series; of more, or any number, it stands on the right, or is
    a list with one figure each."""
    for panel in panels(board):
        options: Any = panel.json["options"]
        if panel.type != "timeseries":
            continue
        legend = options["legend"]
        if legend["displayMode"] == "list":
            if len(legend["calcs"]) > 1:
                yield f"{panel}: the list is too long"
        elif legend["placement"] != "right":
            height = panel.json["gridPos"]["h"]  # type: ignore[index]  # JSON
            any_number = any("{{" in target.legend for target in panel.targets)
            if any_number or len(panel.targets) > 2 or height < 8:
                yield f"{panel}: the legend is cut off"


def axes_have_a_top(board: Board) -> Iterator[str]:
    """Grafana's own, of zeros alone, is 100 or 10000 %; and lines of shares are always in view."""
    for panel in panels(board):
        if panel.type != "timeseries" or panel.unit in ("bytes", "Bps"):
            continue
        custom = panel.json["fieldConfig"]["defaults"]["custom"]  # type: ignore[index]  # JSON
        are_in_view = panel.unit == "percentunit" or "burn rate" in panel.title
        least = max(panel.steps, default=0) if are_in_view else 0
        if not custom.get("axisSoftMax", 0) >= least or not custom.get("axisSoftMax"):
            yield f"{panel}: the axis ends at {custom.get('axisSoftMax')}"


def counts_are_whole(board: Board) -> Iterator[str]:
    """increase() extrapolates: 5.01 queries."""
    for panel in panels(board):
        counts = [
            each
            for each in panel.targets
            if re.match(r"(sum\b[^(]*(\([^)]*\) )?\()?increase", each.expr)
        ]
        defaults: Any = panel.json["fieldConfig"]
        is_drawn = panel.type in ("stat", "timeseries")
        if counts and is_drawn and defaults["defaults"].get("decimals") != 0:
            yield f"{panel}: counts with decimals"


def tables_fit(board: Board) -> Iterator[str]:
    """All columns and their headings are in view, and cells without a value say so, without colour."""
    for panel in panels(board):
        if panel.type != "table":
            continue
        raw: Any = panel.json
        found = {
            each["matcher"]["options"]: {p["id"]: p["value"] for p in each["properties"]}
            for each in raw["fieldConfig"]["overrides"]
        }
        organized = raw["transformations"][-1]["options"]
        names = [organized["renameByName"].get(name, name) for name in organized["indexByName"]]
        widths = {name: found.get(name, {}).get("custom.width", UNSIZED) for name in names}
        if sum(widths.values()) > COLUMN * raw["gridPos"]["w"] - 8:
            yield f"{panel}: {widths} are too wide"
        yield from (
            f"{panel}: {name} is cut off" for name in names if 8 * len(name) + 10 > widths[name]
        )
        if not found.get("/.*/", {}).get("noValue"):
            yield f"{panel}: empty cells say what is meant for the panel"
        for name, properties in found.items():
            special = [
                each["options"]
                for each in properties.get("mappings", [])
                if each["type"] == "special"
            ]
            colours = {each["match"]: each["result"]["color"] for each in special}
            if "custom.cellOptions" in properties and colours != {"null+nan": "transparent"}:
                yield f"{panel}: empty cells of {name} have a colour"


LINT: tuple[Rule, ...] = (
    *(source_is_a_variable, variables_offer_all, texts_are_there, panels_ask),
    *(ranges_follow_the_zoom, variables_select, series_exist, groups_exist, counters_are_rated),
    *(nothing_is_nan, worst_quantile_counts, nobody_edits, ids_are_unique, places_do_not_overlap),
    *(links_lead_somewhere, usage_has_its_limit, traces_are_shown, thresholds_are_the_alerts),
    *(events_are_marked, legends_are_whole, axes_have_a_top, counts_are_whole, tables_fit),
)
