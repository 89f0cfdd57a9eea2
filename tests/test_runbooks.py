"""Each alert has a runbook that says what its rule says, and names only what exists.

Read are ``alerts/`` and ``docs/runbooks``; when rules fire is tried in ``alerts/tests``.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from pydantic import BaseModel

from sidecar import cli, config, config_file
from sidecar.console.commands import Verb, parse, split
from sidecar.observe.verdict import Kind
from tests.metrics_page import IDLE, Page, fill
from tests.test_alerts import muted
from tests.test_docs import ANY_VALUE, ROOT, anchors, emitted

RUNBOOKS = ROOT / "docs/runbooks"
RULES = ROOT / "alerts/pgsidecar.rules.yml"
PAGES = [*RUNBOOKS.glob("*.md"), ROOT / "docs/alerts.md"]
HEADINGS = ["Meaning", "Impact", "Confirm", "Mitigate now", "Cure", "False alarm"]

POSTGRES = {"pg_stat_activity", "pg_terminate_backend", "pg_advisory_xact_lock", "lock_timeout"} | {
    *("max_connections", "idle_session_timeout", "keepalives_idle", "pg_isready"),
}
"""Words of PostgreSQL and libpq."""

ALERTMANAGER_WORDS = {"routing_key_file", "api_url_file", "inhibit_rules", "group_wait"} | {
    *("keep_firing_for", "runbook_url", "dashboard_url"),
}
"""Words of Prometheus and Alertmanager."""

OUTSIDE = {"job", "instance"}
"""Labels that Prometheus adds."""


# -- what there is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alert:
    name: str
    expression: str
    duration: str
    keep: str
    labels: dict[str, str]
    runbook_url: str

    @property
    def severity(self) -> str:
        return self.labels["severity"]


def rules() -> Iterator[dict[str, object]]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from group["rules"]


@cache
def alerts() -> dict[str, Alert]:
    """By name, in the order of the file."""
    found: dict[str, Alert] = {}
    for rule in rules():
        match rule:
            case {"alert": str(name), "expr": str(expression), "labels": dict(labels)}:
                annotations = rule["annotations"]
                assert isinstance(annotations, dict)
                assert name not in found, f"two rules are called {name}"
                found[name] = Alert(
                    name,
                    expression,
                    str(rule.get("for", "")),
                    str(rule.get("keep_firing_for", "")),
                    labels,
                    annotations["runbook_url"],
                )
    return found


@cache
def recorded() -> set[str]:
    return {str(rule["record"]) for rule in rules() if "record" in rule}


@cache
def options() -> set[str]:
    """Dotted paths, ``*`` for the name of a pool or user, and the last word of each."""
    found: set[str] = set()

    def walk(model: type[BaseModel], path: str) -> None:
        for name, field in model.model_fields.items():
            below = field.annotation
            found.update({f"{path}{name}", name})
            if isinstance(below, type) and issubclass(below, BaseModel):
                walk(below, f"{path}{name}.")

    walk(config.Config, "")
    for section, model in (("users", config.UserConfig), ("pools", config.PoolConfig)):
        walk(model, f"{section}.*.")
    return found


@cache
def source(folder: str) -> str:
    return "\n".join(path.read_text() for path in (ROOT / "sidecar" / folder).glob("*.py"))


@cache
def words() -> set[str]:
    """Labels and their values, verdicts, phases and reasons."""
    found = {*map(str, Kind)}
    for metric in emitted().values():
        for label, values in metric.labels.items():
            found |= {label, *values}
    return found


# -- what is written -------------------------------------------------------------------------------


def page(name: str) -> str:
    return (RUNBOOKS / f"{name}.md").read_text()


def section(name: str, heading: str) -> str:
    return page(name).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """Also those that belong to a step, without its indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def prose(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def queries(text: str) -> list[str]:
    return [query for block in blocks(text, "promql") for query in block.strip().split("\n\n")]


def commands(text: str) -> list[list[str]]:
    """Words of the lines of shell blocks."""
    lines = "\n".join(blocks(text, "sh")).replace(";\n", "; ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


each_alert = pytest.mark.parametrize("name", alerts())
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


# -- pages and alerts ------------------------------------------------------------------------------


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {*alerts(), "README"}


@each_alert
def test_link_of_the_alert_is_its_page(name: str):
    assert alerts()[name].runbook_url.rpartition("/")[2] == f"{name}.md"


@each_alert
def test_headings_are_the_same_everywhere(name: str):
    headings = re.findall(r"^(#+) (.+)$", prose(page(name)), re.MULTILINE)
    assert headings == [("#", name), *(("##", heading) for heading in HEADINGS)]


@each_alert
def test_page_can_be_read_half_awake(name: str):
    """Little more than a screen, and the first lines say what it is and whom it wakes."""
    lines = page(name).splitlines()
    assert len(lines) <= 75
    assert f"({alerts()[name].severity};" in lines[2]
    assert blocks(section(name, "Confirm"), "promql")
    assert ["pgsidecar", "why"] in [each[:2] for each in commands(section(name, "Confirm"))]
    assert re.findall(r"^(\d)\. ", section(name, "Mitigate now"), re.MULTILINE)[:2] == ["1", "2"]


@each_page
def test_code_is_narrow_enough(path: Path):
    for block in re.findall(r"```.*?```", path.read_text(), re.DOTALL):
        assert all(len(line) <= 100 for line in block.splitlines()), block


def test_index_is_the_rules():
    """In their order, with the severity, and the first sentence of each page."""
    rows = re.findall(
        r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \| (.+) \|$", page("README"), re.MULTILINE
    )
    assert [(name, file, severity) for name, file, severity, _ in rows] == [
        (each.name, each.name, each.severity) for each in alerts().values()
    ]
    for name, _, severity, sentence in rows:
        assert page(name).splitlines()[2].startswith(f"{sentence} ({severity}; ")


# -- thresholds ------------------------------------------------------------------------------------

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(duration: str) -> float:
    """As Prometheus writes it: ``1h30m``."""
    parts = re.findall(r"(\d+)([smhd])", duration)
    assert parts, duration
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def spoken(value: float) -> set[str]:
    """How a duration is said."""
    said = {f"{value:g} s", f"{value * 1000:g} ms"}
    for size, name in ((60.0, "minute"), (3600.0, "hour")):
        count = value / size
        said.add(f"{count:g} {name}" + ("s" if count != 1 else ""))
    return said


def figures(expression: str) -> list[set[str]]:
    """The figures of a rule, each as it may be said: thresholds, windows, quantiles and buckets."""
    found: list[set[str]] = []
    product = re.compile(r"\((\d[\d.]*) \* (\d[\d.]*)\)")
    expression = product.sub(lambda each: f"{float(each[1]) * float(each[2]):g}", expression)
    for _, number in re.findall(r"(>=|<=|==|>|<|!=) (\d[\d.]*)", expression):
        value = float(number)
        if value:
            found.append({f"{value:g}", f"{value * 100:g} %", *spoken(value)})
    windows = re.findall(r"(?:\[|window=\"|ratio_rate)(\d+[smhd])", expression)
    quantiles = re.findall(r"quantile(?:=\"|\()([\d.]+)", expression)
    bounds = re.findall(r"\ble=\"([\d.]+)\"", expression)
    return [
        *found,
        *(spoken(seconds(window)) for window in windows),
        *({f"P{float(quantile) * 100:g}"} for quantile in quantiles),
        *(spoken(float(bound)) for bound in bounds),
    ]


def item(name: str, label: str) -> str:
    """Of the list in Meaning, on one line; empty if there is none."""
    found = re.search(rf"^- {label}: (.*(?:\n  .*)*)", section(name, "Meaning"), re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


@each_alert
def test_condition_has_the_figures_of_the_rule_and_no_others(name: str):
    said = re.sub("`[^`]*`", "", item(name, "Condition"))
    numbers = re.findall(
        r"P\d+|\d[\d.]*(?: (?:%|ms|s|minutes?|hours?)(?!\w))?|(?<=of )\d+",
        said.replace(" is 0", ""),
    )
    wanted = figures(alerts()[name].expression)
    for forms in wanted:
        assert forms & {*numbers}, f"{forms} in: {said}"
    allowed = set().union(*wanted) | (
        {"100 %"} if "ratio >= 1\n" in alerts()[name].expression else set()
    )
    assert {*numbers} <= allowed, said


@each_alert
def test_delays_are_those_of_the_rule(name: str):
    alert = alerts()[name]
    for label, duration in (("For", alert.duration), ("Keeps firing for", alert.keep)):
        said = item(name, label)
        if duration:
            found = re.fullmatch(r"(\d+) ([smh])", said)
            assert found is not None, said
            assert f"{found[1]}{found[2]}" == duration
        else:
            assert said == ("at once" if label == "For" else "")


def test_thresholds_in_the_configuration_are_the_defaults():
    """Those that are in parentheses behind the option."""
    defaults = {**config.PoolConfig.model_fields, **config.ListenConfig.model_fields}
    for path in PAGES:
        for option, said in re.findall(r"`(\w+)` \((\d+ [smh])\)", prose(path.read_text())):
            assert defaults[option].default == seconds(said.replace(" ", "")), (path.name, option)


# -- queries ---------------------------------------------------------------------------------------


def test_queries_are_promql(tmp_path: Path):
    """Prometheus' own parser reads them, as the expressions of rules."""
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not installed (package prometheus)"
    examples = [
        {"record": f"runbook:{path.stem.lower()}:query{number}", "expr": query}
        for path in PAGES
        for number, query in enumerate(queries(path.read_text()))
    ]
    assert len(examples) > 2 * len(alerts())
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": examples}]}))
    done = subprocess.run(
        [promtool, "check", "rules", str(file)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_can_be_computed_with_several_sidecars(tmp_path: Path):
    """Parsing does not find a join that has two partners on one side."""
    page = Page(IDLE, replace(IDLE, name="direct"))
    fill(page)
    series = [
        {
            "series": name + "{" + ",".join(f"{k}={json.dumps(v)}" for k, v in all_of) + "}",
            "values": "1x10",
        }
        for name, values in page.samples().items()
        for labels in values
        for instance in ("one:9632", "two:9632")
        for all_of in [(*labels, ("job", "pgsidecar"), ("instance", instance))]
    ]
    texts = (path.read_text() for path in (*PAGES, ROOT / "docs/metrics.md"))
    found = {query: None for text in texts for query in queries(text)}
    examples = [
        {"record": f"example:query{number}", "expr": query} for number, query in enumerate(found)
    ]
    rules = {"groups": [{"name": f"g{n}", "rules": [rule]} for n, rule in enumerate(examples)]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    test = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [
            {"expr": "vector(1)", "eval_time": "8m", "exp_samples": [{"labels": "{}", "value": 1}]}
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(RULES), "rules.yml"], "evaluation_interval": "1m", "tests": [test]}
        )
    )
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not installed (package prometheus)"
    done = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=25
    )
    assert done.returncode == 0, done.stdout + done.stderr


def labels_of(metric: str) -> dict[str, set[str]]:
    """With their values; an empty set allows any. ``KeyError`` if there is no such series."""
    any_value: dict[str, set[str]] = {label: set() for label in OUTSIDE}
    if metric in recorded():
        return any_value | {"pool": set()}
    if metric == "ALERTS":
        return any_value | {"pool": set(), "alertstate": {"firing", "pending"}, "alertname": set()}
    if metric == "up":
        return any_value
    family = re.sub("_(bucket|sum|count)$", "", metric)
    if family != metric and emitted().get(family, None) is not None:
        assert emitted()[family].kind == "histogram", metric
        if metric.endswith("_bucket"):
            any_value["le"] = set()
    else:
        family = metric
    known = emitted()[family].labels
    return any_value | {
        label: set() if label in ANY_VALUE else values for label, values in known.items()
    }


def check_query(query: str) -> None:
    """Its metrics, labels and the values of labels exist."""
    bare = re.sub(r"#.*", "", query)
    allowed: dict[str, set[str]] = {}
    grouped: list[str] = []
    for names in re.findall(r"\b(?:by|without|on|ignoring|group_\w+) \(([^)]*)\)", bare):
        grouped += re.findall(r"\w+", names)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_\w+) \([^)]*\)|\[[^\]]*\]", " ", bare)
    selectors = re.findall(r"([a-zA-Z_:][\w:]*)(?![\w:(])\s*(?:\{([^}]*)\})?", bare)
    assert selectors, query
    for metric, matchers in selectors:
        if metric in ("and", "or", "unless", "bool") or re.search(rf"{metric}\s*\(", bare):
            continue
        labels = labels_of(metric)
        allowed |= labels
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
            assert label in labels, f"{metric} has no label {label}"
            if not labels[label]:
                continue
            if "~" in operator:
                for part in value.split("|"):
                    assert any(re.fullmatch(part, each) for each in labels[label]), (metric, part)
            else:
                assert value in labels[label], f"{metric} has no {label}={value}"
    assert allowed, f"no metric in: {query}"
    assert {*grouped} <= allowed.keys(), query


