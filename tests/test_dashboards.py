"""The dashboards are what the code says, valid for Grafana, and ask for what exists.

The rules are those of Grafana's dashboard-linter and some of our own. Each is a function that says what
is wrong with a dashboard; each is tried on a dashboard that breaks it, too.
"""

import copy
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards import build, limits
from dashboards.queries import all_panels, files, load, panels, substitute
from tests.test_docs import emitted

ROOT = Path(__file__).parent.parent
RULES = ROOT / "alerts/pgsidecar.rules.yml"
TYPES = ROOT / "tests/grafana"
UIDS = ("pgsidecar-overview", "pgsidecar-pool", "pgsidecar-slo", "pgsidecar-statements")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Board = dict[str, Any]
Rule = Callable[[Board], Iterator[str]]


def board(uid: str = "pgsidecar-pool") -> Board:
    return load(build.FOLDER / f"{uid}.json")


def raw_panels(board: Board) -> Iterator[Board]:
    """Those that Grafana draws, those in collapsed rows included."""
    for each in board["panels"]:
        yield from each["panels"] if each["type"] == "row" else [each]


each_board = pytest.mark.parametrize("uid", UIDS)


# -- the files -------------------------------------------------------------------------------------


def test_there_is_a_file_for_each_board():
    assert tuple(path.stem for path in files()) == UIDS
    assert tuple(sorted(build.boards())) == UIDS


@each_board
def test_committed_json_is_what_the_code_says(uid: str):
    assert (build.FOLDER / f"{uid}.json").read_text() == build.boards()[uid]


def test_generation_is_deterministic():
    assert build.boards() == build.boards()


def test_check_names_the_file_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert build.main([], tmp_path) == 0
    assert build.main(["--check"], tmp_path) == 0
    capsys.readouterr()
    (tmp_path / "pgsidecar-slo.json").write_text("{}")
    assert build.main(["--check"], tmp_path) == 1
    printed = capsys.readouterr().out
    assert "pgsidecar-slo.json" in printed
    assert "pgsidecar-pool.json" not in printed
    assert (tmp_path / "pgsidecar-slo.json").read_text() == "{}", "a check changes nothing"


def test_unknown_arguments_are_refused(tmp_path: Path):
    assert build.main(["--chek"], tmp_path) == 2
    assert not [*tmp_path.iterdir()]


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


def variables_offer_all(board: Board) -> Iterator[str]:
    variables = {v["name"]: v for v in board["templating"]["list"]}
    for name in ("job", "instance", "pool"):
        found = variables.get(name, {})
        wanted = {
            "type": "query",
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "refresh": 2,
        }
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
    """$__rate_interval; in a total of the time shown, asked for once, $__range."""
    for panel in panels(board):
        for target in panel.targets:
            for function, window in re.findall(r"(\w+)\([^()]*\[([^\]]*)\]", target.expr):
                total = target.is_instant and function == "increase" and window == "$__range"
                if window != "$__rate_interval" and not total:
                    yield f"{panel}: {function} over {window}"


def variables_select(board: Board) -> Iterator[str]:
    asking = [(str(panel), target.expr) for panel in panels(board) for target in panel.targets]
    asking += [(each["name"], each["target"]["expr"]) for each in board["annotations"]["list"]]
    for who, expr in asking:
        for name, matchers, _ in selectors(expr):
            found = {
                label: value for label, sign, value in MATCHER.findall(matchers) if sign in "=~"
            }
            wanted = {"job", "instance"} | ({"pool"} & series().get(name, {}).keys())
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
                    if label not in labels.keys() | {"job", "instance"}:
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
            known = {"job", "instance", "le"}.union(*(series().get(name, {}) for name in names))
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
    exprs = [each["target"]["expr"] for each in board["annotations"]["list"] if each["enable"]]
    if not any('ALERTS{alertname=~"PgSidecar.*",alertstate="firing"' in expr for expr in exprs):
        yield "alerts are not marked"
    if not any(expr.startswith("changes(process_start_time_seconds") for expr in exprs):
        yield "restarts are not marked"


