"""What the dashboards ask and the alerts name, against a real sidecar under the demo's load.

One stack (``deploy.observe``), scraped and evaluated by a real Prometheus with the shipped rules, whose
durations are divided: every panel's query has to find figures, every metric that is named has to be there with the
labels it is asked by, and whatever the sidecar says has to be of use somewhere.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from dashboards.queries import Panel, all_panels, substitute
from deploy.observe.processes import Prometheus
from deploy.observe.stack import Stack, running

ROOT = Path(__file__).parent.parent
RULES = ROOT / "alerts/pgsidecar.rules.yml"
FACTOR = 60.0
PATIENCE = 90.0  # seconds until all has happened that panels show; 25 on an idle machine

OURS = r"(?:(?:pgsidecar|process|instance_pool:pgsidecar|scrape)_[a-z0-9_:]+|python_info)"
SELECTOR = re.compile(rf"(?<![\w/.-])({OURS}|up|ALERTS)(?![\w(])(\{{[^}}]*\}})?")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
COMPUTED = {"le", "quantile"}
WRONG = [
    "pgsidecar_pool_connection",
    'pgsidecar_pool_connections{state="active"}',
    'pgsidecar_pool_connections{mode="used"}',
    "sum by (states) (pgsidecar_pool_connections)",
    'pgsidecar_query_duration_seconds_bucket{le="5"}',
    "1 + 1",
]
"""Which this test has to see, or it sees nothing."""


# -- what is asked ---------------------------------------------------------------------------------


def in_rules() -> Iterator[tuple[str, str]]:
    """Expressions by where they are: those of the rules, and those in the texts of the alerts."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            name = rule.get("alert", rule.get("record"))
            yield name, rule["expr"]
            for text in rule.get("annotations", {}).values():
                for found in re.findall(r'printf "((?:[^"\\]|\\.)*)"', text):
                    if "pgsidecar_" in found:
                        yield name, re.sub(r"%s,?", "", found.replace('\\"', '"'))


def in_dashboards() -> Iterator[tuple[str, str]]:
    for panel in all_panels():
        for target in panel.targets:
            yield str(panel), ask(target.expr)


def in_documents() -> Iterator[tuple[str, str]]:
    """The examples of the documentation and of the runbooks."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL):
            for expression in block.strip().split("\n\n"):
                yield str(path.relative_to(ROOT)), expression


def ask(expression: str) -> str:
    return substitute(expression, rate_interval="10s", range="1m")


def selectors(expression: str) -> Iterator[tuple[str, str]]:
    for name, matchers in SELECTOR.findall(expression):
        # one pool or instance of an example is not ours
        yield name, re.sub(r'\b(?:pool|instance|application)="[^"]*",?', "", matchers or "")


# -- what is there ---------------------------------------------------------------------------------


def unanswered(prometheus: Prometheus, panels: list[Panel]) -> list[tuple[Panel, str]]:
    """Queries that find nothing, or no number, with their panels."""
    found = []
    for panel in panels:
        for target in panel.targets:
            values = [value for _, value in prometheus.query(ask(target.expr))]
            if not values or any(map(math.isnan, values)):
                found.append((panel, f"{ask(target.expr)}: {values[:5]}"))
    return found


def mistakes(stack: Stack, panel: Panel) -> Iterator[str]:
    """What no panel may show at any time: no number, or what is of Alertmanager, which is scraped, too.
    And a chart has a line for the last half minute."""
    instance = stack.sidecar.removeprefix("http://")
    for target in panel.targets:
        for labels, value in stack.prometheus.query(ask(target.expr)):
            if math.isnan(value):
                yield f"{panel}: NaN of {labels}"
            if labels.get("instance", instance) != instance:
                yield f"{panel}: {labels} is not ours"
        if not target.is_instant:
            now = time.time()
            found = stack.prometheus.ask(
                "query_range", query=ask(target.expr), start=f"{now - 30}", end=f"{now}", step="1"
            )
            if not found["result"] and not panel.may_be_empty:
                yield f"{panel}: nothing in {ask(target.expr)}"


def make_trouble(dsn: str) -> None:
    """A client's connection is lost amid its query; the load has all other kinds of trouble."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        try:
            conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        except psycopg.OperationalError:
            pass


@pytest.mark.timeout(240)
def test_panels_rules_and_metrics_fit_together() -> None:
    with running(factor=FACTOR, every="500ms") as stack:
        prometheus = stack.prometheus
        deadline = time.monotonic() + PATIENCE
        left = all_panels()
        assert len(left) > 60
        while left:
            why = unanswered(prometheus, left)
            left = [panel for panel in left if any(panel is each for each, _ in why)]
            is_late = time.monotonic() > deadline
            assert not is_late, "\n".join(f"{panel}: {query}" for panel, query in why)
            make_trouble(stack.dsn)
            time.sleep(0.5)
        others = [mistake for panel in all_panels() for mistake in mistakes(stack, panel)]
        assert not others, "\n".join(others)

        known = labels_by_name(prometheus)
        for where, expression in (*in_rules(), *in_dashboards(), *in_documents()):
            wrong_ones = misfits(prometheus, known, expression)
            assert not wrong_ones, f"{where}: {wrong_ones}"
        for wrong in WRONG:
            assert misfits(prometheus, known, wrong), f"{wrong} is as wrong as can be"

        used = {
            re.sub("_(bucket|sum|count)$", "", name)
            for _, expression in (*in_rules(), *in_dashboards())
            for name, _ in selectors(expression)
        }
        emitted = families(prometheus)
        documented = set(
            re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
        )
        assert emitted - documented == set()
        assert emitted - used == set(), "of use to nobody: a panel, a rule, or not at all"


def misfits(prometheus: Prometheus, labels: dict[str, set[str]], expression: str) -> list[str]:
    """Selectors that no series answers, and labels to group by that none has."""
    found = list(selectors(expression))
    if not found:
        return [f"no metric in {expression}"]
    nowhere = [
        f"{name}{matchers}"
        for name, matchers in found
        if not prometheus.ask("series", **{"match[]": name + matchers})
    ]
    made = set(re.findall(r'label_(?:replace|join)\([^"]*"(\w+)"', expression))
    known = made.union(COMPUTED, *(labels.get(name, set()) for name, _ in found))
    for group in GROUPING.findall(expression):
        wanted = {label.strip() for label in group.split(",")} - {""}
        nowhere += [f"{label} in {expression}" for label in wanted - known]
    return nowhere


def labels_by_name(prometheus: Prometheus) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for series in prometheus.ask("series", **{"match[]": '{__name__=~".+"}'}):
        found.setdefault(series["__name__"], set()).update(series)
    return found


def families(prometheus: Prometheus) -> set[str]:
    """What the sidecar exports, by the names of the documentation: counters with their suffix."""
    names = prometheus.names()
    found = set()
    for series in prometheus.ask("series", **{"match[]": '{job="pgsidecar"}'}):
        name = series["__name__"]
        base = re.sub("_(bucket|sum|count)$", "", name)
        found.add(base if f"{base}_bucket" in names else name)
    return {name for name in found if re.match("(pgsidecar|process|python)_", name)}
