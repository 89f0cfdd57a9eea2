"""How a lease or a session ends that does not end by itself.

Owns what then becomes of the server connection, what the client is told, and what the log says. That it
ends, and when, the ``relay`` decides.
"""

import logging

from sidecar.errors import ServerConnectionLost, ServerProtocolError, SidecarError
from sidecar.events import CloseReason, ErrorOrigin, ErrorReason, Phase
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy.replies import Replies
from sidecar.proxy.tables import Client
from sidecar.work import Failure, Statement, Who

log = logging.getLogger("pgsidecar.proxy")


def give_up(
    pool: Pool, server: ServerConnection, replies: Replies, reason: CloseReason, now: float
) -> None:
    """The client is gone, or has to go, and holds a connection: keep that only where it is sound."""
    is_between = not (server.mid_message or replies.held or replies.incoming)
    is_fit = replies.is_at_rest and is_between
    replies.abandon(server, now)
    if server.effects:
        server.is_dirty = True
    if is_fit:
        pool.release(server, now)
    else:
        pool.discard(server, reason, now)


def lose(
    pool: Pool, server: ServerConnection, replies: Replies, exc: ServerProtocolError, now: float
) -> None:
    """The server broke the protocol: nothing that it says can be trusted any more."""
    # a warning: a client that breaks the protocol amid a copy can make a server say this, too
    log.warning("server broke the protocol", extra={"pool": pool.name, "cause": str(exc)})
    pool.observer.connection_failed(Phase.QUERY, ErrorReason.PROTOCOL)
    replies.abandon(server, now)
    pool.discard(server, CloseReason.PROTOCOL_ERROR, now)


def server_is_gone(pool: Pool) -> SidecarError:
    return ServerConnectionLost(
        "the server closed the connection unexpectedly",
        detail=f"Pool {pool.name!r}, server {pool.config.target.describe()}.",
        hint="The transaction was not completed, or its outcome is not known.",
    )


def block_in_statement_mode(pool: Pool) -> SidecarError:
    return SidecarError(
        "transaction blocks are not allowed in statement mode",
        detail=f"The mode of pool {pool.name!r} is statement. The transaction has been rolled back.",
        hint="Use a pool in transaction mode.",
        sqlstate="0A000",
    )


def report(
    pool: Pool,
    error: SidecarError,
    severity: str,
    who: Who,
    statement: Statement | None = None,
) -> bytes:
    """The ErrorResponse for an error of ours. It is counted."""
    is_network = isinstance(error, ServerConnectionLost)
    origin = ErrorOrigin.NETWORK if is_network else ErrorOrigin.SIDECAR
    pool.observer.query_failed(
        Failure(origin, error.sqlstate, error.message, who.application, statement)
    )
    return m.error_response(
        severity, error.sqlstate, error.message, detail=error.detail, hint=error.hint
    )


def farewell(pool: Pool, error: SidecarError, who: Who, *, is_error: bool) -> bytes:
    """The last ErrorResponse of a session. One that had to end is not an error."""
    if is_error:
        return report(pool, error, "FATAL", who)
    return m.error_response("FATAL", error.sqlstate, error.message, hint=error.hint)


def log_closed(pool: Pool, client: Client, error: SidecarError) -> None:
    log.info(
        "client connection closed",
        extra={
            "pool": pool.name,
            "client": client.address,
            "user": client.user,
            "sqlstate": error.sqlstate,
            "cause": error.message,
        },
    )