LINT: tuple[Rule, ...] = (
    *(source_is_a_variable, variables_offer_all, texts_are_there, panels_ask),
    *(ranges_follow_the_zoom, variables_select, series_exist, groups_exist, counters_are_rated),
    *(nothing_is_nan, worst_quantile_counts, nobody_edits, ids_are_unique, places_do_not_overlap),
    *(links_lead_somewhere, usage_has_its_limit, traces_are_shown, thresholds_are_the_alerts),
    events_are_marked,
)


@each_board
@pytest.mark.parametrize("rule", LINT, ids=lambda rule: rule.__name__)
def test_board_keeps_the_rule(uid: str, rule: Rule):
    assert [*rule(board(uid))] == []


# -- and each rule can be broken -------------------------------------------------------------------


def panel_of(board: Board, title: str) -> Board:
    (found,) = (panel for panel in raw_panels(board) if panel["title"] == title)
    return found


def asking(expr: str) -> Callable[[Board], None]:
    """The first chart of the pool's board asks for this instead."""

    def change(board: Board) -> None:
        panel_of(board, "Connections by state")["targets"][0]["expr"] = expr

    return change


def without(path: str) -> Callable[[Board], None]:
    """The first chart lacks this."""

    def change(board: Board) -> None:
        del panel_of(board, "Connections by state")[path]

    return change


def setting(path: str, value: object, title: str = "") -> Callable[[Board], None]:
    """Something below the board, or below one of its panels, is this instead."""

    def change(board: Board) -> None:
        at: Any = panel_of(board, title) if title else board
        *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in way:
            at = at[key]
        at[last] = value

    return change


