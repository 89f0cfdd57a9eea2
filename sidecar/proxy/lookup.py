"""Looks users up on the server: their SCRAM verifiers, by a pool's ``auth_query``.

Owns a connection of its own for each such pool, outside of the pool: a login never waits for a client to
give one back, and a full pool lets people in who want to see why. It is opened when it is needed, and
closed after a minute without a look-up. Ours rather than psycopg's: the same TLS and the same reading
of a dsn as for the pool, and nothing from the environment.

One task while there is something to look up; concurrent logins of one user share one query. Results
are kept for 5 s, so that a thousand clients that come at once cost one query.
"""

import asyncio
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.config import PoolConfig, ServerTarget
from sidecar.errors import ServerError, ServerProtocolError, ServerUnavailable, SidecarError
from sidecar.events import Traffic
from sidecar.pool import health
from sidecar.pool.opening import Spawn
from sidecar.pool.server import ServerConnection, cancel_query, clock
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import ScramVerifier, parse_verifier
from sidecar.work import Who

log = logging.getLogger("pgsidecar.proxy")

_TIMEOUT: Final = 5.0
"""Seconds for the query, and as many to connect."""
_KEPT: Final = 5.0  # s a result is good for
_MOST_KEPT: Final = 1000  # results
_MOST_ASKED: Final = 1000  # users at a time
_PAUSE: Final = 1.0
"""Seconds after a failure in which nothing is tried: logins are refused at once instead."""
_IDLE: Final = 60.0  # s the connection is kept without a look-up
_MOST_BYTES: Final = 64 * 1024  # of an answer

_FOUND = ScramVerifier | None
_COLUMNS: Final = 2  # name and secret


