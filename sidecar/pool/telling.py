"""What can be told of a pool's server connections, for people who look.

Reads attributes and sockets' addresses; decides nothing and keeps nothing.
"""

from collections.abc import Iterator
from typing import Any, Final

from sidecar.events import ServerSnapshot
from sidecar.pool import report
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection
from sidecar.pool.state import ConnectionState
from sidecar.protocol import messages as m

_WORDS: Final = {
    ConnectionState.CONNECTING: "new",
    ConnectionState.IDLE: "idle",
    ConnectionState.ACTIVE: "active",
    ConnectionState.CHECKING: "tested",
    ConnectionState.CLOSING: "closing",
}
"""PgBouncer's, who knows no ``closing``."""

Address = tuple[str, int]


def servers(pool: Pool) -> Iterator[ServerSnapshot]:
    """The server connections of a pool, one after the other: the caller may pause between."""
    for connections in pool.state.by_state:
        for server in list(connections):
            yield _server(pool, server)


def _server(pool: Pool, server: ServerConnection) -> ServerSnapshot:
    target = pool.target
    (address, port), (local_address, local_port) = addresses(server.transport)
    state = _WORDS[server.state]
    if server.cancels and server.state is ConnectionState.CHECKING:
        state = "being_canceled"
    return ServerSnapshot(
        id=server.id,
        pool=pool.name,
        pool_key=id(pool),
        user=target.user,
        database=target.database,
        state=state,
        address=address,
        port=port,
        local_address=local_address,
        local_port=local_port,
        tls=tls(server.transport),
        opened_at=server.opened_at,
        leased_at=server.leased_at,
        query_started=server.query_started if server.queries else 0.0,
        status_since=server.status_since,
        in_transaction=server.tx_status != m.IDLE,
        pid=server.pid,
        prepared_statements=len(server.prepared),
        cancels=server.cancels,
        is_replaced=server.age_limit < 0.0,
        pin=server.pin,
        pinned_at=server.pinned_at,
        statement=report.statement_of(server),
    )


def addresses(transport: Any) -> tuple[Address, Address]:
    """Of the other end and of ours. A local socket has no address, but is called ``unix``."""
    if transport is None:
        return ("", 0), ("", 0)
    return (
        _address(transport.get_extra_info("peername")),
        _address(transport.get_extra_info("sockname")),
    )


def _address(name: object) -> Address:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("unix", 0)


def tls(transport: Any) -> str:
    """``TLSv1.3/TLS_AES_256_GCM_SHA384``; empty if the connection is not encrypted."""
    ssl_object = None if transport is None else transport.get_extra_info("ssl_object")
    if ssl_object is None:
        return ""
    cipher = ssl_object.cipher()
    return f"{ssl_object.version()}/{cipher[0] if cipher else ''}"
