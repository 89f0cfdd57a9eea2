"""The alerts fire when they should, say what they should, and reach whom they should.

The cases are in ``alerts/tests``, for promtool, one file for each group of rules. Here they are run, and it is
seen to that no alert goes without, that no case is idle (a rule that is changed fails them), and that rules
and Alertmanager's routes are of one kind: names, severities, texts, what mutes what.
"""

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.metrics_page import Page
from tests.test_docs import ANY_VALUE, ROOT, emitted

RULES = ROOT / "alerts/pgsidecar.rules.yml"
ALERTMANAGER = ROOT / "alerts/alertmanager.example.yml"
CASES = sorted((ROOT / "alerts/tests").glob("*.yml"))
RECORDINGS = "pgsidecar.rules"
RUNBOOKS, GRAFANA = "https://runbooks.example.com", "https://grafana.example.com"
DASHBOARDS = {path.stem for path in (ROOT / "dashboards").glob("*.json")}

Tree = dict[str, Any]


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alert:
    name: str
    group: str
    expression: str
    holds: str
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def severity(self) -> str:
        return self.labels["severity"]

    @property
    def description(self) -> str:
        return self.annotations["description"]

    @property
    def file(self) -> Path:
        return ROOT / "alerts/tests" / f"{self.group.removeprefix('pgsidecar.')}.yml"


@cache
def read(path: Path) -> Tree:
    tree: Tree = yaml.load(path.read_text(), yaml.CSafeLoader)
    return tree


def rules() -> Iterator[tuple[str, Tree]]:
    for group in read(RULES)["groups"]:
        for rule in group["rules"]:
            yield group["name"], rule


ALERTS = [
    Alert(
        rule["alert"], group, rule["expr"], rule.get("for", "0s"), rule["labels"], rule["annotations"]
    )
    for group, rule in rules()
    if "alert" in rule
]  # fmt: skip
RECORDED = {rule["record"]: rule["expr"] for _, rule in rules() if "record" in rule}
BY_NAME = {alert.name: alert for alert in ALERTS}

each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def cases(path: Path) -> list[Tree]:
    found: list[Tree] = read(path)["tests"]
    return found


def asserted(alert: Alert) -> Iterator[tuple[str, list[Tree]]]:
    """When, and which alerts, as its cases say."""
    for test in cases(alert.file):
        for case in test.get("alert_rule_test", []):
            if case["alertname"] == alert.name:
                yield case["eval_time"], case["exp_alerts"]


def firing(alert: Alert) -> list[Tree]:
    return [fired for _, found in asserted(alert) for fired in found]


