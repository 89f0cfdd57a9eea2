"""The text of /metrics: complete, true, and readable for Prometheus in both formats."""

import math
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest

import sidecar
from sidecar.events import (
    CONNECTION_ERRORS,
    AcquireOutcome,
    ClientOutcome,
    CloseReason,
    ConnectReason,
    ErrorOrigin,
    Listener,
    Operation,
    PingOutcome,
    PoolMode,
    TimeoutKind,
)
from sidecar.observe.exposition import Format, prefix
from sidecar.observe.histogram import QUERY_BUCKETS, USE_BUCKETS, WAIT_BUCKETS
from sidecar.observe.keys import SQLSTATE_CLASSES
from tests.metrics_page import IDLE, Labels, Page, fill
from tests.work import statement

# The contract: name, type, labels besides pool. Alerts and dashboards are written against it.
POOL = """
pool_connections                            gauge      state
pool_connections_max                        gauge
pool_connections_idle_min                   gauge
pool_connections_used_peak                  gauge      window
pool_pending_requests                       gauge
pool_pending_max_wait_seconds               gauge
pool_acquires_total                         counter    outcome
pool_acquire_duration_seconds               histogram
pool_connection_use_seconds                 histogram
pool_connection_create_seconds              histogram
connections_opened_total                    counter    reason
connections_closed_total                    counter    reason
connection_attempts_total                   counter    outcome
connection_errors_total                     counter    phase reason
reconnects_total                            counter    outcome
up                                          gauge
pings_total                                 counter    outcome
ping_duration_seconds                       histogram
ping_last_success_timestamp_seconds         gauge
pool_info                                   gauge      database user server mode
query_duration_seconds                      histogram  operation
query_latency_seconds                       summary    window quantile
query_latency_samples                       gauge      window
query_errors_total                          counter    origin sqlstate_class
transaction_duration_seconds                histogram
transactions_total                          counter    outcome
slow_queries_total                          counter    operation
slow_query_threshold_seconds                gauge
queries_in_flight                           gauge
longest_running_query_seconds               gauge
longest_idle_in_transaction_seconds         gauge
timeouts_total                              counter    kind
pinned_connections                          gauge      reason
pins_total                                  counter    reason
prepared_statements                         gauge
prepared_parses_total                       counter    result
proxy_overhead_seconds                      histogram
leaked_connections                          gauge
leaks_total                                 counter
blamed_wait_seconds_total                   counter    application
pool_connections_held                       gauge      application
verdict                                     gauge      kind
incidents_total                             counter    kind
statement_calls_total                       counter    fingerprint
statement_seconds_total                     counter    fingerprint
statement_errors_total                      counter    fingerprint
statement_rows_total                        counter    fingerprint
statement_latency_seconds                   summary    fingerprint quantile
statement_info                              gauge      fingerprint query
statements_tracked                          gauge
statements_evicted_total                    counter
"""
SIDECAR = """
client_connections                          gauge      listener
client_connections_max                      gauge      listener
client_connections_total                    counter    listener outcome
network_bytes_total                         counter    side direction
http_requests_total                         counter    route method code
http_request_duration_seconds               histogram  route
event_loop_lag_seconds                      histogram
metrics_render_seconds                      gauge
build_info                                  gauge      version revision python_version
config_last_reload_success_timestamp_seconds gauge
config_last_reload_successful gauge
"""


@pytest.fixture
def page() -> Page:
    return Page()


def catalogue(table: str, labels: Iterable[str] = ()) -> list[tuple[str, str, set[str]]]:
    rows = (line.split() for line in table.strip().splitlines())
    return [(name, kind, {*labels, *rest}) for name, kind, *rest in rows]


CATALOGUE = [*catalogue(POOL, ["pool"]), *catalogue(SIDECAR)]


def sample_names(name: str, kind: str) -> set[str]:
    suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
    return {f"pgsidecar_{name}{suffix}" for suffix in suffixes}