CHART = "Connections by state"
SELECTED = 'job=~"$job",instance=~"$instance",pool=~"$pool"'
BROKEN: list[tuple[Rule, Callable[[Board], None]]] = [
    (source_is_a_variable, setting("datasource.uid", "prometheus", CHART)),
    (source_is_a_variable, setting("targets.1.datasource.uid", "prometheus", CHART)),
    (source_is_a_variable, setting("templating.list.0.name", "source")),
    (source_is_a_variable, setting("templating.list.1.datasource.uid", "prometheus")),
    (source_is_a_variable, setting("annotations.list.0.datasource.uid", "prometheus")),
    (variables_offer_all, setting("templating.list.1.refresh", 1)),
    (variables_offer_all, setting("templating.list.2.multi", False)),
    (variables_offer_all, setting("templating.list.3.allValue", ".*")),
    (variables_offer_all, setting("templating.list.3.name", "pools")),
    (texts_are_there, without("description")),
    (texts_are_there, setting("title", "", CHART)),
    (texts_are_there, setting("description", "Connections", CHART)),
    (texts_are_there, setting("fieldConfig.defaults.unit", "", CHART)),
    (panels_ask, setting("targets", [], CHART)),
    (panels_ask, asking("")),
    (ranges_follow_the_zoom, asking(f"sum(rate(pgsidecar_pins_total{{{SELECTED}}}[5m]))")),
    (ranges_follow_the_zoom, asking(f"sum(increase(pgsidecar_pins_total{{{SELECTED}}}[$__range]))")),
    (variables_select, asking("sum(pgsidecar_up)")),
    (variables_select, asking('sum(pgsidecar_up{job=~"$job",pool=~"$pool"})')),
    (variables_select, asking('sum(pgsidecar_up{job=~"$job",instance=~"$instance"})')),
    (variables_select, asking('sum(pgsidecar_up{job!~"$job",instance=~"$instance",pool=~"$pool"})')),
    (variables_select, setting("annotations.list.1.target.expr", "process_start_time_seconds")),
    (series_exist, asking(f"sum(pgsidecar_upp{{{SELECTED}}})")),
    (series_exist, asking(f'sum(pgsidecar_up{{phase="tls",{SELECTED}}})')),
    (series_exist, asking(f'sum(pgsidecar_pool_connections{{state="busy",{SELECTED}}})')),
    (series_exist, asking(f'sum(pgsidecar_pool_connections{{state=~"used|busy",{SELECTED}}})')),
    (groups_exist, asking(f"sum by (phase) (pgsidecar_pool_connections{{{SELECTED}}})")),
    (groups_exist, setting("targets.0.legendFormat", "{{phase}}", CHART)),
    (counters_are_rated, asking(f"sum(pgsidecar_pins_total{{{SELECTED}}})")),
    (counters_are_rated, asking(f"sum(pgsidecar_query_duration_seconds_sum{{{SELECTED}}})")),
    (counters_are_rated, asking(f"rate(pgsidecar_up{{{SELECTED}}}[$__rate_interval])")),
    (nothing_is_nan, asking(f"pgsidecar_up{{{SELECTED}}} / pgsidecar_up{{{SELECTED}}}")),
    (nothing_is_nan, asking(f"pgsidecar_up{{{SELECTED}}} / (sum(pgsidecar_up{{{SELECTED}}}))")),
    (nothing_is_nan, asking("histogram_quantile(0.9, sum by (le) (x))")),
    (worst_quantile_counts, asking(f"avg(pgsidecar_query_latency_seconds{{{SELECTED}}})")),
    (worst_quantile_counts, asking(f"sum by (pool) (pgsidecar_query_latency_seconds{{{SELECTED}}})")),
    (worst_quantile_counts, asking(f"pgsidecar_query_latency_seconds{{{SELECTED}}}")),
    (nobody_edits, setting("editable", True)),
    (nobody_edits, setting("schemaVersion", 16)),
    (ids_are_unique, lambda board: setting("id", panel_of(board, CHART)["id"], "Utilization")(board)),
    (ids_are_unique, setting("targets.1.refId", "A", CHART)),
    (places_do_not_overlap, setting("gridPos.w", 13, CHART)),
    (places_do_not_overlap, setting("gridPos.x", 20, "Utilization")),
    (places_do_not_overlap, setting("gridPos.x", 0, "Connections closed, by reason")),
    (links_lead_somewhere, setting("links.0.url", "/d/pgsidecar-fleet/pgsidecar-fleet")),
    (links_lead_somewhere, setting("links.0.keepTime", False)),
    (links_lead_somewhere, setting("links.0.includeVars", False)),
    (links_lead_somewhere, setting("links", [])),
    (links_lead_somewhere, setting("links.0.url", "https://grafana.example/d/pgsidecar-slo")),
    (usage_has_its_limit, setting("targets.1.legendFormat", "most", CHART)),
    (usage_has_its_limit, setting("fieldConfig.overrides", [], CHART)),
    (traces_are_shown, setting("targets.0.exemplar", False, "P99 by operation")),
    (thresholds_are_the_alerts, setting("fieldConfig.defaults.thresholds.steps.1.value", 0.85, "Utilization")),
    (thresholds_are_the_alerts, setting("fieldConfig.defaults.thresholds.steps", [], "Fullest pool")),
    (thresholds_are_the_alerts, setting("fieldConfig.defaults.custom.thresholdsStyle", {"mode": "off"}, "Utilization")),
    (events_are_marked, setting("annotations.list.0.enable", False)),
    (events_are_marked, setting("annotations.list.1.enable", False)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "change"), BROKEN, ids=[f"{number}-{each[0].__name__}" for number, each in enumerate(BROKEN)]
)  # fmt: skip
def test_rule_finds_what_breaks_it(rule: Rule, change: Callable[[Board], None]):
    changed = copy.deepcopy(board())
    change(changed)
    assert [*rule(changed)]


def test_every_rule_is_tried():
    assert {rule for rule, _ in BROKEN} == {*LINT}


