"""The dashboards are what the code says, valid for Grafana, and ask for what exists.

The rules are in ``dashboard_lint``; each is tried on a dashboard that breaks it, too.
"""

import copy
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards import build, limits
from dashboards.queries import all_panels, files, load, panels, substitute
from tests.dashboard_lint import (
    LINT,
    UIDS,
    Board,
    Rule,
    alerts,
    axes_have_a_top,
    counters_are_rated,
    counts_are_whole,
    events_are_marked,
    groups_exist,
    ids_are_unique,
    legends_are_whole,
    links_lead_somewhere,
    nobody_edits,
    nothing_is_nan,
    panels_ask,
    places_do_not_overlap,
    ranges_follow_the_zoom,
    raw_panels,
    recorded,
    selectors,
    series_exist,
    source_is_a_variable,
    tables_fit,
    texts_are_there,
    thresholds_are_the_alerts,
    traces_are_shown,
    usage_has_its_limit,
    variables_offer_all,
    variables_select,
    worst_quantile_counts,
)
from tests.test_docs import emitted

TYPES = Path(__file__).parent / "grafana"


def board(uid: str = "pgsidecar-pool") -> Board:
    return load(build.FOLDER / f"{uid}.json")


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


# -- the rules -------------------------------------------------------------------------------------


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


def once(expr: str) -> Callable[[Board], None]:
    """The first figure of the pool's board asks for this instead."""
    return setting("targets.0.expr", expr, "Pool used")


def override(id: str, value: object) -> Callable[[Board], None]:
    """This of every column that has it, in the table of alerts."""

    def change(board: Board) -> None:
        for each in panel_of(board, TABLE)["fieldConfig"]["overrides"]:
            for one in each["properties"]:
                if one["id"] == id:
                    one["value"] = value

    return change


def without(path: str) -> Callable[[Board], None]:
    """The first chart lacks this."""

    def change(board: Board) -> None:
        at: Any = panel_of(board, CHART)
        *way, last = path.split(".")
        for key in way:
            at = at[key]
        del at[last]

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


CHART, TABLE = "Connections by state", "Firing alerts"
SELECTED = 'namespace=~"$namespace",job=~"$job",instance=~"$instance",pool=~"$pool"'
BROKEN: list[tuple[Rule, Callable[[Board], None]]] = [
    (source_is_a_variable, setting("datasource.uid", "prometheus", CHART)),
    (source_is_a_variable, setting("targets.1.datasource.uid", "prometheus", CHART)),
    (source_is_a_variable, setting("templating.list.0.name", "source")),
    (source_is_a_variable, setting("templating.list.1.datasource.uid", "prometheus")),
    (source_is_a_variable, setting("annotations.list.0.datasource.uid", "prometheus")),
    (variables_offer_all, setting("templating.list.1.refresh", 1)),
    (variables_offer_all, setting("templating.list.2.multi", False)),
    (variables_offer_all, setting("templating.list.2.allValue", ".+")),  # every exporter's job
    (variables_offer_all, setting("templating.list.4.allValue", ".*")),
    (variables_offer_all, setting("templating.list.4.name", "pools")),
    (variables_offer_all, setting("templating.list.4.multi", True)),
    (variables_offer_all, setting("templating.list.4.current", {"text": "All", "value": "$__all"})),
    (texts_are_there, without("description")),
    (texts_are_there, setting("title", "", CHART)),
    (texts_are_there, setting("description", "Connections", CHART)),
    (texts_are_there, setting("fieldConfig.defaults.unit", "", CHART)),
    (panels_ask, setting("targets", [], CHART)),
    (panels_ask, asking("")),
    (ranges_follow_the_zoom, asking(f"sum(rate(pgsidecar_pins_total{{{SELECTED}}}[5m]))")),
    (ranges_follow_the_zoom, asking(f"sum(increase(pgsidecar_pins_total{{{SELECTED}}}[$__range]))")),
    (ranges_follow_the_zoom, asking(f"sum(rate(pgsidecar_pins_total{{{SELECTED}}}[5m] @ end()))")),
    (ranges_follow_the_zoom, once(f"sum(rate(pgsidecar_pins_total{{{SELECTED}}}[$__rate_interval]))")),
    (ranges_follow_the_zoom, once(f"sum(increase(pgsidecar_pins_total{{{SELECTED}}}[5m]))")),
    (ranges_follow_the_zoom, once(f"sum(rate(pgsidecar_pins_total{{{SELECTED}}}[$__range]))")),
    (variables_select, asking("sum(pgsidecar_up)")),
    (variables_select, asking(f"sum(pgsidecar_up{{{SELECTED.replace('job=~', 'job!~')}}})")),
    *(
        (variables_select, asking(f"sum(pgsidecar_up{{{re.sub(one, '', SELECTED)}}})"))
        for one in ("namespace[^,]*,", "job[^,]*,", "instance[^,]*,", ",pool.*")
    ),
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
    (thresholds_are_the_alerts, setting("fieldConfig.defaults.thresholds.steps", [], "Pool used")),
    (thresholds_are_the_alerts, setting("fieldConfig.defaults.custom.thresholdsStyle", {"mode": "off"}, "Utilization")),
    (events_are_marked, setting("annotations.list.0.enable", False)),
    (events_are_marked, setting("annotations.list.1.enable", True)),
    (events_are_marked, setting("annotations.list.1.target.expr", "")),
    (events_are_marked, setting("annotations.list.2.enable", False)),
    (legends_are_whole, setting("options.legend.placement", "bottom", CHART)),
    (legends_are_whole, setting("options.legend.placement", "bottom", "Queries, by operation")),
    (legends_are_whole, setting("options.legend.displayMode", "list", CHART)),
    (legends_are_whole, setting("options.legend.displayMode", "table", "Timeouts, by kind")),
    (legends_are_whole, setting("gridPos.h", 7, "Peak of use within a minute")),
    (axes_have_a_top, without("fieldConfig.defaults.custom.axisSoftMax")),
    (axes_have_a_top, setting("fieldConfig.defaults.custom.axisSoftMax", 0.9, "Utilization")),
    (counts_are_whole, setting("fieldConfig.defaults.decimals", 1, "Slow queries in this time")),
    (counts_are_whole, setting("fieldConfig.defaults.decimals", None, "Timeouts, by kind")),
    (tables_fit, setting("gridPos.w", 8, TABLE)),
    (tables_fit, override("custom.width", 70)),
    (tables_fit, override("mappings", [])),
    (tables_fit, setting("fieldConfig.overrides", [], TABLE)),
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
        == 'rate(x{job=~"pgsidecar",pool=~".+"}[1m])'
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
    assert shown[:5] == ["Pool used", "Clients waiting", "Top holder", "Verdict", "PostgreSQL"]