def pairs(**labels: Iterable[str]) -> set[Labels]:
    """Every combination of the labels' values, for pool ``main``."""
    combined = product(*labels.values())
    return {
        frozenset({"pool": "main", **dict(zip(labels, values, strict=True))}.items())
        for values in combined
    }


@pytest.mark.parametrize(("name", "kind", "labels"), CATALOGUE)
def test_every_metric_of_the_contract_is_there(page, name, kind, labels):
    """With type, help and exactly its labels, before anything has happened but one statement."""
    page.recorder.expect_http("/metrics", "GET", 200)
    page.call("0123456789abcdef")
    written_kind, written_help = page.described(Format.TEXT)[f"pgsidecar_{name}"]
    assert written_kind == kind
    assert written_help.endswith(".") or ";" in written_help
    samples = page.samples()
    for sample_name in sample_names(name, kind):
        assert samples[sample_name]
        for key in samples[sample_name]:
            assert set(dict(key)) - {"le"} == labels


def test_nothing_else_is_there(page):
    """A new metric comes with a row in the contract, a panel or rule, and a test."""
    names = {f"pgsidecar_{name}" for name, _, _ in CATALOGUE}
    others = {name for name in page.described(Format.TEXT) if not name.startswith("pgsidecar_")}

    assert page.described(Format.TEXT).keys() - others == names
    assert others == {
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_cpu_seconds_total",
        "process_open_fds",
        "process_max_fds",
        "python_info",
    }


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("pool_connections", pairs(state=["used", "idle", "connecting"])),
        ("pool_acquires_total", pairs(outcome=AcquireOutcome)),
        ("connections_opened_total", pairs(reason=ConnectReason)),
        ("connections_closed_total", pairs(reason=CloseReason)),
        ("connection_attempts_total", pairs(outcome=["ok", "error"])),
        ("reconnects_total", pairs(outcome=["ok", "error"])),
        ("pings_total", pairs(outcome=PingOutcome)),
        ("query_duration_seconds_count", pairs(operation=[each.label for each in Operation])),
        ("slow_queries_total", pairs(operation=[each.label for each in Operation])),
        (
            "query_errors_total",
            pairs(origin=ErrorOrigin, sqlstate_class=[*SQLSTATE_CLASSES, "other"]),
        ),
        ("transactions_total", pairs(outcome=["commit", "rollback"])),
    ],
)
def test_the_first_scrape_has_every_combination_at_zero(page, name, labels):
    """``increase()`` does not see the first error of a series that starts at 1."""
    assert page.labels(name) == labels
    assert set(page.samples()[f"pgsidecar_{name}"].values()) == {0}


def test_the_first_scrape_has_every_connection_error_at_zero(page):
    wanted = {
        frozenset({"pool": "main", "phase": phase, "reason": reason}.items())
        for phase, reasons in CONNECTION_ERRORS.items()
        for reason in reasons
    }
    assert page.labels("connection_errors_total") == wanted


def test_the_first_scrape_has_every_timeout_at_zero(page):
    """A login may time out before the client has named a pool: that one has no pool."""
    nameless = frozenset({"pool": "", "kind": "login"}.items())
    assert page.labels("timeouts_total") == pairs(kind=TimeoutKind) | {nameless}


@pytest.mark.parametrize("format", Format)
def test_counters_and_histograms_start_at_zero(page, format):
    page.recorder.expect_http("/", "GET", 200)
    kinds = {name: kind for name, (kind, _) in page.described(Format.TEXT).items()}
    samples = page.samples(format)
    for name, kind in kinds.items():
        if kind in ("counter", "histogram") and name.startswith("pgsidecar_"):
            for sample_name in sample_names(name.removeprefix("pgsidecar_"), kind):
                assert set(samples[sample_name].values()) == {0}


def test_quantiles_are_nan_without_samples(page):
    """A comparison with NaN is false: no alert about a pool that is idle."""
    values = page.samples()["pgsidecar_query_latency_seconds"].values()
    assert len(values) == 6
    assert all(map(math.isnan, values))
    assert page.value("query_latency_samples", window="5m") == 0


