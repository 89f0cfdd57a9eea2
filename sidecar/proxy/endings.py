"""How a lease or a session ends that does not end by itself.

Owns what then becomes of the server connection, what the client is told, and what the log says. That it
ends, and when, the ``relay`` decides.
"""

import logging
from typing import Final

from sidecar.errors import ServerConnectionLost, ServerProtocolError, SidecarError
from sidecar.events import CloseReason, ErrorOrigin, ErrorReason, Phase
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy.replies import Replies
from sidecar.proxy.tables import Client, PoolTables
from sidecar.proxy.texts import Texts
from sidecar.work import Failure, Statement, Who

log = logging.getLogger("pgsidecar.proxy")

_NO_ERRORS: Final = ("57P01", "57P05")
"""The sidecar or an administrator ends the session, or it was idle for too long."""

_IDENTIFIED: Final = 16 * 1024
"""Bytes of a message; where many are refused, to know what they wanted must not take long."""


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
        Failure(origin, error.sqlstate, error.logged, who.application, statement)
    )
    return m.error_response(
        severity, error.sqlstate, error.message, detail=error.detail, hint=error.hint
    )


def refusal(tables: PoolTables, error: SidecarError, who: Who, data: bytes, pos: int) -> bytes:
    """The same for a cycle that gets no connection; it begins here."""
    return report(tables.pool, error, "ERROR", who, _statement_at(tables.texts, data, pos))


def _statement_at(texts: Texts, data: bytes, pos: int) -> Statement | None:
    """The statement that a cycle begins with, where its first message says which."""
    if len(data) - pos < 5:
        return None
    kind, length = m.HEADER.unpack_from(data, pos)
    end = pos + 1 + length
    if kind not in (m.QUERY, m.PARSE) or end > len(data) or length > _IDENTIFIED:
        return None
    if kind == m.QUERY:
        return _of(texts.query(data[pos + 5 : end - 1]).statement)
    text = data.find(0, pos + 5, end) + 1
    return _of(texts.parse(data[text : max(text, data.find(0, text, end))]).statement)


def _of(statement: Statement) -> Statement:
    return statement.shared or statement


def farewell(pool: Pool, error: SidecarError, who: Who, statement: Statement | None) -> bytes:
    """The last ErrorResponse of a session. One that had to end is not an error."""
    if error.sqlstate not in _NO_ERRORS:
        return report(pool, error, "FATAL", who, statement)
    return m.error_response("FATAL", error.sqlstate, error.message, hint=error.hint)


def log_closed(pool: Pool, client: Client, error: SidecarError) -> None:
    log.info(
        "client connection closed",
        extra={
            "pool": pool.name,
            "client": client.address,
            "user": client.user,
            "sqlstate": error.sqlstate,
            "cause": error.logged,
        },
    )