@each_page
def test_queries_name_what_there_is(path: Path):
    for query in queries(path.read_text()):
        check_query(query)


def test_queries_of_metrics_md_name_what_there_is():
    """The same, with the names in its tables; and each metric is in one of them."""
    text = (ROOT / "docs/metrics.md").read_text()
    examples = queries(text)
    for query in examples:
        check_query(query)
    for name in emitted():
        assert any(re.search(rf"\b{name}(_bucket|_sum|_count)?\b", each) for each in examples), name
    for name in inline(text):
        if re.fullmatch(r"(instance_pool:)?pgsidecar_[\w:]+(\{.*\})?", name):
            check_query(name.replace("\\|", "|"))


@pytest.mark.parametrize(
    "wrong",
    [
        "pgsidecar_pool_conections",
        'pgsidecar_pool_connections{status="idle"}',
        'pgsidecar_pool_connections{state="free"}',
        'pgsidecar_pool_acquires_total{outcome=~"timeout|refused"}',
        "sum by (pool, database) (rate(pgsidecar_transactions_total[5m]))",
        "rate(pgsidecar_up_bucket[5m])",
        "instance_pool:pgsidecar_pool_utilization:ratio_rate5m",
    ],
)
def test_queries_with_a_mistake_are_found(wrong: str):
    with pytest.raises((AssertionError, KeyError)):
        check_query(wrong)