def test_what_is_recorded_is_written_under_its_labels(page):
    fill(page)

    for number, outcome in enumerate(AcquireOutcome, 1):
        assert page.value("pool_acquires_total", outcome=outcome) == number
    for number, operation in enumerate(Operation, 1):
        assert page.value("query_duration_seconds_count", operation=operation.label) == number
        assert page.value("slow_queries_total", operation=operation.label) == number
    for number, connect_reason in enumerate(ConnectReason, 1):
        assert page.value("connections_opened_total", reason=connect_reason) == number
    for number, close_reason in enumerate(CloseReason, 1):
        assert page.value("connections_closed_total", reason=close_reason) == number
    for number, ping in enumerate(PingOutcome, 1):
        assert page.value("pings_total", outcome=ping) == number
    for number, kind in enumerate(TimeoutKind, 1):
        assert page.value("timeouts_total", kind=kind) == number
    assert page.value("connection_attempts_total", outcome="ok") == 1 + 2 + 1
    assert page.value("connection_attempts_total", outcome="error") == 3 + 4 + 2 + 3
    assert page.value("reconnects_total", outcome="ok") == 0
    assert page.value("reconnects_total", outcome="error") == 1
    assert page.value("transactions_total", outcome="commit") == 2
    assert page.value("transactions_total", outcome="rollback") == 1


def test_errors_are_written_under_their_labels(page):
    fill(page)

    errors = page.samples()["pgsidecar_query_errors_total"]
    assert {key for key, value in errors.items() if value} == (
        pairs(origin=["server"], sqlstate_class=["23"])
        | pairs(origin=["sidecar"], sqlstate_class=["53", "other"])
    )
    failures = page.samples()["pgsidecar_connection_errors_total"]
    assert {key for key, value in failures.items() if value} == pairs(
        phase=["query"], reason=["admin_shutdown"]
    )


def test_histograms_are_cumulative_and_complete(page):
    fill(page)

    assert page.value("pool_acquire_duration_seconds_count") == 15
    assert page.value("pool_acquire_duration_seconds_bucket", le="0.0001") == 1
    assert page.value("pool_acquire_duration_seconds_bucket", le="0.05") == 15
    assert page.value("pool_acquire_duration_seconds_bucket", le="+Inf") == 15
    assert page.value("pool_acquire_duration_seconds_sum") == pytest.approx(14 * 0.02)
    assert page.value("pool_connection_use_seconds_bucket", le="30.0") == 0
    assert page.value("pool_connection_use_seconds_bucket", le="60.0") == 1
    assert page.value("proxy_overhead_seconds_bucket", le="1e-05") == 0
    assert page.value("proxy_overhead_seconds_bucket", le="2.5e-05") == 1
    assert page.value("ping_duration_seconds_count") == 6
    assert page.value("pool_connection_create_seconds_count") == 6
    assert page.value("transaction_duration_seconds_count") == 3


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("query_duration_seconds", QUERY_BUCKETS),
        ("pool_acquire_duration_seconds", WAIT_BUCKETS),
        ("pool_connection_use_seconds", USE_BUCKETS),
        ("proxy_overhead_seconds", (0.00001, 0.000025, 0.00005, *WAIT_BUCKETS)),
    ],
)
def test_le_is_written_as_a_float(page, name, bounds):
    """Prometheus 3 turns ``5`` into ``5.0``, and rules that name the former find nothing."""
    written = {dict(key)["le"] for key in page.samples()[f"pgsidecar_{name}_bucket"]}
    assert written == {*map(str, bounds), "+Inf"}
    assert not any(bound.isdigit() for bound in written)


