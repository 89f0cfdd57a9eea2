"""The figures that lines, colours and alerts have in common.

alerts/pgsidecar.rules.yml has them once more, in PromQL; tests/test_dashboards.py holds the two against
each other.
"""

from typing import Final

NEARLY_FULL: Final = 0.8
"""Share of a pool's connections in use: PgSidecarPoolNearExhaustion pages."""
FULL: Final = 1.0
ERROR_RATE: Final = 0.01
"""Share of attempts to get a connection that failed: PgSidecarConnectionErrorRateHigh pages."""
SLOW_QUERY: Final = 5.0
"""Seconds. One such query warns, a P99 of as much pages."""
SLOW_ACQUIRE: Final = 0.5
SLOW_PING: Final = 1.0
STUCK: Final = 60.0
"""Seconds that a query runs, or a client is idle in a transaction, before someone is told."""
PINNED: Final = 0.5
"""Share of a pool's connections that cannot be shared."""
LATE_LOOP: Final = 0.05

LATENCY_OBJECTIVE: Final = 0.1
"""Seconds that 99 of 100 queries stay below; a bound of the histogram's buckets."""
SLOW_BUDGET: Final = 0.01
"""Share of the queries that may take longer than the objective."""
ERROR_BUDGET: Final = 0.001
"""Share of the attempts to get a connection that may fail."""
BURN_FAST: Final = 14.4
"""Times the budget, over 5m and 1h: 2 % of the month's budget is gone in an hour."""
BURN_SLOW: Final = 6.0
"""Times the budget, over 30m and 6h: 5 % of it is gone in six hours."""
