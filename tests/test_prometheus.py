"""A real Prometheus scrapes the sidecar: what it stores is what an alert or a dashboard can ask for."""

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from deploy.observe import processes
from sidecar.demo.postgres import EmbeddedPostgres
from tests.conftest import MakePostgres
from tests.sidecar_process import PATIENCE, MakeProcess, eventually

FAMILIES = {
    # Pool
    "pool_connections": "gauge",
    "pool_connections_max": "gauge",
    "pool_connections_idle_min": "gauge",
    "pool_connections_used_peak": "gauge",
    "pool_pending_requests": "gauge",
    "pool_pending_max_wait_seconds": "gauge",
    "pool_acquires_total": "counter",
    "pool_acquire_duration_seconds": "histogram",
    "pool_connection_use_seconds": "histogram",
    "pool_connection_create_seconds": "histogram",
    "connections_opened_total": "counter",
    "connections_closed_total": "counter",
    "connection_attempts_total": "counter",
    "connection_errors_total": "counter",
    "reconnects_total": "counter",
    "up": "gauge",
    "pings_total": "counter",
    "ping_duration_seconds": "histogram",
    "ping_last_success_timestamp_seconds": "gauge",
    "pool_connections_held": "gauge",
    "pool_info": "gauge",
    # Work
    "query_duration_seconds": "histogram",
    "query_latency_seconds": "summary",  # promtool wants the label quantile on no other type
    "query_latency_samples": "gauge",
    "query_errors_total": "counter",
    "transaction_duration_seconds": "histogram",
    "transactions_total": "counter",
    "slow_queries_total": "counter",
    "slow_query_threshold_seconds": "gauge",
    "queries_in_flight": "gauge",
    "longest_running_query_seconds": "gauge",
    "longest_idle_in_transaction_seconds": "gauge",
    "timeouts_total": "counter",
    "proxy_overhead_seconds": "histogram",
    "pinned_connections": "gauge",
    "pins_total": "counter",
    "prepared_statements": "gauge",
    "prepared_parses_total": "counter",
    "verdict": "gauge",
    "incidents_total": "counter",
    "leaked_connections": "gauge",
    "leaks_total": "counter",
    "blamed_wait_seconds_total": "counter",
    "statement_calls_total": "counter",
    "statement_seconds_total": "counter",
    "statement_errors_total": "counter",
    "statement_rows_total": "counter",
    "statement_latency_seconds": "summary",
    "statement_info": "gauge",
    "statements_tracked": "gauge",
    "statements_evicted_total": "counter",
    # Clients and the sidecar itself
    "client_connections": "gauge",
    "client_connections_max": "gauge",
    "client_connections_total": "unknown",  # in OpenMetrics; the gauge has the family's name
    "network_bytes_total": "counter",
    "http_requests_total": "counter",
    "http_request_duration_seconds": "histogram",
    "event_loop_lag_seconds": "histogram",
    "metrics_render_seconds": "gauge",
    "build_info": "gauge",
    "config_last_reload_success_timestamp_seconds": "gauge",
    "config_last_reload_successful": "gauge",
}
"""The contract, by name without prefix, and its types."""


class Prometheus(processes.Prometheus):
    """With the patience of a test."""

    @classmethod
    @contextmanager
    def scraping(cls, target: int, folder: Path, *options: str) -> Iterator[Self]:
        with processes.prometheus(folder, [f"127.0.0.1:{target}"], *options) as found:
            try:
                yield cls(found.url, found.log_path)
            finally:
                print(found.log)  # shown where the test failed

    def until(self, query: str, is_enough: Callable[[float], bool]) -> float:
        def look() -> tuple[float] | None:
            value = self.value(query)
            return (value,) if value is not None and is_enough(value) else None

        return eventually(look, query, 15)[0]


def family_of(name: str) -> str:
    """In the OpenMetrics format, which Prometheus prefers, a counter's family has no suffix."""
    return f"pgsidecar_{name.removesuffix('_total') if FAMILIES[name] == 'counter' else name}"


def series_of(name: str) -> str:
    """One series of the family, as an expression asks for it."""
    return f"pgsidecar_{name}_bucket" if FAMILIES[name] == "histogram" else f"pgsidecar_{name}"


def test_prometheus_scrapes_every_family(
    own_postgres: MakePostgres, make_process: MakeProcess, tmp_path: Path
) -> None:
    """With type and help; and its target stays up while PostgreSQL is down, when it matters most."""
    server = own_postgres()
    sidecar = make_process(server.dsn(), ping_interval="200ms")
    with Prometheus.scraping(sidecar.http_port, tmp_path) as prometheus:
        with psycopg.connect(sidecar.dsn()) as conn:
            conn.execute("SELECT 1")
        prometheus.until('up{job="pgsidecar"}', lambda value: value == 1)
        prometheus.until("pgsidecar_up", lambda value: value == 1)
        # counters exist at 0 from the first scrape, so that increase() sees the first event
        assert prometheus.value('pgsidecar_transactions_total{outcome="rollback"}') == 0
        prometheus.until('pgsidecar_transactions_total{outcome="commit"}', lambda value: value == 1)

        missing = {name for name in FAMILIES if series_of(name) not in prometheus.names()}
        assert not missing
        described = prometheus.ask("metadata")
        for name, kind in FAMILIES.items():
            (entry,) = described[family_of(name)]
            assert entry["type"] == kind, name
            assert entry["help"].endswith("."), name
        others = {name for name in described if name.startswith("pgsidecar_")}
        contract = set(map(family_of, FAMILIES))
        assert others == contract, "a new family belongs into this list, and into docs/metrics.md"

        server.kill()
        prometheus.until("pgsidecar_up", lambda value: value == 0)
        began = prometheus.value("timestamp(pgsidecar_up)")
        assert began is not None
        prometheus.until("timestamp(pgsidecar_up)", lambda at: at > began)  # it goes on
        assert prometheus.value('up{job="pgsidecar"}') == 1
        assert prometheus.value('min_over_time(up{job="pgsidecar"}[1m])') == 1


