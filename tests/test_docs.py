"""The documents say what is so: metrics, links, files, commands and examples."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest

import sidecar
from sidecar import config, config_file
from sidecar.observe.exposition import Format
from tests.metrics_page import IDLE, Page, fill

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ANY_VALUE = {"pool", "database", "user", "server", "mode", "sqlstate_class", "route", "method"} | {
    *("code", "application", "version", "revision", "python_version"),
    *("implementation", "major", "minor", "patchlevel"),
    *("fingerprint", "query"),
}
"""Labels whose values come from the configuration or are too many to be listed."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=relative)


# -- metrics ---------------------------------------------------------------------------------------


@dataclass
class Metric:
    """A family: its type, and the values of each label (none: any value)."""

    kind: str
    labels: dict[str, set[str]] = field(default_factory=dict)


ROW = re.compile(r"^\| `([a-z_]+)` \| (counter|gauge|histogram|summary) \|([^|]*)\| (\S.*) \|$")
LABEL = re.compile(r"`(\w+)`(?: \(([^)]*)\))?")


def documented() -> dict[str, Metric]:
    """The tables of docs/metrics.md."""
    found: dict[str, Metric] = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if row := ROW.match(line):
            name, kind, labels, _ = row.groups()
            assert name not in found, f"{name} has two rows"
            found[name] = Metric(
                kind,
                {label: set(re.findall("`([^`]+)`", all)) for label, all in LABEL.findall(labels)},
            )
    return found


@cache
def emitted() -> dict[str, Metric]:
    """What a page with two pools and every event says."""
    page = Page(IDLE, replace(IDLE, name="direct"))
    fill(page)
    page.recorder.http_request("/metrics", "GET", 200, 0.1)
    samples = page.samples()
    found: dict[str, Metric] = {}
    for name, (kind, _) in page.described(Format.TEXT).items():
        found[name] = metric = Metric(kind)
        for suffix in ("_bucket",) if kind == "histogram" else ("",):
            for labels in samples[name + suffix]:
                for label, value in labels:
                    if label != "le":
                        metric.labels.setdefault(label, set()).add(value)
    return found


def test_every_metric_has_a_row_and_every_row_a_metric():
    assert documented().keys() == emitted().keys()


@pytest.mark.parametrize("name", emitted())
def test_row_tells_type_and_labels(name: str):
    row = documented().get(name)
    assert row is not None, f"docs/metrics.md has no row for {name}"
    real = emitted()[name]
    assert row.kind == real.kind
    assert row.labels.keys() == real.labels.keys()
    for label, values in row.labels.items():
        assert values == (set() if label in ANY_VALUE else real.labels[label]), label


@each_document
def test_metrics_that_are_mentioned_exist(path: Path):
    known = {*emitted()}
    for name, metric in emitted().items():
        if metric.kind == "histogram":
            known |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    mentioned = set(re.findall(r"(?<!:)\bpgsidecar_[a-z_]+\b", path.read_text()))
    assert mentioned <= known
    recorded = set(
        re.findall(r"\brecord: (\S+)", (ROOT / "alerts/pgsidecar.rules.yml").read_text())
    )
    assert set(re.findall(r"\b\w+:pgsidecar_[\w:]+", path.read_text())) <= recorded


def test_buckets_are_those_of_the_histograms():
    """Every bound of every histogram stands in the section on buckets."""
    section = (ROOT / "docs/metrics.md").read_text().split("## Buckets")[1].split("\n## ")[0]
    written = set(map(float, re.findall(r"(?<![\w.\"])\d+(?:\.\d+)?", section)))
    samples = Page().samples()
    bounds = {
        float(dict(labels)["le"])
        for name, values in samples.items()
        if name.endswith("_bucket")
        for labels in values
    }
    assert bounds - {float("inf")} == written


@pytest.mark.parametrize("query", re.findall(r"```promql\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL))  # fmt: skip
def test_example_queries_are_promql(query: str, tmp_path: Path):
    """Prometheus' own parser reads them, as the expressions of rules."""
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not installed (package prometheus)"
    lines = ["groups:", "- name: examples", "  rules:"]
    for number, expression in enumerate(query.strip().split("\n\n")):
        lines += [f"  - record: example:{number}", "    expr: |"]
        lines += [f"      {line}" for line in expression.splitlines()]
    rules = tmp_path / "rules.yml"
    rules.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [promtool, "check", "rules", str(rules)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- links, files and commands ---------------------------------------------------------------------


def links(path: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@each_document
def test_links_lead_somewhere(path: Path):
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_files_that_are_mentioned_exist(path: Path):
    """From the top, or below ``sidecar``; a module may be called by its name alone."""
    made = (ROOT / ".gitignore").read_text().split()
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|md|toml|yaml)|/))`", path.read_text()):
        if not name.startswith("/") and not {name, f"/{name}"} & {*made}:
            is_there = (ROOT / name).exists() or (ROOT / "sidecar" / name).exists()
            assert is_there or any((ROOT / "sidecar").rglob(name)), name


@each_document
def test_make_targets_that_are_mentioned_exist(path: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|    )make ([a-z-]+)", path.read_text())) <= targets


def test_options_that_are_mentioned_exist():
    """In the form of a variable, as in ``PGSIDECAR__POOLS__MAIN__MAX_SIZE=10``."""
    for path in [*DOCUMENTS, ROOT / "Dockerfile"]:
        for name, value in re.findall(r"(PGSIDECAR__\w+)=([\w.]+)", path.read_text()):
            config_file.load(
                ROOT / "config.yaml", {name: value, "DATABASE_URL": "postgresql://app:x@db/app"}
            )


# -- examples --------------------------------------------------------------------------------------


def yaml_blocks(path: Path) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)


def test_example_of_the_readme_is_a_configuration():
    """Both pools with both variables, one without the second; and its figures are the defaults."""
    (example,) = (each for each in yaml_blocks(ROOT / "README.md") if "pools:" in each)
    urls = {"DATABASE_URL": "postgresql://app:x@db/app", "DIRECT_URL": "postgresql://app:x@db/app"}
    both = config_file.parse(example, urls, "README.md")
    shipped = config_file.load(ROOT / "config.yaml", urls)
    assert both == shipped
    del urls["DIRECT_URL"]
    main = config_file.parse(example, urls, "README.md").pools
    assert main.keys() == {"main"}
    text = (ROOT / "README.md").read_text()
    assert (
        f"{main['main'].max_size} connections at most, {main['main'].min_idle} kept ready" in text
    )
    assert f"{main['main'].acquire_timeout:.0f} s to wait" in text


def test_ports_of_the_readme_are_the_defaults():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"127\.0\.0\.1:(\d{4})\b", text)) == {
        str(config.ListenConfig().port),
        str(config.HttpConfig().port),
    }


def test_prometheus_takes_the_scrape_job(tmp_path: Path):
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not installed (package prometheus)"
    (job,) = (each for each in yaml_blocks(ROOT / "README.md") if "scrape_configs:" in each)
    file = tmp_path / "prometheus.yml"
    file.write_text(job)
    done = subprocess.run(
        [promtool, "check", "config", str(file)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_changelog_has_the_version():
    versions = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == sidecar.__version__


def test_licence_is_the_one_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_runs_the_tests():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


def test_readme_shows_every_picture_and_says_how_it_was_made():
    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text))
    assert shown == {relative(path) for path in (ROOT / "docs/images").glob("*.png")}
    assert "make pictures" in text
    assert "not screenshots of Grafana" in text