class Lookup:
    """Of one pool, which has an ``auth_query``."""

    def __init__(self, pool: PoolConfig, spawn: Spawn) -> None:
        self._pool: Final = pool
        self._spawn: Final = spawn
        self._server: ServerConnection | None = None
        self._asked: dict[str, asyncio.Future[_FOUND | SidecarError]] = {}
        """Whom to look up, in order."""
        self._kept: dict[str, tuple[float, _FOUND]] = {}
        """Until when a result is good; the oldest first."""
        self.iterations: int | None = None
        """Of the verifier that was found last: the server's scram_iterations, as a rule."""
        self._is_working = False
        self._is_closed = False
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def find(self, user: str, deadline: float) -> ScramVerifier | None:
        """None: there is no such user, or none that can log in with SCRAM.

        Raises ServerUnavailable, soon if the server is down, and SidecarError if the query fails.
        """
        now = clock()
        until, found = self._kept.get(user, (0.0, None))
        if now < until:
            return found
        answer = self._asked.get(user)
        if answer is None:
            if now < self._not_before or len(self._asked) >= _MOST_ASKED:
                raise self._unavailable()
            answer = self._asked[user] = asyncio.get_running_loop().create_future()
            if not self._is_working:
                self._is_working = True
                self._spawn(self._work())
        # not "await answer": who is cancelled would cancel it for all
        await asyncio.wait((answer,), timeout=max(0.0, deadline - 0.1 - now))
        outcome = answer.result() if answer.done() else self._unavailable()
        if isinstance(outcome, SidecarError):
            raise type(outcome)(outcome.message, hint=outcome.hint, sqlstate=outcome.sqlstate)
        return outcome

    def forget(self, user: str) -> None:
        """A login failed: perhaps because the password has been changed since."""
        self._kept.pop(user, None)

    def close(self) -> None:
        """No more look-ups will be asked for; those under way go on."""
        self._is_closed = True
        if not self._is_working:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        server, self._server = self._server, None
        if server is not None and not server.transport.is_closing():
            server.write(m.TERMINATE_MESSAGE)
            server.transport.close()

    def lost(self, server: ServerConnection) -> None:
        if server is self._server:
            self._server = None

    # -- the task ------------------------------------------------------------------------------

    async def _work(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            while self._asked:
                user = next(iter(self._asked))
                try:
                    outcome = await self._look_up(user)
                except (OSError, SidecarError) as exc:
                    log.warning("users cannot be looked up", extra=self._about(exc))
                    self._fail_all()
                except Exception:
                    log.exception("users cannot be looked up", extra={"pool": self._pool.name})
                    self._fail_all()
                else:
                    self._settle(user, outcome)
        except BaseException:
            self._drop()
            raise
        finally:
            self._is_working = False
        idle = 0.0 if self._is_closed else _IDLE
        self._timer = asyncio.get_running_loop().call_later(idle, self._hang_up)

    async def _look_up(self, user: str) -> _FOUND | SidecarError:
        """An error of the query is an outcome; one of the connection is raised."""
        is_new = self._server is None
        try:
            answer = await self._ask(user)
        except ServerUnavailable:
            if is_new:
                raise
            answer = await self._ask(user)  # it had been closed while nobody looked
        try:
            return _verdict(self._pool.name, user, answer)
        except ServerError as exc:
            log.warning("auth_query failed", extra=self._about(exc))
            return SidecarError(
                f"users of pool {self._pool.name!r} cannot be looked up",
                hint="The log of the connection pool says why.",
                sqlstate="58000",
            )

    async def _ask(self, user: str) -> "Answer":
        server = self._server
        if server is None:
            server = ServerConnection(self, auth_target(self._pool), Traffic())
            try:
                await server.open(clock() + _TIMEOUT)
            except BaseException:
                server.abort()
                raise
            self._server = server
        try:
            return await ask(server, self._pool.auth_query, user, clock() + _TIMEOUT)
        except TimeoutError:
            self._drop()
            await _cancel(server)
            raise
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.abort()

    # -- results -------------------------------------------------------------------------------

    def _settle(self, user: str, outcome: _FOUND | SidecarError) -> None:
        if not isinstance(outcome, SidecarError):
            if outcome is not None:
                self.iterations = outcome.iterations
            self._kept.pop(user, None)
            self._kept[user] = clock() + _KEPT, outcome
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        self._asked.pop(user).set_result(outcome)

    def _fail_all(self) -> None:
        self._not_before = clock() + _PAUSE
        asked, self._asked = self._asked, {}
        for answer in asked.values():
            answer.set_result(self._unavailable())

    def _unavailable(self) -> ServerUnavailable:
        """No details: it goes to strangers."""
        return ServerUnavailable(
            f"users of pool {self._pool.name!r} cannot be looked up now",
            hint="The server may be down; retry later. The log of the connection pool says why.",
        )

    def _about(self, exc: BaseException) -> dict[str, object]:
        return {
            "pool": self._pool.name,
            "server": auth_target(self._pool).describe(),
            "cause": health.describe(exc),
        }


def auth_target(pool: PoolConfig) -> ServerTarget:
    """Where, and as whom, users of this pool are looked up."""
    target = pool.auth_target
    ours = {"application_name": "pgsidecar auth_query"}
    return replace(target, parameters={**ours, **target.parameters, "client_encoding": "UTF8"})


def _verdict(pool: str, user: str, answer: "Answer") -> ScramVerifier | None:
    """Raises ServerError if the query cannot be used."""
    answer.check()
    if not answer.rows or answer.rows == [[None, None]]:  # so says a function that found nothing
        return None
    name, secret = answer.rows[0]
    if len(answer.rows) > 1 or name != user.encode():
        # A query without its WHERE would give one user the password of another.
        raise ServerError("it returns other users than $1")
    if not secret:
        return None
    try:
        return parse_verifier(secret.decode())
    except ValueError:
        kind = "an md5 password" if secret.startswith(b"md5") else "no SCRAM verifier"
        log.warning(
            "user cannot log in",
            extra={"user": user, "pool": pool, "cause": f"auth_query found {kind}"},
        )
        return None


# -- one query ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """What the server said to the query."""

    columns: int = 0
    rows: list[list[bytes | None]] = field(default_factory=list, repr=False)
    error: ServerError | None = None

    def check(self) -> None:
        """Raises ServerError if the query failed, or is none for this purpose."""
        if self.error is not None:
            raise self.error
        if self.columns != _COLUMNS:
            raise ServerError(
                f"it has {self.columns} columns, not two: the user's name, its secret"
            )


class _Reader:
    """A receiver for the answer."""

    def __init__(self, server: ServerConnection) -> None:
        self._server = server
        self._data = b""
        self._answer = Answer()
        self.done: asyncio.Future[Answer | SidecarError] = (
            asyncio.get_running_loop().create_future()
        )

    def server_data(self, data: bytes) -> None:
        self._data += data
        try:
            for kind, body in self._messages():
                self._take(kind, body)
        except (ValueError, IndexError, struct.error):
            self._end(ServerProtocolError("an answer to auth_query that cannot be read"))
        if len(self._data) > _MOST_BYTES:
            self._end(ServerProtocolError(f"an answer of more than {_MOST_BYTES} bytes"))

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while len(self._data) >= 5:
            kind, length = m.HEADER.unpack_from(self._data)
            if not 4 <= length <= _MOST_BYTES:
                raise ValueError
            if len(self._data) <= length:
                return
            body, self._data = self._data[5 : length + 1], self._data[length + 1 :]
            yield kind, body

    def _take(self, kind: int, body: bytes) -> None:
        answer = self._answer
        if kind == m.ROW_DESCRIPTION:
            answer.columns = int.from_bytes(body[:2], "big")
        elif kind == m.DATA_ROW and len(answer.rows) < 2:
            answer.rows.append(_columns(body))
        elif kind == m.ERROR_RESPONSE:
            text = m.error_fields(body).get("M", "error")
            answer.error = ServerError(text, sqlstate=m.sqlstate_of(body))
        elif kind == m.PARAMETER_STATUS:
            self._server.remember_parameter(body)
        elif kind == m.READY_FOR_QUERY:
            self._server.receiver = None
            self._end(answer)

    def _end(self, outcome: Answer | SidecarError) -> None:
        if not self.done.done():
            self.done.set_result(outcome)

    def server_lost(self) -> None:
        self._end(ServerUnavailable("the server closed the connection"))

    def server_writable(self, is_writable: bool) -> None:
        pass  # a query is a few bytes

    def describe(self, now: float) -> str:
        return "the look-up of users"

    def who(self) -> Who:
        return health.NOBODY


def _columns(body: bytes) -> list[bytes | None]:
    (count,) = struct.unpack_from("!H", body)
    at = 2
    values: list[bytes | None] = []
    for _ in range(count):
        (size,) = struct.unpack_from("!i", body, at)
        at += 4
        values.append(None if size < 0 else body[at : at + size])
        at += max(0, size)
    return values


async def ask(server: ServerConnection, query: str, user: str, deadline: float) -> Answer:
    """Run the query for this user, as a parameter. Raises TimeoutError and SidecarError."""
    name = user.encode()
    reader = _Reader(server)
    server.receiver = reader
    server.write(
        m.parse(b"", query.encode() + b"\0\0\0")
        + m.message(m.BIND, b"\0\0" + struct.pack("!HHi", 0, 1, len(name)) + name + b"\0\0")
        + m.message(m.DESCRIBE, b"P\0")
        + m.message(m.EXECUTE, b"\0" + struct.pack("!I", 2))
        + m.SYNC_MESSAGE
    )
    async with asyncio.timeout_at(deadline):
        outcome = await reader.done
    if isinstance(outcome, SidecarError):
        raise outcome
    return outcome


async def _cancel(server: ServerConnection) -> None:
    """Else its backend would go on, and the next look-up have another one beside it."""
    try:
        await cancel_query(server, clock() + _PAUSE)
    except (OSError, SidecarError) as exc:
        log.info("cancel request failed", extra={"cause": health.describe(exc)})
