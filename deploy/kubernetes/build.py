"""Kubernetes objects made of files that others own: the alert rules and the dashboards.

    python -m deploy.kubernetes.build [--check]

Owns: how ``alerts/pgsidecar.rules.yml`` becomes a PrometheusRule and ``dashboards/*.json`` ConfigMaps. Both
results are in the repository, so that kubectl is all one needs. The rules are taken over as text, comments
included; the dashboards as JSON without its white space. Namespace and release are the kustomization's.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "deploy/kubernetes/monitoring"
RULES = ROOT / "alerts/pgsidecar.rules.yml"
DASHBOARDS = ROOT / "dashboards"

_HEADER = "# Generated from {source} by python -m deploy.kubernetes.build: do not edit.\n"


def generated() -> dict[Path, str]:
    """The text of each generated file."""
    dashboards = sorted(DASHBOARDS.glob("*.json"))
    return {
        MONITORING / "prometheusrule.yaml": prometheus_rule(RULES.read_text(encoding="utf-8")),
        MONITORING / "dashboards.yaml": config_maps(
            {path.name: path.read_text(encoding="utf-8") for path in dashboards}
        ),
    }


def prometheus_rule(rules: str) -> str:
    """The rule file's text below ``spec``, where it means the same."""
    head = f"""\
{_HEADER.format(source="alerts/pgsidecar.rules.yml")}
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: pgsidecar
spec:
"""
    return head + "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(True))


def config_maps(dashboards: dict[str, str]) -> str:
    """A ConfigMap for each dashboard, with the label by which Grafana's sidecar finds it."""
    return _HEADER.format(source="dashboards/*.json") + "".join(
        _config_map(name, json.loads(text)) for name, text in dashboards.items()
    )


def _config_map(file: str, dashboard: object) -> str:
    text = json.dumps(dashboard, separators=(",", ":"))
    return f"""\
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {file.removesuffix(".json")}-dashboard
  labels:
    grafana_dashboard: "1"
  annotations:
    grafana_folder: pgsidecar
data:
  {file}: |
    {text}
"""


def stale() -> list[Path]:
    """The generated files that are not what they would be now."""
    return [
        path
        for path, text in generated().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.kubernetes.build")
    parser.add_argument("--check", action="store_true", help="write nothing, 1 if a file differs")
    check: bool = parser.parse_args(arguments).check
    texts = generated()
    differing = stale()
    for path in differing:
        if not check:
            path.write_text(texts[path], encoding="utf-8")
        verb = "differs" if check else "written"
        sys.stdout.write(f"{path.relative_to(ROOT)}: {verb}\n")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
