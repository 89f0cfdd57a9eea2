"""Statements, failures, leases and pools for tests of what counts them."""

from collections.abc import Sequence

from sidecar.events import ErrorOrigin, PoolGauges
from sidecar.work import Blocker, Failure, Holder, Statement, Who


def statement(operation: int, fingerprint: str = "0123456789abcdef") -> Statement:
    return Statement(fingerprint, "SELECT ?", int(operation))


def failure(
    origin: ErrorOrigin,
    sqlstate: str,
    message: str = "",
    application: str = "",
    of: Statement | None = None,
) -> Failure:
    return Failure(origin, sqlstate, message, application, of)


def holder(
    server: int, application: str = "web", of: Statement | None = None, *, user: str = "app"
) -> Holder:
    """A lease; without a user, one of the pool's own."""
    return Holder(
        pool="main",
        server=server,
        backend_pid=1000 + server,
        who=Who(server if user else 0, application, user, "app", "127.0.0.1:4711"),
        statement=of,
        state="idle in transaction",
        leased_at=1.0,
        since=2.0,
        transaction_since=1.0,
        pin="",
    )


def blocker(application: str, of: Holder | None = None) -> Blocker:
    """The root of a chain of locks."""
    return Blocker(
        backend_pid=77,
        waits_for=(),
        state="idle in transaction",
        wait_event="",
        application=application,
        user="app",
        is_ours=of is not None,
        holder=of,
    )


def gauges(
    *,
    waited: float = 0.0,
    holders: Sequence[Holder] = (),
    connecting: int = 0,
    is_up: bool = True,
) -> PoolGauges:
    """Pool ``main`` at one instant."""
    return PoolGauges(
        name="main",
        used=len(holders),
        idle=0,
        connecting=connecting,
        max_size=25,
        pending=0,
        oldest_wait=0.0,
        waited=waited,
        is_up=is_up,
        holders=lambda: list(holders),
    )
