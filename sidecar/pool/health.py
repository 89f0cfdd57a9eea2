"""Is the server there, and is a connection fit for the next client?

Owns the round trips made on connections that nobody leases (ping, rollback, reset), the delay
between attempts to connect, and the names of what can go wrong. Decides nothing about the pool.
"""

import errno
import random
import socket
from collections.abc import Callable, Sequence
from typing import Final

from sidecar.config import ServerTarget
from sidecar.errors import (
    ServerError,
    ServerProtocolError,
    ServerUnavailable,
    TlsFailed,
    WrongRole,
)
from sidecar.events import ErrorReason, Phase
from sidecar.pool.link import MAX_LOGIN_MESSAGE
from sidecar.pool.login import describe as describe
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.work import Who

PING: tuple[bytes, ...] = (m.query(b""),)
"""An empty query: a full round trip through the backend that leaves nothing in its statistics."""

ROLLBACK = m.query(b"ROLLBACK")
DISCARD_ALL = m.query(b"DISCARD ALL")
"""Two messages: DISCARD ALL refuses to run together with other statements."""

LOST = "lost"
"""In place of an SQLSTATE; no server can say it."""

_TOLD: Final = frozenset(
    {m.EMPTY_QUERY_RESPONSE, m.COMMAND_COMPLETE, m.NOTICE_RESPONSE, m.NOTIFICATION_RESPONSE}
)
"""What else may be in the answers to the queries here. Anything besides is somebody else's."""

_BACKOFF_FIRST = 0.1  # s
_BACKOFF_MOST = 5.0  # s: a server that is back is used within seconds


NOBODY: Final = Who(0, "pgsidecar", "", "", "")
"""The pool itself."""


class Check:
    """Sends queries on an unleased connection and waits for as many ReadyForQuery."""

    def __init__(
        self,
        server: ServerConnection,
        queries: Sequence[bytes],
        done: Callable[[ServerConnection, str], None],
    ) -> None:
        """``done(server, sqlstate)`` is called once: "" if all went well, ``LOST`` if it was lost."""
        self._server = server
        self._done = done
        self._owed = len(queries)
        self._sqlstate = ""
        self._rest = b""
        server.receiver = self
        server.write(b"".join(queries))

    def server_data(self, data: bytes) -> None:
        data = self._rest + data
        pos = 0
        while len(data) - pos >= 5:
            kind, length = m.HEADER.unpack_from(data, pos)
            end = pos + 1 + length
            if not 4 <= length <= MAX_LOGIN_MESSAGE:
                self._owed = 0
                break
            if end > len(data):
                break
            body = data[pos + 5 : end]
            if kind == m.ERROR_RESPONSE:
                self._sqlstate = m.sqlstate_of(body)
            elif kind == m.PARAMETER_STATUS:
                self._server.remember_parameter(body)
            elif kind == m.READY_FOR_QUERY:
                self._owed -= 1
                self._server.tx_status = body[0] if body else m.FAILED
            elif kind not in _TOLD:
                self._owed = 0
                break
            pos = end
        self._rest = data[pos:]
        if self._owed <= 0:
            self._server.receiver = None
            if self._rest or self._owed:  # more than it was asked
                self._sqlstate = self._sqlstate or ServerProtocolError.sqlstate
            if self._server.tx_status != m.IDLE:
                self._sqlstate = self._sqlstate or "25001"  # active_sql_transaction
            self._done(self._server, self._sqlstate)

    def server_lost(self) -> None:
        self._done(self._server, LOST)

    def server_writable(self, is_writable: bool) -> None:
        pass  # a check is a few bytes

    def describe(self, now: float) -> str:
        return "the pool's own check"

    def who(self) -> Who:
        return NOBODY


def clean_up(server: ServerConnection, *, is_dirty: bool) -> tuple[bytes, ...]:
    """The queries that make a connection fit for the next client; none if it is."""
    queries = () if server.tx_status == m.IDLE else (ROLLBACK,)
    return (*queries, DISCARD_ALL) if is_dirty else queries


