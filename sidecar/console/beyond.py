"""Tables that PgBouncer does not have: who waits for whom, who holds what, and what is pinned.

Pure.
"""

from collections.abc import Container, Iterator
from typing import Final

from sidecar.console.facts import View
from sidecar.console.rows import Row, columns
from sidecar.console.words import application_of, micro, query_of
from sidecar.events import ClientSnapshot, PinReason, PoolMode, ServerSnapshot
from sidecar.work import Statement

_NAMED: Final = 10
"""Most holders that one waiter's line names."""

WAITS: Final = columns(
    "database user application_name addr port:int4 client:int4 since wait:int4 wait_us:int4"
    " timeout_us:int8 ahead:int4 behind reason behind_fingerprint behind_query"
)
HOLDERS: Final = columns(
    "database user application_name addr port:int4 client:int4 server:int4 remote_pid:int4 state"
    " since age:int4 age_us:int4 query_us:int8 silent_us:int8 pin fingerprint query"
)
PINS: Final = columns(
    "database user application_name addr port:int4 client:int4 server:int4 remote_pid:int4 reason"
    " since age:int4 age_us:int4"
)


def waits(view: View) -> Iterator[Row]:
    """Longest wait first, pool by pool."""
    clients = list(view.control.clients())
    servers = list(view.control.servers())
    for facts in view.control.pools():
        name = facts.snapshot.name
        waiting = [each for each in clients if each.pool == name and each.waiting_since]
        if not waiting:
            continue
        behind, oldest = _behind([each for each in servers if each.pool == name], clients)
        _, reason = facts.why_wait()
        waiting.sort(key=lambda each: each.waiting_since)
        for ahead, client in enumerate(waiting):
            waited = view.now - client.waiting_since
            yield (
                *(name, client.user, client.application, client.address, client.port, client.id),
                *(view.when(client.waiting_since), int(waited), micro(waited % 1)),
                *(micro(client.deadline - view.now), ahead, behind, reason, *query_of(oldest)),
            )


def _behind(
    servers: list[ServerSnapshot], clients: list[ClientSnapshot]
) -> tuple[str, Statement | None]:
    """The ids of the clients that hold connections, oldest lease first; and that one's statement."""
    by_server = {client.server: client.id for client in clients if client.server}
    leased = sorted(
        (server for server in servers if server.id in by_server), key=lambda each: each.leased_at
    )
    ids = [str(by_server[server.id]) for server in leased]
    more = ["..."] if len(ids) > _NAMED else []
    return ",".join(ids[:_NAMED] + more), leased[0].statement if leased else None


def holders(view: View, only: Container[int] | None = None) -> Iterator[Row]:
    """Oldest lease first; ``only`` of these server connections."""
    linked = {client.server: client for client in view.control.clients() if client.server}
    leased = [
        server
        for server in view.control.servers()
        if server.id in linked and (only is None or server.id in only)
    ]
    leased.sort(key=lambda each: each.leased_at)
    modes = _modes(view)
    for server in leased:
        client = linked[server.id]
        age = view.now - server.leased_at
        is_running = server.query_started > 0.0
        if is_running:
            state = "running a query"
        else:
            state = "idle in transaction" if server.in_transaction else "idle"
        pin = _pin_of(server, modes)
        yield (
            *(server.pool, client.user, application_of(client), client.address, client.port),
            *(client.id, server.id, server.pid, state),
            *(view.when(server.leased_at), int(age), micro(age % 1)),
            micro(view.now - server.query_started) if is_running else None,
            None if is_running else micro(view.now - server.status_since),
            None if pin is None else pin.value,
            *query_of(server.statement),
        )


def pins(view: View) -> Iterator[Row]:
    """Oldest first."""
    linked = {client.server: client for client in view.control.clients() if client.server}
    modes = _modes(view)
    pinned = [
        (server, pin)
        for server in view.control.servers()
        if server.id in linked and (pin := _pin_of(server, modes)) is not None
    ]
    pinned.sort(key=lambda each: _pinned_at(each[0]))
    for server, pin in pinned:
        client = linked[server.id]
        age = view.now - _pinned_at(server)
        yield (
            *(server.pool, client.user, application_of(client), client.address, client.port),
            *(client.id, server.id, server.pid, pin.value),
            *(view.when(_pinned_at(server)), int(age), micro(age % 1)),
        )


def _pinned_at(server: ServerSnapshot) -> float:
    return server.pinned_at or server.leased_at


def _modes(view: View) -> dict[str, PoolMode]:
    return {facts.snapshot.name: facts.snapshot.mode for facts in view.control.pools()}


def _pin_of(server: ServerSnapshot, modes: dict[str, PoolMode]) -> PinReason | None:
    """In session mode every lease is one that outlives its transaction."""
    if server.pin is None and modes.get(server.pool) is PoolMode.SESSION:
        return PinReason.SESSION_MODE
    return server.pin