# -- Grafana's types -------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Board], None]] = {
    "unknown key of the board": setting("colour", "red"),
    "unknown key of a panel": setting("colour", "red", CHART),
    "unknown kind of panel": setting("type", "graph", CHART),
    "unknown unit": setting("fieldConfig.defaults.unit", "percents", CHART),
    "unknown option": setting("options.legends", {}, CHART),
    "unknown value of an option": setting("options.legend.placement", "left", CHART),
    "unknown style": setting("fieldConfig.defaults.custom.lineInterpolations", "linear", CHART),
    "number as a text": setting("gridPos.w", "12", CHART),
    "no place": without("gridPos"),
    "no title": without("title"),
    "unknown key of a query": setting("targets.0.query", "up", CHART),
    "unknown format of a query": setting("targets.0.format", "timeseries", CHART),
    "option of another kind": setting("options.graphMode", "none", CHART),
    "unknown type of variable": setting("templating.list.1.type", "querry"),
    "unknown mode of thresholds": setting(
        "fieldConfig.defaults.thresholds.mode", "relative", CHART
    ),
    "time without an end": setting("time", {"from": "now-1h"}),
}


@cache
def misfits(age: str) -> dict[str, list[str]]:
    """What the types of Grafana 11 or 13 say of the boards and of wrong copies; in one go, which takes
    some seconds."""
    assert shutil.which("node"), "node is not installed (package nodejs)"
    assert (TYPES / "node_modules").is_dir(), "npm ci in tests/grafana has not been run"
    changed = {}
    for name, change in WRONG.items():
        changed[name] = board()
        changed[name]["panels"] = [panel_of(changed[name], CHART)]  # less to read
        change(changed[name])
    changed["as it is"] = board() | {"panels": [panel_of(board(), CHART)]}
    return type_check(age, {uid: board(uid) for uid in UIDS} | changed)


def type_check(age: str, boards: dict[str, Board]) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, content in enumerate(boards.values()):
            paths.append(Path(folder) / f"{number}.json")
            paths[-1].write_text(json.dumps(content, indent=2, sort_keys=True))
        done = subprocess.run(
            ["node", "check.mjs", age, *map(str, paths)],
            cwd=TYPES,
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: found[f"{number}.json"] for number, name in enumerate(boards)}


each_age = pytest.mark.parametrize("age", ["old", "new"])


@each_age
@each_board
def test_board_is_of_grafanas_types(uid: str, age: str):
    assert misfits(age)[uid] == []


@each_age
@pytest.mark.parametrize("name", WRONG)
def test_grafanas_types_refuse(name: str, age: str):
    assert misfits(age)["as it is"] == []
    assert misfits(age)[name]


# -- PromQL ----------------------------------------------------------------------------------------


def promtool(exprs: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    assert program is not None, "promtool is not installed (package prometheus)"
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(exprs)]
    file = folder / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    return subprocess.run(
        [program, "check", "rules", str(file)], capture_output=True, text=True, timeout=20
    )


def expressions() -> list[str]:
    found = [target.expr for panel in all_panels() for target in panel.targets]
    for uid in UIDS:
        found += [each["target"]["expr"] for each in board(uid)["annotations"]["list"]]
    return [substitute(expr) for expr in found]