def test_gauges_show_the_snapshot():
    page = Page(
        replace(
            IDLE,
            used=7,
            idle=3,
            connecting=2,
            pending=4,
            waited=0.0,
            oldest_wait=1.25,
            is_up=True,
            last_ping=1_700_000_000.5,
            queries_in_flight=6,
            longest_running_query=12.5,
            longest_idle_in_transaction=33.0,
            slow_query_threshold=2.0,
        )
    )
    page.clients = (11, 12, 13, 14)

    assert page.value("pool_connections", state="used") == 7
    assert page.value("pool_connections", state="idle") == 3
    assert page.value("pool_connections", state="connecting") == 2
    assert page.value("pool_connections_max") == 25
    assert page.value("pool_connections_idle_min") == 5
    assert page.value("pool_connections_used_peak", window="1m") == 7
    assert page.value("pool_pending_requests") == 4
    assert page.value("pool_pending_max_wait_seconds") == 1.25
    assert page.value("up") == 1
    assert page.value("ping_last_success_timestamp_seconds") == 1_700_000_000.5
    assert page.value("queries_in_flight") == 6
    assert page.value("longest_running_query_seconds") == 12.5
    assert page.value("longest_idle_in_transaction_seconds") == 33.0
    assert page.value("slow_query_threshold_seconds") == 2.0
    assert page.value("client_connections", listener="pg") == 11
    assert page.value("client_connections_max", listener="pg") == 12
    assert page.value("client_connections", listener="http") == 13
    assert page.value("client_connections_max", listener="http") == 14


def test_the_peak_outlives_the_burst(page):
    page.recorder.pool("main").acquired_at_once(19)
    page.recorder.pool("main").released(0.1)

    assert page.value("pool_connections_used_peak", window="1m") == 19


def test_pools_are_written_apart_in_any_order_of_their_snapshots():
    page = Page(IDLE, replace(IDLE, name="direct", mode=PoolMode.SESSION, max_size=3))
    page.snapshots.reverse()
    page.recorder.pool("direct").acquired_at_once(1)

    values = page.samples()["pgsidecar_pool_connections_max"]
    assert {dict(key)["pool"]: value for key, value in values.items()} == {"main": 25, "direct": 3}
    acquires = page.samples()["pgsidecar_pool_acquires_total"]
    assert [dict(key)["pool"] for key, value in acquires.items() if value] == ["direct"]


def test_the_sidecar_s_own_counts_are_written(page):
    for _ in range(3):
        page.recorder.client_ended(Listener.HTTP, ClientOutcome.REJECTED)
    page.recorder.login_timed_out(None)
    page.recorder.loop_lag(0.02)
    page.recorder.http_request("/readyz", "GET", 503, 0.002)
    traffic = page.recorder.traffic
    traffic.client_received, traffic.client_sent = 1, 2
    traffic.server_received, traffic.server_sent = 3, 4

    assert page.value("client_connections_total", listener="http", outcome="rejected") == 3
    assert page.value("client_connections_total", listener="pg", outcome="rejected") == 0
    assert (
        page.samples()["pgsidecar_timeouts_total"][frozenset({"pool": "", "kind": "login"}.items())]
        == 1
    )
    assert page.value("event_loop_lag_seconds_bucket", le="0.05") == 1
    assert page.value("http_requests_total", route="/readyz", method="GET", code="503") == 1
    assert page.value("http_request_duration_seconds_count", route="/readyz") == 1
    assert page.value("network_bytes_total", side="client", direction="received") == 1
    assert page.value("network_bytes_total", side="client", direction="sent") == 2
    assert page.value("network_bytes_total", side="server", direction="received") == 3
    assert page.value("network_bytes_total", side="server", direction="sent") == 4


def test_build_and_configuration_are_told(page):
    built = {
        "version": sidecar.__version__,
        "revision": "abc123",
        "python_version": platform.python_version(),
    }
    assert page.samples()["pgsidecar_build_info"] == {frozenset(built.items()): 1}
    read_at = page.value("config_last_reload_success_timestamp_seconds")
    assert abs(time.time() - read_at) < 60
    assert page.labels("pool_info") == {
        frozenset(
            {
                "pool": "main",
                "database": "app",
                "user": "web",
                "server": "db.example:5432",
                "mode": "transaction",
            }.items()
        )
    }


def test_a_scrape_tells_how_long_the_one_before_took(page):
    assert page.value("metrics_render_seconds") == 0
    assert 0 < page.value("metrics_render_seconds") < 1


