"""``make observe``: a page arrives and is resolved on the terminal."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from deploy.observe.processes import CannotObserve, program
from deploy.observe.quick import quick_routes, quick_rules
from tests.sidecar_process import environment, eventually

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "deploy.observe"]


STEPS = [
    r"billing-worker begins 24 transactions",
    r"PAGE     PgSidecarPoolExhausted, to pager",
    r"Runbook: docs/runbooks/PgSidecarPoolExhausted.md",
    r"billing-worker has been restarted",
    r"RESOLVED PgSidecarPoolExhausted, to pager",
    r"^stopping",
    r"^Pages: \d+, resolved: \d+\.",
]


@pytest.mark.timeout(150)
def test_page_arrives_and_is_resolved_on_the_terminal(tmp_path: Path) -> None:
    """Who forgot to commit is in its text; a signal ends it, and nothing is left running."""
    log = tmp_path / "log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*COMMAND, "--factor", "60"], cwd=ROOT, stdout=said, stderr=said, env=environment()
        )
    children: list[int] = []
    try:
        eventually(lambda: "Thresholds are as shipped" in log.read_text(), "it has started", 40)
        children = children_of(process.pid)
        assert len(children) >= 5  # PostgreSQL, the sidecar, the load, Alertmanager, Prometheus
        eventually(lambda: re.search(STEPS[4], log.read_text()), "it is resolved", 80)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        text = log.read_text()
        print(text)  # shown where the test failed
        for pid in (process.pid, *children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    lines = text.splitlines()

    def find(pattern: str) -> int:
        return next((n for n, line in enumerate(lines) if re.search(pattern, line)), -1)

    places = [find(step) for step in STEPS]
    assert -1 not in places, dict(zip(STEPS, places, strict=True))
    assert places == sorted(places)
    assert find(r"firing   PgSidecarPoolExhausted main") > places[0]
    told = " ".join(line.strip() for line in lines[places[1] :][:8])
    assert "25 of 25 connections are in use" in told
    assert "Most are held by billing-worker (2" in told


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(CannotObserve, match="apt-get install prometheus-alertmanager"):
        program("no-such-program", "prometheus-alertmanager")


RULES = """\
groups:
  - name: g
    rules:
      - record: a
        expr: rate(b_total{le="5.0"}[5m]) > 14.4 * 0.001
      - alert: A
        expr: |2
            increase(b_total[1h]) >= 20
          and on (job)
            time() - process_start_time_seconds > 1800
        for: 1m
        keep_firing_for: 30s
        annotations:
          description: '{{ with printf "increase(b_total{%s}[5m])" $x | query }}5m{{ end }}'
"""


def test_durations_of_rules_are_divided_and_nothing_else() -> None:
    assert quick_rules(RULES, 30) == (
        RULES.replace("[5m]", "[10000ms]")
        .replace("[1h]", "[120000ms]")
        .replace("for: 1m", "for: 2000ms")
        .replace("for: 30s", "for: 1000ms")
        .replace("1800", "60")
    )
    assert quick_rules(RULES, 1).count("300000ms") == 2


def test_durations_of_routes_are_divided_and_receivers_replaced() -> None:
    text = (ROOT / "alerts/alertmanager.example.yml").read_text()
    quick = quick_routes(
        text, 10, {"pager": "http://127.0.0.1:1/p", "chat": "http://127.0.0.1:1/c"}
    )
    assert "group_wait: 1000ms" in quick
    assert "repeat_interval: 360000ms" in quick
    assert "url: http://127.0.0.1:1/p" in quick
    assert "pagerduty" not in quick
    assert quick.count("source_matchers") == text.count("source_matchers")
    with pytest.raises(ValueError, match=r"are \['chat', 'pager'\]"):
        quick_routes(text, 10, {"pager": "http://127.0.0.1:1/p"})
