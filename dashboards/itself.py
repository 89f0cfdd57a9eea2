"""The row on the sidecar itself: the process, its HTTP service, its build and its configuration."""

from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import limits, shared
from dashboards.panels import QUANTILES, Column, Query, chart, listing, quantile, quantiles


def panels() -> list[Panel]:
    by = "{{instance}}"
    return [
        chart(
            "Event loop lag P99",
            "How late timers run: every query may have waited that long besides. Above the line it warns: "
            "the sidecar gets too little CPU.",
            "s",
            Query(
                quantile(0.99, "pgsidecar_event_loop_lag_seconds", "<sidecar>", "instance, le"), by
            ),
            steps=((limits.LATE_LOOP, "orange"),),
        ),
        chart(
            "CPU",
            "One process, one core: at 100% it is what limits the throughput. Then add sidecars, or "
            "compile the hot modules.",
            "percentunit",
            Query(
                "sum by (instance) (rate(process_cpu_seconds_total{<sidecar>}[$__rate_interval]))",
                by,
            ),
        ),
        chart(
            "Memory",
            "Resident memory, and the address space. Resident memory that grows with the same number of "
            "clients is worth a report.",
            "bytes",
            Query(
                "sum by (instance) (process_resident_memory_bytes{<sidecar>})",
                "resident {{instance}}",
            ),
            Query(
                "sum by (instance) (process_virtual_memory_bytes{<sidecar>})",
                "virtual {{instance}}",
            ),
        ),
        chart(
            "Open files, of the limit",
            "Each client and each server connection is one. Near 100% new clients are refused: raise the "
            "limit of the process (ulimit -n).",
            "percentunit",
            Query("process_open_fds{<sidecar>} / (process_max_fds{<sidecar>} > 0)", by),
            steps=shared.UTILIZATION,
        ),
        chart(
            "HTTP requests",
            "Requests to the sidecar's API and /metrics, per second. Codes of 500 and above are a fault of "
            "the sidecar; 503 of /readyz is what it says while it is not ready.",
            "reqps",
            Query(
                "sum by (route, method, code) (rate(pgsidecar_http_requests_total{<sidecar>}"
                "[$__rate_interval]))",
                "{{method}} {{route}} {{code}}",
            ),
            size=(24, 8),
            stacked=True,
        ),
        chart(
            "HTTP requests P99, by route",
            "How long answers take, the way to the client included. Slow probes restart pods: compare "
            "with event loop lag.",
            "s",
            Query(
                quantile(0.99, "pgsidecar_http_request_duration_seconds", "<sidecar>", "route, le"),
                "{{route}}",
            ),
            empty="no requests",
        ),
        chart(
            "HTTP connections",
            "Clients connected to the HTTP port. At the limit scrapes and probes are refused: raise "
            "http.max_connections or find who keeps them open.",
            "short",
            Query('sum(pgsidecar_client_connections{listener="http",<sidecar>})', "clients"),
            Query('sum(pgsidecar_client_connections_max{listener="http",<sidecar>})', "limit"),
        ),
        chart(
            "Own time per lease",
            "What the sidecar itself adds to a lease, in transaction mode, of a sample. More than some "
            "hundred microseconds: see CPU and event loop lag.",
            "s",
            *quantiles("pgsidecar_proxy_overhead_seconds"),
            colours=QUANTILES,
            empty="no samples",
        ),
        chart(
            "Rendering of /metrics",
            "How long the previous scrape kept the event loop, of the slowest sidecar. Beyond some milliseconds: lower "
            "statements.exported.",
            "s",
            Query("max(pgsidecar_metrics_render_seconds{<sidecar>})", "rendering"),
        ),
        listing(
            "Build and configuration",
            "What runs, on which Python, the state of its configuration and when that was read. REFUSED: the old one is in "
            "force, and a restart would fail; the log names the line.",
            "short",
            Query(
                "max by (instance, version, revision, python_version) (pgsidecar_build_info{<sidecar>})"
            ),
            Query("max by (instance, implementation) (python_info{<sidecar>})"),
            Query(
                "max by (instance) (pgsidecar_config_last_reload_success_timestamp_seconds"
                "{<sidecar>}) * 1000",
                "read",
            ),
            Query(
                "max by (instance) (pgsidecar_config_last_reload_successful{<sidecar>})",
                "configuration",
            ),
            Query(
                "time() - max by (instance) (process_start_time_seconds{<sidecar>})", "running for"
            ),
            columns=[
                Column("instance"),
                Column("version"),
                Column("revision"),
                Column("Python", label="python_version"),
                Column("implementation"),
                Column("running for", "s"),
                Column("configuration", mappings=shared.RELOADED),
                Column("read", "dateTimeFromNow"),
            ],
            size=(24, 6),
        ),
    ]