def test_quantiles_are_those_of_the_window(page):
    for milliseconds in range(1, 101):
        page.recorder.pool("main").query_done(statement(Operation.SELECT), milliseconds / 1000)

    for quantile, true in (("0.5", 0.05), ("0.9", 0.09), ("0.99", 0.099)):
        for window in ("1m", "5m"):
            value = page.value("query_latency_seconds", window=window, quantile=quantile)
            assert value == pytest.approx(true, rel=0.01)
    assert page.value("query_latency_samples", window="1m") == 100
    page.now += 61  # nobody ticked meanwhile: a scrape must not show what is too old
    assert page.value("query_latency_samples", window="1m") == 0
    assert page.value("query_latency_samples", window="5m") == 100


@pytest.mark.parametrize("count", [10**6, 2**53 + 1, 10**17 + 1])
def test_large_counts_are_written_in_full(page, count):
    """``1e+06`` would be read as well, but the bytes of a year no longer to the last digit."""
    page.recorder.traffic.client_sent = count
    line = f'pgsidecar_network_bytes_total{{side="client",direction="sent"}} {count}\n'
    for format in Format:
        assert line in page.metrics.render(format)


def test_both_formats_carry_the_same_samples():
    page = Page(IDLE, replace(IDLE, name="direct"))
    fill(page)
    page.recorder.http_request("/", "GET", 200, 0.1)
    page.samples()
    text, openmetrics = page.samples(Format.TEXT), page.samples(Format.OPENMETRICS)

    assert {name: set(values) for name, values in text.items()} == {
        name: set(values) for name, values in openmetrics.items()
    }
    moving = {"pgsidecar_metrics_render_seconds"}
    for name in text.keys() - moving:
        if name.startswith("pgsidecar_"):
            assert list(map(repr, text[name].values())) == list(
                map(repr, openmetrics[name].values())
            )


def test_openmetrics_names_counters_without_total_and_ends(page):
    described = page.described(Format.OPENMETRICS)

    assert described["pgsidecar_pool_acquires"][0] == "counter"
    assert "pgsidecar_pool_acquires_total" not in described
    # a gauge has that name already, so this counter keeps its own and leaves its type open
    assert described["pgsidecar_client_connections"][0] == "gauge"
    assert described["pgsidecar_client_connections_total"][0] == "unknown"
    text = page.metrics.render(Format.OPENMETRICS)
    assert text.endswith("\n# EOF\n")
    assert text.count("# EOF") == 1
    assert "_created" not in text
    assert "# EOF" not in page.metrics.render(Format.TEXT)


def test_hostile_label_values_are_escaped():
    """Names come from the configuration, and may hold anything."""
    name = 'a"b\\c\nd{e="f"} 1'
    page = Page(replace(IDLE, name=name, database=name, user="ü"))

    for format in Format:
        ((key, value),) = page.samples(format)["pgsidecar_pool_info"].items()
        assert value == 1
        assert dict(key)["pool"] == dict(key)["database"] == name
        assert dict(key)["user"] == "ü"


def test_escaping_does_not_confuse_a_backslash_with_what_it_escapes():
    assert prefix("a", {"b": "\\n"}) == 'a{b="\\\\n"} '
    assert prefix("a", {"b": "\n"}) == 'a{b="\\n"} '
    assert prefix("a", {}) == "a "


def test_promtool_has_no_complaint(page):
    """Debian's Prometheus is part of the test environment."""
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is not installed (package prometheus)"
    fill(page)
    page.recorder.http_request("/", "GET", 200, 0.1)
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=page.metrics.render(Format.TEXT),
        capture_output=True,
        encoding="utf-8",
        timeout=20,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_scrape_does_not_hold_the_event_loop_for_long():
    """2 ms is the limit for any callback; this takes about 0.4 ms. Generous for a loaded machine."""
    page = Page(IDLE, replace(IDLE, name="direct"))
    fill(page)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        list(page.metrics.own_parts(Format.OPENMETRICS))
        took.append(time.perf_counter() - began)

    assert min(took) < 0.002