def names(test: Tree) -> set[str]:
    """The rules that a test asks for."""
    alerts = {case["alertname"] for case in test.get("alert_rule_test", [])}
    expressions = " ".join(case["expr"] for case in test.get("promql_expr_test", []))
    return alerts | {
        name for name in (*BY_NAME, *RECORDED) if re.search(rf"\b{name}\b", expressions)
    }


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program)
    assert found is not None, (
        f"{program} is not installed (packages prometheus, prometheus-alertmanager)"
    )
    return subprocess.run(
        [found, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=25,
        env={**os.environ, "GOGC": "800"},  # less time, more memory
    )


def passes(program: str, *arguments: str | Path) -> str:
    done = run(program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the cases -------------------------------------------------------------------------------------


def test_prometheus_reads_the_rules():
    assert f"{len(ALERTS) + len(RECORDED)} rules found" in passes(
        "promtool", "check", "rules", RULES
    )


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_cases_pass(path: Path):
    passes("promtool", "test", "rules", path)


def test_each_group_has_a_file_of_cases():
    """A file that no group has is one whose cases are missed below."""
    assert {alert.file for alert in ALERTS} == set(CASES)
    for path in CASES:
        assert read(path)["rule_files"] == ["../pgsidecar.rules.yml"]


def test_cases_have_names_of_their_own():
    for path in CASES:
        claims = [(test["name"], tuple(sorted(names(test)))) for test in cases(path)]
        assert len(claims) == len(set(claims))


@each_alert
def test_alert_has_cases_that_fire_and_cases_that_do_not(alert: Alert):
    assert any(found for _, found in asserted(alert))
    assert any(not found for _, found in asserted(alert))


@each_alert
def test_whole_text_is_asserted_with_labels_of_kubernetes(alert: Alert):
    """Labels that Prometheus' discovery adds are still there when it pages: somebody routes by them."""
    fired = firing(alert)
    for one in fired:
        assert one["exp_annotations"].keys() == alert.annotations.keys()
    if "$labels.instance" in alert.description:
        assert any("namespace" in one["exp_labels"] for one in fired)


ALWAYS_THERE = {"PgSidecarPinShareHigh"}
"""What the text asks for is what the expression has found."""


@each_alert
def test_text_is_asserted_with_and_without_what_may_be_missing(alert: Alert):
    """Who, which statement and which verdict are not always known."""
    texts = {one["exp_annotations"]["description"] for one in firing(alert)}
    may_be_missing = '| label "' in alert.description and alert.name not in ALWAYS_THERE
    assert len(texts) >= (2 if may_be_missing else 1)


@each_alert
def test_asserted_text_is_clean(alert: Alert):
    """Neither holes nor what Go writes for a value that a template could not show."""
    for one in firing(alert):
        for text in one["exp_annotations"].values():
            assert not re.search(
                r"\s\s|\s[,.;:]|%!|NaN|Inf|<no value>|<nil>|(?<!\w)-0|\.\.", text
            ), text
            assert text == text.strip()


def test_recording_rules_have_values_asserted():
    expressions = [
        case["expr"] for path in CASES for test in cases(path) for case in test.get("promql_expr_test", [])
    ]  # fmt: skip
    for name in RECORDED:
        assert any(name in expression for expression in expressions), name


# -- mutations -------------------------------------------------------------------------------------

NO_FOR = (r"\n *for: \S+", "")
NO_KEEPING = (r"\n *keep_firing_for: \S+", "")
NO_SECOND_CONDITION = (r"\n +and\n.*", "")
ALSO_WITHOUT_SERVER = (r"\n +unless\n +max_over_time.*", "")
NOT_WHILE_PINGS_FAIL = (r"max_over_time\(pgsidecar_up\[1m\]\) == 0", "pgsidecar_up == 0")
ANY_INSTANCE = (r'instance=%q,pool=%q" \$labels.job \$labels.instance', 'pool=%q" $labels.job')
ANY_POOL = (
    r',pool=%q" \$labels.job \$labels.instance \$labels.pool',
    '" $labels.job $labels.instance',
)
LEAST = (r"topk\(1,", "bottomk(1,")
ONLY_USED = (r"state!=\\\"idle\\\"", r'state=\\"used\\"')
ALSO_HEALTHY = (r",kind!=\\\"healthy\\\"", "")
BURN = [
    (r"expr: \|2\s+instance_pool:\S+ > \(.+\)\s+and", "expr: |2"),  # only the short window
    (r"\n +and\n +instance_pool:.*", ""),  # only the long one
    (">= 10", ">= 9"),
    (">= 10", "> 10"),
    ("> 1800", ">= 1800"),
    ("> 1800", "> 2100"),
    (r"and on \(job, instance\)\s+time\(\) - process_start_time_seconds > 1800", ""),
]
FAST = [("14.4", "14.2"), ("14.4", "14.6"), *BURN]
SLOW = [(r"\(6 \*", "(5.8 *"), (r"\(6 \*", "(6.2 *"), *BURN]
WINDOWS = ("5m", "30m", "1h", "6h")

MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "instance_pool:pgsidecar_pool_utilization:ratio": [
        (r"used\|connecting", "used"), (r"used\|connecting", "used|connecting|idle"), ("sum without", "max without"),
        (r"\(pgsidecar_pool_connections_max > 0\)", "pgsidecar_pool_connections_max"),
    ],
    **{
        f"instance_pool:pgsidecar_connection_errors:ratio_rate{window}": [
            (rf"\[{window}\]", "[2h]"), (r"\) > 0\)", "))"), ('"error"', '"ok"'), ("sum without", "avg without"),
        ]
        for window in WINDOWS
    },
    **{
        f"instance_pool:pgsidecar_slow_queries:ratio_rate{window}": [
            (rf"\[{window}\]", "[2h]"), (r"\) > 0\)", "))"), ("sum without", "max without"), (r" 1\n", " 0.9\n"), ("0.1", "0.2"),
        ]
        for window in WINDOWS
    },
    "PgSidecarDown": [
        ('{job="pgsidecar"}', ""), ("== 0", "<= 1"), NO_FOR, ("for: 1m", "for: 45s"), ("for: 1m", "for: 75s"),
    ],
    "PgSidecarAbsent": [NO_FOR, ("for: 5m", "for: 285s"), ("for: 5m", "for: 315s")],
    "PgSidecarDatabaseDown": [
        ("== 0", "<= 1"), NO_FOR, ("for: 30s", "for: 15s"), ("for: 30s", "for: 45s"), NO_KEEPING, ("for: 6m", "for: 345s"), ("for: 6m", "for: 375s"),
        (r"%s\} > 0\)", "%s})"), ANY_INSTANCE, LEAST,
    ],
    "PgSidecarConnectionErrorRateHigh": [
        (">= 0.01", ">= 0.0101"), (">= 0.01", ">= 0.009"), (">= 0.01", "> 0.01"), (">= 20", "> 20"), (">= 20", ">= 19"), NO_SECOND_CONDITION,
        (r"round\((\S+), 1e-6\)", r"\1"), ("1e-6", "0.01"), (">= 2\n", ">= 1\n"),
        NO_FOR, ("for: 1m", "for: 45s"), ("for: 1m", "for: 75s"), ANY_INSTANCE, LEAST, ONLY_USED,
    ],
    "PgSidecarReconnecting": [
        ("> 5\n", ">= 5\n"), ("> 5\n", "> 6\n"), (r"\[5m\]", "[15m]"), ("sum without", "max without"),
        NO_FOR, ("for: 10m", "for: 585s"), ("for: 10m", "for: 615s"), (r",reason=~[^}]+", ""), ANY_INSTANCE, LEAST,
    ],
    "PgSidecarPingSlow": [("> 1\n", ">= 1\n"), ("> 1\n", "> 1.2\n"), ("0.99", "0.9"), NO_FOR, ("for: 5m", "for: 285s"), ("for: 5m", "for: 315s")],
    "PgSidecarPoolNearExhaustion": [
        (">= 0.8", "> 0.8"), (">= 0.8", ">= 0.81"), (">= 0.8", ">= 0.799"), ALSO_WITHOUT_SERVER, NO_FOR, ("for: 1m", "for: 45s"), ("for: 1m", "for: 75s"),
        NO_KEEPING, ("for: 2m", "for: 105s"), ("for: 2m", "for: 135s"), ANY_INSTANCE, LEAST, ALSO_HEALTHY, ONLY_USED,
    ],
    "PgSidecarPoolExhausted": [
        (">= 1\n", "> 1\n"), (">= 1\n", ">= 0.96\n"), ("requests > 0", "requests > 1"), ("requests > 0", "requests >= 0"), NO_SECOND_CONDITION,
        ALSO_WITHOUT_SERVER, NOT_WHILE_PINGS_FAIL,
        NO_FOR, ("for: 30s", "for: 15s"), ("for: 30s", "for: 45s"), NO_KEEPING, ("for: 6m", "for: 345s"), ("for: 6m", "for: 375s"),
        ANY_INSTANCE, ANY_POOL, LEAST, ONLY_USED,
    ],
    "PgSidecarAcquireTimeouts": [
        (r"timeout\|rejected", "timeout"), (r"timeout\|rejected", "rejected"), (r"timeout\|rejected", "timeout|rejected|cancelled"),
        ("> 0\n", "> 1\n"), ("> 0\n", ">= 0\n"), (r"\[5m\]", "[6m]"), NO_FOR, ("for: 1m", "for: 45s"), ("for: 1m", "for: 75s"), ANY_POOL,
    ],
    "PgSidecarAcquireWaitHigh": [
        ("> 0.5\n", ">= 0.5\n"), ("> 0.5\n", "> 0.6\n"), ("0.99", "0.9"), NO_FOR, ("for: 5m", "for: 285s"), ("for: 5m", "for: 315s"), ANY_INSTANCE, LEAST,
    ],
    "PgSidecarConnectionLeak": [("> 0\n", "> 1\n"), ("> 0\n", ">= 0\n"), ANY_POOL, LEAST],
    "PgSidecarIdleInTransaction": [("> 60", ">= 60"), ("> 60", "> 61"), NO_FOR, ("for: 1m", "for: 45s"), ("for: 1m", "for: 75s"), ANY_INSTANCE],
    "PgSidecarPinShareHigh": [
        (">= 0.5", "> 0.5"), (">= 0.5", ">= 0.51"), (">= 0.5", ">= 0.499"), ('{reason!="session_mode"}', ""), ("sum without", "max without"),
        NO_FOR, ("for: 5m", "for: 285s"), ("for: 5m", "for: 315s"), ANY_INSTANCE, LEAST,
    ],
    "PgSidecarSlowQueries": [("> 0\n", "> 1\n"), ("> 0\n", ">= 0\n"), (r"\[5m\]", "[6m]"), ANY_INSTANCE, LEAST, (r",quantile=\\\"0.99\\\"", "")],
    "PgSidecarQueryStuck": [(">= 60", "> 60"), (">= 60", ">= 61"), (">= 60", ">= 59"), NO_FOR, ("for: 30s", "for: 15s"), ("for: 30s", "for: 45s")],
    "PgSidecarQueryLatencyP99High": [
        (">= 5\n", "> 5\n"), (">= 5\n", ">= 4.9\n"), (">= 5\n", ">= 5.01\n"), (">= 20", "> 20"), (">= 20", ">= 19"), NO_SECOND_CONDITION,
        ('{quantile="0.99",window="5m"}', '{quantile="0.99"}'), ('{quantile="0.99",window="5m"}', '{window="5m"}'),
        ('samples{window="5m"}', "samples"), NO_FOR, ("for: 1m", "for: 45s"), ("for: 1m", "for: 75s"), ANY_INSTANCE, LEAST,
    ],
    "PgSidecarErrorBudgetBurnFast": FAST,
    "PgSidecarErrorBudgetBurnSlow": SLOW,
    "PgSidecarLatencyBudgetBurnFast": FAST,
    "PgSidecarLatencyBudgetBurnSlow": SLOW,
    "PgSidecarEventLoopLag": [("> 0.05", ">= 0.05"), ("> 0.05", "> 0.06"), ("0.99", "0.9"), NO_FOR, ("for: 5m", "for: 285s"), ("for: 5m", "for: 315s")],
    "PgSidecarConfigReloadFailed": [("== 0", "== 1"), ("== 0", "<= 1")],
}  # fmt: skip
"""By rule: regular expressions, and what each becomes. The cases have to notice every one."""


def block(name: str) -> str:
    """The rule as it is written."""
    found = re.search(
        rf"      - (?:alert|record): {name}\n(?:(?!      [-#]|  - |\n).*\n)*", RULES.read_text()
    )
    assert found is not None, name
    return found[0]


def mutants(name: str) -> Iterator[tuple[str, Tree]]:
    """What was changed, and the rule."""
    text = block(name)
    for pattern, becomes in MUTATIONS[name]:
        mutant = re.sub(pattern, becomes, text)
        assert mutant != text, f"{name} has no {pattern}"
        yield f"{pattern} -> {becomes}", yaml.safe_load(mutant)[0]


def about(name: str, file: Path) -> list[Tree]:
    """What the tests of a file say about one rule."""
    return [
        {
            **test,
            "alert_rule_test": [
                case for case in test.get("alert_rule_test", []) if case["alertname"] == name
            ],
            "promql_expr_test": [
                case for case in test.get("promql_expr_test", []) if name in case["expr"]
            ],
        }
        for test in cases(file)
        if name in names(test)
    ]


def without_texts(tests: list[Tree]) -> list[Tree]:
    """Only when and where it fires: texts take promtool most of the time."""
    if values := [{**test, "alert_rule_test": []} for test in tests if test["promql_expr_test"]]:
        return values
    result = copy.deepcopy(tests)
    for test in result:
        for case in test["alert_rule_test"]:
            for alert in case["exp_alerts"]:
                alert.pop("exp_annotations", None)
    return result


def write(path: Path, tree: Tree) -> None:
    path.write_text(json.dumps(tree))  # which is YAML, too


@pytest.mark.parametrize("name", MUTATIONS)
def test_cases_notice_each_mutation(name: str, tmp_path: Path):
    """Without them, cases that assert nothing would pass as well as those that do."""
    original: Tree = yaml.safe_load(block(name))[0]
    needed = [rule for _, rule in rules() if rule.get("record", "none") in original["expr"]]
    recordings = [{"name": RECORDINGS, "rules": needed}] if needed else []
    group = BY_NAME[name].group if name in BY_NAME else RECORDINGS
    file = next(path for path in CASES for test in cases(path) if name in names(test))
    changed: dict[str, str] = {}
    for number, (change, rule) in enumerate([("nothing", original), *mutants(name)]):
        tests = about(name, file)
        if rule.get("annotations") == original.get("annotations") and rule is not original:
            rule.pop("annotations", None)
            tests = without_texts(tests)
        tree = {**read(file), "rule_files": [f"rules{number}.yml"], "tests": tests}
        changed[f"cases{number}.yml"] = change
        write(tmp_path / f"cases{number}.yml", tree)
        write(
            tmp_path / f"rules{number}.yml",
            {"groups": [*recordings, {"name": group, "rules": [rule]}]},
        )
    passes("promtool", "check", "rules", *tmp_path.glob("rules*.yml"))
    done = run("promtool", "test", "rules", *(tmp_path / each for each in changed))
    survivors = re.findall(r"Unit Testing:  \S*/(\S+)\n  SUCCESS", done.stdout)
    assert [changed[each] for each in survivors] == ["nothing"], done.stderr


def test_each_rule_is_mutated():
    assert MUTATIONS.keys() == {*BY_NAME, *RECORDED}


# -- style -----------------------------------------------------------------------------------------


@each_alert
def test_alert_is_written_like_the_others(alert: Alert):
    """As monitoring mixins have it, so that routes, dashboards and readers can rely on it."""
    assert re.fullmatch(r"PgSidecar([A-Z][a-z0-9]+)+(P99High)?", alert.name)
    assert alert.severity in {"critical", "warning"}
    assert alert.annotations.keys() == {"summary", "description", "runbook_url", "dashboard_url"}
    assert re.fullmatch(r"[A-Z0-9][^{}\n]*\.", alert.annotations["summary"])
    assert alert.annotations["runbook_url"] == f"{RUNBOOKS}/{alert.name}.md"
    assert alert.annotations["dashboard_url"].startswith(
        tuple(f"{GRAFANA}/d/{uid}" for uid in DASHBOARDS)
    )
    assert "First step: " in alert.description
    assert re.search(r"[.?]$", alert.description)
    if alert.name != "PgSidecarAbsent":
        assert "$labels.instance" in alert.description
        assert (
            "var-instance={{ $labels.instance | urlquery }}" in alert.annotations["dashboard_url"]
        )


def test_there_are_four_dashboards():
    assert len(DASHBOARDS) == 4
    for path in (ROOT / "dashboards").glob("*.json"):
        assert json.loads(path.read_text())["uid"] == path.stem


def test_names_are_used_once():
    assert len(BY_NAME) == len(ALERTS)
    assert len(RECORDED) + len(ALERTS) == len(list(rules()))


@pytest.mark.parametrize("alert", [alert for alert in ALERTS if alert.severity == "critical"], ids=lambda alert: alert.name)  # fmt: skip
def test_who_is_paged_reads_which_pool(alert: Alert):
    if alert.name == "PgSidecarDown":  # all of its pools
        return
    assert "$labels.pool" in alert.description
    assert "var-pool={{ $labels.pool | urlquery }}" in alert.annotations["dashboard_url"]


@pytest.mark.parametrize(
    "name",
    ["PoolNearExhaustion", "PoolExhausted", "AcquireTimeouts", "ConnectionErrorRateHigh", "QueryLatencyP99High"],
)  # fmt: skip
def test_saturation_is_told_in_numbers(name: str):
    """Used, limit, waiting: who is woken need not open a dashboard to see them."""
    for metric in ("pool_connections{", "pool_connections_max{", "pool_pending_requests{"):
        assert f"pgsidecar_{metric}" in BY_NAME[f"PgSidecar{name}"].description


@pytest.mark.parametrize("name", ["PoolNearExhaustion", "PoolExhausted", "AcquireTimeouts"])
def test_saturation_names_holder_and_verdict(name: str):
    for metric in ("pool_connections_held{", "verdict{"):
        assert f"pgsidecar_{metric}" in BY_NAME[f"PgSidecar{name}"].description


THRESHOLDS = {
    "PgSidecarPoolNearExhaustion": (r"pool_utilization:ratio >= 0\.8$", "1m"),
    "PgSidecarSlowQueries": (r"increase\(pgsidecar_slow_queries_total\[5m\]\)\) > 0$", "0s"),
    "PgSidecarQueryLatencyP99High": (r'quantile="0\.99",window="5m"\}\) >= 5$', "1m"),
    "PgSidecarConnectionErrorRateHigh": (r"ratio_rate5m, 1e-6\) >= 0\.01$[^$]+attempts_total\[5m\]\)\) >= 20$", "1m"),
    "PgSidecarErrorBudgetBurnFast": (r"1h > \(14\.4 \* 0\.001\)$[^$]+5m > \(14\.4 \* 0\.001\)$", "0s"),
    "PgSidecarErrorBudgetBurnSlow": (r"6h > \(6 \* 0\.001\)$[^$]+30m > \(6 \* 0\.001\)$", "0s"),
    "PgSidecarLatencyBudgetBurnFast": (r"1h > \(14\.4 \* 0\.01\)$[^$]+5m > \(14\.4 \* 0\.01\)$", "0s"),
    "PgSidecarLatencyBudgetBurnSlow": (r"6h > \(6 \* 0\.01\)$[^$]+30m > \(6 \* 0\.01\)$", "0s"),
}  # fmt: skip


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_are_those_that_were_asked_for(name: str):
    expression, holds = THRESHOLDS[name]
    assert re.search(expression, BY_NAME[name].expression, re.MULTILINE)
    assert BY_NAME[name].holds == holds


def test_queries_are_slow_from_5_s_on():
    """SlowQueries counts what the sidecar calls slow."""
    page = Page()
    assert page.value("slow_query_threshold_seconds", pool="main") == 5


# -- what the rules ask for ------------------------------------------------------------------------

SELECTOR = re.compile(
    r"(?<![\w:$.])(up|process_\w+|pgsidecar_\w+|instance_pool:[\w:]+)\b(?:\{([^}]*)\})?"
)
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
OUTSIDE = {"job", "instance"}
"""Labels that Prometheus adds."""


def asked() -> Iterator[tuple[str, str]]:
    """Expressions of the rules, and of the templates in their texts."""
    for _, rule in rules():
        name = rule.get("alert") or rule["record"]
        yield name, rule["expr"]
        for template in re.findall(
            r'printf "((?:[^"\\]|\\.)*pgsidecar(?:[^"\\]|\\.)*)"',
            rule.get("annotations", {}).get("description", ""),
        ):
            yield name, template.replace('\\"', '"').replace("%s", "")


QUESTIONS = sorted(set(asked()))


def family(series: str) -> str:
    """The metric that a series belongs to."""
    known = emitted()
    short = re.sub(r"_(bucket|count|sum)$", "", series)
    return short if short in known and known[short].kind == "histogram" else series


@pytest.mark.parametrize(("name", "expression"), QUESTIONS, ids=[name for name, _ in QUESTIONS])
def test_metrics_and_labels_of_expressions_exist(name: str, expression: str):
    found = SELECTOR.findall(expression)
    assert found
    labels = set(OUTSIDE)
    for series, matchers in found:
        if series == "up":
            assert matchers == 'job="pgsidecar"'
            continue
        if series.startswith("instance_pool:"):
            assert series in RECORDED
            labels.add("pool")
            continue
        metric = emitted()[family(series)]
        labels |= {*metric.labels, *(["le"] if metric.kind == "histogram" else [])}
        for label, operator, value in MATCHER.findall(matchers):
            if label == "le":
                assert value in buckets(series)
            elif label not in ANY_VALUE:
                values = value.split("|") if "~" in operator else [value]
                assert set(values) <= metric.labels[label], label
    for words in re.findall(r"(?:by|without|on|ignoring|group_left) \(([^)]*)\)", expression):
        assert {word.strip() for word in words.split(",")} <= labels


@cache
def buckets(series: str) -> set[str]:
    return {dict(labels)["le"] for labels in Page().samples()[series]}


@each_alert
def test_labels_of_texts_exist(alert: Alert):
    text = " ".join(alert.annotations.values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels_of(alert)
    known = {label for metric in emitted().values() for label in metric.labels}
    assert set(re.findall(r'\| label "(\w+)"', text)) <= known


# -- Alertmanager ----------------------------------------------------------------------------------


def labels_of(alert: Alert) -> set[str]:
    """Those that it always has, as its cases say; beside them what the discovery adds."""
    return set.intersection(*({*one["exp_labels"]} for one in firing(alert)))


def test_alertmanager_reads_its_example():
    passes("amtool", "check-config", ALERTMANAGER)


@each_alert
def test_critical_goes_to_the_pager_and_warning_to_the_chat(alert: Alert):
    labels = {"alertname": alert.name, **firing(alert)[0]["exp_labels"]}
    receiver = passes(
        "amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}",
        *(f"{name}={value}" for name, value in labels.items()),
    )  # fmt: skip
    assert receiver.split() == [{"critical": "pager", "warning": "chat"}[alert.severity]]


def chosen(matchers: list[str]) -> set[str]:
    """The alerts that all of the matchers match."""
    found = set(BY_NAME)
    for matcher in matchers:
        label, operator, value = re.fullmatch(MATCHER, matcher).groups()  # type: ignore[union-attr]  # or it fails
        assert label == "alertname"
        pattern = value if "~" in operator else re.escape(value)
        found = {
            name for name in found if bool(re.fullmatch(pattern, name)) != operator.startswith("!")
        }
    return found


INHIBITIONS: list[Tree] = read(ALERTMANAGER)["inhibit_rules"]


def muted() -> dict[str, set[str]]:
    """By alert, those that it mutes."""
    found: dict[str, set[str]] = {}
    for rule in INHIBITIONS:
        for source in chosen(rule["source_matchers"]):
            found.setdefault(source, set()).update(chosen(rule["target_matchers"]) - {source})
    return found


@pytest.mark.parametrize("rule", INHIBITIONS, ids=lambda rule: rule["source_matchers"][0])
def test_both_sides_of_an_inhibition_have_its_labels(rule: Tree):
    """A label that neither has is equal, too: an alert on one sidecar would mute those on all."""
    sources, targets = chosen(rule["source_matchers"]), chosen(rule["target_matchers"])
    assert sources
    assert targets
    for name in sources | targets:
        assert {*rule["equal"]} <= labels_of(BY_NAME[name]), name
    assert {"job", "instance"} <= {*rule["equal"]}
    if all("pool" in labels_of(BY_NAME[name]) for name in sources | targets):
        assert "pool" in rule["equal"]


@pytest.mark.parametrize("rule", INHIBITIONS, ids=lambda rule: rule["source_matchers"][0])
def test_inhibitions_name_alerts_that_exist(rule: Tree):
    for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
        value = matcher.split('"')[1]
        prefix, _, alternatives = value.partition("(")
        for alternative in alternatives.removesuffix(")").split("|"):
            assert any(re.fullmatch(prefix + alternative, name) for name in BY_NAME), alternative


def test_no_warning_mutes_a_page():
    for source, targets in muted().items():
        if BY_NAME[source].severity == "warning":
            assert not [name for name in targets if BY_NAME[name].severity == "critical"], source


def test_no_two_alerts_mute_each_other():
    """Nor several in a ring: all would be silent."""
    graph = muted()

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            for name in graph.get(ahead.pop(), set()) - found:
                found.add(name)
                ahead.append(name)
        return found

    assert not [name for name in graph if name in reached(name)]


MUTES = {
    "PgSidecarDown": {alert.name for alert in ALERTS} - {"PgSidecarDown", "PgSidecarAbsent"},
    "PgSidecarDatabaseDown": {
        *("PgSidecarAcquireTimeouts", "PgSidecarAcquireWaitHigh", "PgSidecarReconnecting"),
        *("PgSidecarConnectionErrorRateHigh", "PgSidecarPingSlow", "PgSidecarQueryLatencyP99High"),
        *("PgSidecarErrorBudgetBurnFast", "PgSidecarErrorBudgetBurnSlow", "PgSidecarQueryStuck"),
        *("PgSidecarLatencyBudgetBurnFast", "PgSidecarLatencyBudgetBurnSlow"),
        "PgSidecarSlowQueries",
    },
    "PgSidecarPoolExhausted": {
        *("PgSidecarPoolNearExhaustion", "PgSidecarAcquireTimeouts", "PgSidecarAcquireWaitHigh"),
        *("PgSidecarConnectionErrorRateHigh", "PgSidecarErrorBudgetBurnFast"),
        "PgSidecarErrorBudgetBurnSlow",
    },
    "PgSidecarConnectionErrorRateHigh": {
        "PgSidecarErrorBudgetBurnFast",
        "PgSidecarErrorBudgetBurnSlow",
    },
    "PgSidecarErrorBudgetBurnFast": {"PgSidecarErrorBudgetBurnSlow"},
    "PgSidecarQueryLatencyP99High": {
        *(
            "PgSidecarLatencyBudgetBurnFast",
            "PgSidecarLatencyBudgetBurnSlow",
            "PgSidecarSlowQueries",
        ),
    },
    "PgSidecarLatencyBudgetBurnFast": {"PgSidecarLatencyBudgetBurnSlow"},
    "PgSidecarQueryStuck": {"PgSidecarSlowQueries"},
    "PgSidecarConnectionLeak": {"PgSidecarIdleInTransaction"},
}
"""The whole of it: what mutes what is decided here, and written as regular expressions there."""


def test_causes_mute_their_symptoms_and_nothing_else():
    assert muted() == MUTES


@pytest.mark.parametrize("cause", ["PgSidecarDatabaseDown", "PgSidecarPoolExhausted"])
def test_a_cause_lasts_as_long_as_its_symptoms_are_seen(cause: str):
    """They look 5 minutes back: a cause that is over before them would have them page."""
    [rule] = [rule for _, rule in rules() if rule.get("alert") == cause]
    assert rule["keep_firing_for"] == "6m"