# -- commands --------------------------------------------------------------------------------------


@each_page
def test_commands_exist(path: Path):
    """What the shell blocks say: psql to the console, pgsidecar, curl."""
    for command in commands(path.read_text()):
        match command:
            case ["psql", *_, "pgsidecar", "-c", text] | ["psql", *_, "pgsidecar", "-xc", text]:
                assert command[:7] == ["psql", "-h", "127.0.0.1", "-p", "6432", "-U", "admin"]
                for statement in split(text):
                    parse(statement)
            case ["psql", "$DATABASE_URL", "-c", text]:
                assert re.match(r"SELECT pg_(cancel|terminate)_backend\(31337\)$|ANALYZE$", text)
            case ["pgsidecar", *arguments]:
                cli._parser().parse_args(arguments)
            case ["kubectl", "exec", _, "-c", "pgsidecar", "--", "pgsidecar", *arguments]:
                cli._parser().parse_args(arguments)
            case ["curl", *_]:
                for url in command:
                    if url.startswith("http://127.0.0.1"):
                        check_url(url)
            case ["amtool" | "promtool" | "sed" | "kubectl" | "ping" | "pg_isready", *_]:
                pass
            case _:
                raise AssertionError(f"not known here: {command}")


def check_url(url: str) -> None:
    parts = urlsplit(url)
    assert parts.port == config.HttpConfig().port
    if parts.path in ("/livez", "/readyz", "/metrics"):
        assert f'add_get("{parts.path}"' in source("api")
        return
    contract = yaml.safe_load((ROOT / "sidecar/api/openapi.yaml").read_text())
    given = contract["paths"][parts.path]["get"].get("parameters", [])
    shared = contract["components"]["parameters"]
    known = [shared[each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in given]
    by_name = {each["name"]: each["schema"] for each in known}
    for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items():
        allowed = by_name[name].get("enum", values)
        assert {*values} <= {*allowed}, url


@each_page
def test_names_in_the_text_exist(path: Path):
    """Words of code: console commands, options, alerts, metrics, labels, columns of the console."""
    columns = {*re.findall(r"\w+", source("console"))}
    for code in inline(path.read_text()):
        first = code.split()[0]
        if first in Verb.__members__:
            if "..." not in code:
                for statement in split(code):
                    parse(statement)
        elif re.fullmatch(r"PgSidecar\w+", code):
            assert code in alerts(), code
        elif re.fullmatch(r"[a-z_.*<>]+: \S+", code):
            check_option(code)
        elif re.fullmatch(r"(users|pools|listen|http|console|statements|incidents|log)\..+", code):
            assert re.sub(r"<\w+>", "*", code) in options(), code
        elif re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", code):
            is_known = code in options() | words() | POSTGRES | ALERTMANAGER_WORDS
            is_metric = code.startswith("pgsidecar_") and labels_of(code)
            assert is_known or is_metric or code in columns, f"{code} is nothing known"


def check_option(text: str) -> None:
    """``name: value`` is an option of a pool, or with its section, with a value that it takes."""
    name, _, value = text.partition(": ")
    assert name in options(), text
    if "." in name:
        group, _, option = name.partition(".")
        load({group: {option: value}})
    else:
        load({"pools": {"main": {name: value}}})


def load(fragment: dict[str, dict[str, object]]) -> None:
    """A part of a configuration, with a pool that is enough besides."""
    pools = fragment.setdefault("pools", {"main": {}})
    for pool in pools.values():
        assert isinstance(pool, dict)
        pool.setdefault("dsn", "postgresql://app@db/app")
    config_file.parse(yaml.safe_dump(fragment), {"REPORTING_PASSWORD": "x"}, "fragment")


@each_alert
def test_examples_are_configurations(name: str):
    for block in blocks(page(name), "yaml"):
        load(yaml.safe_load(block))


def test_prometheus_takes_the_example_of_alerts_md(tmp_path: Path):
    """With the rules beside it."""
    (example,) = blocks((ROOT / "docs/alerts.md").read_text(), "yaml")
    file = tmp_path / "prometheus.yml"
    file.write_text(example.replace("/etc/prometheus/pgsidecar.rules.yml", str(RULES)))
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not installed (package prometheus)"
    done = subprocess.run(
        [promtool, "check", "config", str(file)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- inhibition ------------------------------------------------------------------------------------


@each_alert
def test_page_tells_who_mutes_whom(name: str):
    expected = {
        "Muted by": {source for source, targets in muted().items() if name in targets},
        "Mutes": muted().get(name, set()),
    }
    for label, names in expected.items():
        (said,) = re.findall(rf"^{label}: (.*(?:\n\S.*)*)$", page(name), re.MULTILINE)
        listed = {*re.findall(r"\[(\w+)\]", said)}
        if said.startswith("all but "):
            listed = {*alerts()} - {name} - listed
        assert said == "nothing" or listed, said
        assert listed == names, label


def test_way_through_the_night_leads_to_pages():
    """The order in the index names alerts, the most urgent one first, and its anchors exist."""
    night = section("README", "At 3 a.m.")
    named = re.findall(r"\]\((\w+)\.md\)", night)
    assert {*named} <= {*alerts()}
    assert {name for name, each in alerts().items() if each.severity == "critical"} <= {
        *named,
        *(name for name in alerts() if "BudgetBurn" in name),  # told together
    }
    assert {"commands", "how-they-relate"} <= anchors(RUNBOOKS / "README.md")