def test_every_query_is_promql(tmp_path: Path):
    done = promtool(expressions(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_refuses_what_is_not_promql(tmp_path: Path):
    assert promtool([*expressions(), "sum by pool (up)"], tmp_path).returncode != 0


def test_macros_and_variables_are_put_in():
    assert (
        substitute('rate(x{job=~"$job",pool=~"${pool:regex}"}[$__rate_interval])')
        == 'rate(x{job=~".+",pool=~".+"}[1m])'
    )
    with pytest.raises(KeyError):
        substitute("up[$__interval_ms]")


# -- in step with alerts and metrics ---------------------------------------------------------------

LIMITS = {
    "PgSidecarPoolNearExhaustion": limits.NEARLY_FULL,
    "PgSidecarPoolExhausted": limits.FULL,
    "PgSidecarConnectionErrorRateHigh": limits.ERROR_RATE,
    "PgSidecarQueryLatencyP99High": limits.SLOW_QUERY,
    "PgSidecarAcquireWaitHigh": limits.SLOW_ACQUIRE,
    "PgSidecarPingSlow": limits.SLOW_PING,
    "PgSidecarQueryStuck": limits.STUCK,
    "PgSidecarIdleInTransaction": limits.STUCK,
    "PgSidecarPinShareHigh": limits.PINNED,
    "PgSidecarEventLoopLag": limits.LATE_LOOP,
    "PgSidecarErrorBudgetBurnFast": limits.BURN_FAST * limits.ERROR_BUDGET,
    "PgSidecarErrorBudgetBurnSlow": limits.BURN_SLOW * limits.ERROR_BUDGET,
    "PgSidecarLatencyBudgetBurnFast": limits.BURN_FAST * limits.SLOW_BUDGET,
    "PgSidecarLatencyBudgetBurnSlow": limits.BURN_SLOW * limits.SLOW_BUDGET,
}


def compared(expr: str) -> float:
    """What the first comparison of an alert is with, that of a denominator with 0 left out."""
    comparison = re.compile(r"[><]=?\s*\(?([\d.]+)(?:\s*\*\s*([\d.]+))?")
    values = [float(a) * float(b or 1) for a, b in comparison.findall(expr)]
    return next(value for value in values if value > 0)


@pytest.mark.parametrize("name", LIMITS)
def test_limit_is_that_of_the_alert(name: str):
    assert compared(alerts()[name]) == pytest.approx(LIMITS[name])


def test_objective_is_that_of_the_recording_rules():
    exprs = [expr for name, expr in recorded().items() if "slow_queries" in name]
    assert exprs
    for expr in exprs:
        assert f'le="{limits.LATENCY_OBJECTIVE}"' in expr


def test_lines_of_the_objectives_are_the_alerts():
    """Shares change colour at burn rate times budget, burn rates at the burn rate."""
    for panel in panels(board("pgsidecar-slo")):
        if panel.type == "timeseries":
            factor = limits.BURN_FAST if "fast" in panel.title else limits.BURN_SLOW
            of_errors = panel.title.startswith("Connections")
            budget = limits.ERROR_BUDGET if of_errors else limits.SLOW_BUDGET
            expected = factor * budget if "share" in panel.title else factor
            (step,) = panel.steps
            assert step == pytest.approx(expected), panel.title


def test_windows_of_a_burn_rate_are_those_of_its_alert():
    for panel in panels(board("pgsidecar-slo")):
        if panel.type == "timeseries":
            speed = "Fast" if "fast" in panel.title else "Slow"
            kind = "Error" if panel.title.startswith("Connections") else "Latency"
            alert = alerts()[f"PgSidecar{kind}BudgetBurn{speed}"]
            shown = {name for target in panel.targets for name, _, _ in selectors(target.expr)}
            assert shown == set(re.findall(r"instance_pool:\w+:\w+", alert)), panel.title


def test_every_metric_is_on_a_board():
    """What nobody looks at need not be measured."""
    asked = {
        name
        for panel in all_panels()
        for target in panel.targets
        for name, _, _ in selectors(target.expr)
    }
    families = asked | {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert emitted().keys() - families == set()


def test_every_recording_rule_is_on_a_board():
    asked = {name for expr in expressions() for name, _, _ in selectors(expr)}
    assert recorded().keys() <= asked


def test_first_row_answers_the_page():
    """Is it full, who waits, who holds it, what is the verdict, is the database up: without scrolling."""
    shown = [panel.title for panel in panels(board())]
    assert shown[:5] == ["Fullest pool", "Clients waiting", "Top holder", "Verdict", "PostgreSQL"]