class Backoff:
    """Delay between attempts: doubles from 0.1 s to 5 s, each with jitter; never gives up."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.failures = 0
        self.not_before = 0.0

    def failed(self, now: float) -> float:
        """Another attempt failed. Returns the delay in seconds."""
        delay = min(_BACKOFF_MOST, _BACKOFF_FIRST * 2.0 ** min(self.failures, 16))
        delay *= self._rng.uniform(0.5, 1.0)
        self.failures += 1
        self.not_before = now + delay
        return delay

    def succeeded(self) -> None:
        self.failures = 0
        self.not_before = 0.0


_VERIFIER_DIFFERS = (
    "The client's SCRAM proof is good for a server with the same verifier only: take it from"
    " pg_authid anew, or set users.<user>.password."
)
_NO_SECRET = (
    "Set users.<user>.password, or users.<user>.verifier from the server's pg_authid and have"
    " clients log in with scram-sha-256."
)


def hinted(exc: Exception, target: ServerTarget) -> Exception:
    """What to do where the server does not take a client's own secret."""
    if not isinstance(exc, ServerError) or exc.sqlstate != "28P01" or exc.hint:
        return exc
    if target.scram_keys is not None:
        hint = _VERIFIER_DIFFERS
    elif target.password is None:
        hint = _NO_SECRET
    else:
        return exc
    return ServerError(exc.message, detail=exc.detail, hint=hint, sqlstate=exc.sqlstate)


_BY_SQLSTATE = {
    "3D000": ErrorReason.DATABASE,
    "53300": ErrorReason.TOO_MANY_CONNECTIONS,
    "57P01": ErrorReason.ADMIN_SHUTDOWN,
    "57P02": ErrorReason.ADMIN_SHUTDOWN,
    "57P03": ErrorReason.STARTING_UP,
}


def reason_of(sqlstate: str) -> ErrorReason:
    """The cause that an SQLSTATE of a login stands for."""
    if sqlstate.startswith("28"):
        return ErrorReason.AUTH
    return _BY_SQLSTATE.get(sqlstate, ErrorReason.SERVER_ERROR)


def is_refusal(exc: BaseException | None) -> bool:
    """The server has answered, and does not want this login: no matter of being there or not.

    One that starts up or shuts down says so, too, and is only asked again later.
    """
    return isinstance(exc, ServerError) and reason_of(exc.sqlstate) not in (
        ErrorReason.STARTING_UP,
        ErrorReason.ADMIN_SHUTDOWN,
    )


def is_permanent(exc: BaseException) -> bool:
    """Waiting will not help: the server refuses this user or database."""
    return isinstance(exc, ServerError) and reason_of(exc.sqlstate) in (
        ErrorReason.AUTH,
        ErrorReason.DATABASE,
    )


def explain(exc: BaseException, *, has_connected: bool) -> tuple[Phase, ErrorReason]:
    """Phase and cause of a failed attempt to connect."""
    phase = Phase.AUTH if has_connected else Phase.CONNECT
    match exc:
        case ServerError():
            return Phase.AUTH, reason_of(exc.sqlstate)
        case ServerProtocolError():
            return Phase.AUTH, ErrorReason.PROTOCOL
        case TlsFailed():
            return Phase.TLS, ErrorReason.TLS
        case WrongRole():
            return Phase.AUTH, ErrorReason.ROLE
        case ServerUnavailable(__cause__=Exception() as last):  # of several hosts
            return explain(last, has_connected=has_connected)
        case ServerUnavailable():
            return Phase.AUTH, ErrorReason.RESET
        case socket.gaierror():
            return Phase.CONNECT, ErrorReason.DNS
        case TimeoutError():
            return phase, ErrorReason.TIMEOUT
        case ConnectionRefusedError():
            return Phase.CONNECT, ErrorReason.REFUSED
        case ConnectionError():
            return phase, ErrorReason.RESET
        case OSError() if f"[Errno {errno.ECONNREFUSED}]" in str(exc):
            return Phase.CONNECT, ErrorReason.REFUSED  # by every address of the host
    return Phase.CONNECT, ErrorReason.UNREACHABLE
