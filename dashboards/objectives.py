"""The board of the objectives: what is left of the budgets, and how fast they burn.

99.9 % of the attempts to get a connection succeed, and 99 % of the queries take at most 100 ms. Windows
of several sidecars are never averaged: the worst counts.
"""

from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.models.dashboard import Panel

from dashboards import limits, shared
from dashboards.board import Section
from dashboards.panels import Column, Query, Steps, chart, figure, listing

UID: Final = "pgsidecar-slo"
TITLE: Final = "pgsidecar: objectives"
ABOUT: Final = (
    "Budgets of the objectives (99.9% of connection attempts succeed, 99% of queries take at most 100 ms): "
    "what is left, and how fast it burns."
)

_PAIRS: Final = (
    ("fast", limits.BURN_FAST, "5m", "1h", "red"),
    ("slow", limits.BURN_SLOW, "30m", "6h", "orange"),
)
WINDOWS: Final = {window: factor for _, factor, *pair, _ in _PAIRS for window in pair}
"""With the factor above which both of a pair make an alert."""
_LEFT: Final = ((-1e9, "red"), (0.0, "orange"), (0.25, "green"))  # overspent without end: red


@dataclass(frozen=True, slots=True)
class _Objective:
    name: str
    series: str  # of the recording rules, without the window
    budget: float
    bad: str  # share of what went wrong in the time shown
    noun: str
    advice: str

    def ratio(self, window: str) -> str:
        return f"{self.series}{window}{{<pool>}}"

    def burn(self, window: str) -> str:
        return f"{self.ratio(window)} / {self.budget}"


_ATTEMPTS: Final = "pgsidecar_connection_attempts_total"
_QUERIES: Final = "pgsidecar_query_duration_seconds"
_CONNECTIONS: Final = _Objective(
    "Connections",
    "instance_pool:pgsidecar_connection_errors:ratio_rate",
    limits.ERROR_BUDGET,
    f'sum by (pool) (increase({_ATTEMPTS}{{outcome="error",<pool>}}[$__range]))'
    f" / (sum by (pool) (increase({_ATTEMPTS}{{<pool>}}[$__range])) > 0)",
    "attempts to get a connection that failed",
    "the row Errors of the pool's board says in which phase and why",
)
_LATENCY: Final = _Objective(
    "Latency",
    "instance_pool:pgsidecar_slow_queries:ratio_rate",
    limits.SLOW_BUDGET,
    f'1 - sum by (pool) (increase({_QUERIES}_bucket{{le="{limits.LATENCY_OBJECTIVE}",<pool>}}[$__range]))'
    f" / (sum by (pool) (increase({_QUERIES}_count{{<pool>}}[$__range])) > 0)",
    "queries that took longer than 100 ms",
    "the top statements by time and P99 say which",
)


def sections() -> list[Section]:
    return [
        Section("Budgets", _budgets()),
        Section("How fast they burn", [*_burns(_CONNECTIONS), *_burns(_LATENCY)]),
        Section("What goes wrong", [*_ratios(_CONNECTIONS), *_ratios(_LATENCY)]),
    ]


def _budgets() -> list[Panel]:
    figures = [_left(_CONNECTIONS), _burn_now(_CONNECTIONS), _left(_LATENCY), _burn_now(_LATENCY)]
    return [*figures, _windows(), shared.firing_alerts((12, 7))]


def _left(of: _Objective) -> Panel:
    return figure(
        f"{of.name}: budget left",
        f"Of what may go wrong in the time shown, the share that is left, of the worst pool; below 0 the "
        f"objective is missed. It counts {of.noun}: choose 30 days to see the month.",
        "percentunit",
        Query(f"min(1 - ({of.bad}) / {of.budget})"),
        (6, 4),
        _LEFT,
        empty="no traffic",
    )


def _burn_now(of: _Objective) -> Panel:
    return figure(
        f"{of.name}: burn rate (1h)",
        "How many times faster than allowed the budget went in the last hour, of the worst pool. At 1 it "
        "lasts a month; from 14.4 on, in the last 5 minutes too, you are paged.",
        "short",
        Query(f"max({of.burn('1h')})"),
        (6, 4),
        _burning(limits.BURN_FAST),
        empty="no traffic",
    )


def _windows() -> Panel:
    return listing(
        "Burn rates, by pool",
        "Times the budget, by objective and window. Both windows of a pair above its threshold (14.4 for "
        "5m and 1h, 6 for 30m and 6h) is an alert; one alone is over, or has just begun.",
        "short",
        *(
            Query(f"{_named(_CONNECTIONS, window)} or {_named(_LATENCY, window)}", window)
            for window in WINDOWS
        ),
        columns=[
            Column("objective", width=110),
            Column("pool", link=shared.POOL_LINK),
            Column("instance"),
            *(
                Column(window, steps=_burning(factor), decimals=1, width=70)
                for window, factor in WINDOWS.items()
            ),
        ],
        sort="1h",
        size=(12, 7),
        empty="no traffic",
    )


def _named(of: _Objective, window: str) -> str:
    worst = f"max by (instance, pool) ({of.burn(window)})"
    return f'label_replace({worst}, "objective", "{of.name.lower()}", "", "")'


def _burns(of: _Objective) -> list[Panel]:
    return [_burn(of, *pair) for pair in _PAIRS]


def _ratios(of: _Objective) -> list[Panel]:
    return [_ratio(of, *pair) for pair in _PAIRS]


def _burn(of: _Objective, speed: str, factor: float, short: str, long: str, colour: str) -> Panel:
    whom = "pages" if factor == limits.BURN_FAST else "warns"
    return chart(
        f"{of.name}: burn rate, {speed} ({short} and {long})",
        f"Times the budget that goes, of the worst pool. Both lines above {factor:g} {whom}: "
        f"{of.advice}.",
        "short",
        Query(f"max({of.burn(short)})", short),
        Query(f"max({of.burn(long)})", long),
        steps=((factor, colour),),
        top=2 * factor,
        colours={short: "orange", long: "blue"},
        empty="no traffic",
    )


def _ratio(of: _Objective, speed: str, factor: float, short: str, long: str, colour: str) -> Panel:
    line = round(factor * of.budget, 6)
    return chart(
        f"{of.name}: share, {speed} ({short} and {long})",
        f"Share of {of.noun}, of the worst sidecar of each pool. The line is {factor:g} times the budget "
        f"of {of.budget:.1%}; above it with both windows: {of.advice}.",
        "percentunit",
        *(
            Query(f"max by (pool) ({of.ratio(window)})", f"{window} {{{{pool}}}}")
            for window in (short, long)
        ),
        steps=((line, colour),),
        top=2 * line,
        empty="no traffic",
    )


def _burning(factor: float) -> Steps:
    """Above 1 the budget does not last its month; from the alert's factor on someone is told."""
    return ((1.0, "orange"), (factor, "red"))