def test_prometheus_sees_all_that_a_statement_does_but_its_first_calls(
    postgres: EmbeddedPostgres, make_process: MakeProcess, tmp_path: Path
) -> None:
    """Its series begin at 0, in ``other`` is what came before, and the sum is right all the time."""
    sidecar = make_process(postgres.dsn())
    with Prometheus.scraping(sidecar.http_port, tmp_path) as prometheus:
        prometheus.until("pgsidecar_statement_calls_total", lambda value: value == 0)
        with psycopg.connect(sidecar.dsn(), autocommit=True) as conn:
            for number in range(5):
                conn.execute(f"SELECT {number} AS watched")
            info = 'pgsidecar_statement_info{query=~"SELECT .* AS watched"}'
            calls = f"pgsidecar_statement_calls_total * on (fingerprint) {info}"
            prometheus.until(calls, lambda value: value == 0)
            for number in range(7):
                conn.execute(f"SELECT  {number} as watched -- {number}")
            prometheus.until(calls, lambda value: value == 7)
        of_it = f"and on (fingerprint) {info}"
        other = '{fingerprint="other"}'
        for asked, wanted in {
            f"min_over_time(pgsidecar_statement_calls_total[1m]) {of_it}": 0,
            f"resets(pgsidecar_statement_calls_total[1m]) {of_it}": 0,
            f"pgsidecar_statement_rows_total {of_it}": 7,
            f"pgsidecar_statement_errors_total {of_it}": 0,
            f"pgsidecar_statement_calls_total{other}": 5,
            f"pgsidecar_statement_rows_total{other}": 5,
            "sum(pgsidecar_statement_calls_total)": 12,
            "sum(pgsidecar_query_duration_seconds_count)": 12,
        }.items():
            assert prometheus.value(asked) == wanted, asked
        p99 = f'pgsidecar_statement_latency_seconds{{quantile="0.99"}} {of_it}'
        assert 0 < prometheus.until(p99, lambda value: value > 0) < PATIENCE


@pytest.mark.parametrize("is_extended", [False, True])
def test_an_exemplar_travels_to_prometheus(
    postgres: EmbeddedPostgres, make_process: MakeProcess, tmp_path: Path, is_extended: bool
) -> None:
    """From a comment as sqlcommenter writes it to the trace in ``query_exemplars``."""
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    comment = f"/*controller='index',traceparent='00-{trace}-{span}-01'*/"
    sidecar = make_process(postgres.dsn())
    flag = "--enable-feature=exemplar-storage"
    with Prometheus.scraping(sidecar.http_port, tmp_path, flag) as prometheus:
        with psycopg.connect(sidecar.dsn(), autocommit=True) as conn:
            conn.execute("SELECT 1")
            conn.execute(f"SELECT pg_sleep(0.03) {comment}", () if is_extended else None)

        def find() -> Any:
            return prometheus.ask(
                "query_exemplars",
                query="pgsidecar_query_duration_seconds_bucket",
                start=str(time.time() - 600),
                end=str(time.time() + 600),
            )

        (series,) = eventually(find, "exemplars", 15)
    (exemplar,) = series["exemplars"]
    assert exemplar["labels"] == {"trace_id": trace, "span_id": span}
    assert 0.03 <= float(exemplar["value"]) <= float(series["seriesLabels"]["le"])
    assert series["seriesLabels"]["operation"] == "select"
    assert abs(exemplar["timestamp"] - time.time()) < 60


async def test_promtool_has_no_complaint(
    own_postgres: MakePostgres, make_process: MakeProcess
) -> None:
    """Names, units, types and help by Prometheus' own rules, of a sidecar that has seen something."""
    server = own_postgres()
    sidecar = make_process(server.dsn())
    async with await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True) as conn:
        await conn.execute("SELECT 1")
        with pytest.raises(psycopg.errors.SyntaxError):
            await conn.execute("SELEC 1")
    metrics = await sidecar.until_whole()
    checked = await asyncio.to_thread(
        subprocess.run,
        [processes.program("promtool", "prometheus"), "check", "metrics"],
        input=metrics.text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_scrape_is_quick_while_postgresql_is_down(
    own_postgres: MakePostgres, make_process: MakeProcess
) -> None:
    """It asks nobody: neither a killed server nor one that has stalled holds it up."""
    server = own_postgres()
    sidecar = make_process(server.dsn(), ping_interval="100ms", ping_timeout="200ms")
    eventually(lambda: sidecar.scrape().idle == 5, "all warm connections are open")
    for stop in (server.pause, server.kill):
        stop()
        eventually(lambda: not sidecar.scrape().is_up, "down")
        began = time.monotonic()
        for _ in range(5):
            assert "pgsidecar_up" in sidecar.scrape().text
        assert time.monotonic() - began < 2
        assert sidecar.get("/livez") == (200, "ok\n")
        status, why = sidecar.get("/readyz")
        assert status == 503
        assert why.startswith("pool 'main': PostgreSQL at 127.0.0.1:")
