"""Looks users up on the server: their SCRAM verifiers, by a pool's ``auth_query``.

It asks beside the pool (``pool.sideline``): a login never waits for a client to give a connection back,
and a full pool lets people in who want to see why.

One task while there is something to look up; concurrent logins of one user share one query. Results
are kept for 5 s, so that a thousand clients that come at once cost one query.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Final

from sidecar.config import PoolConfig, ServerTarget
from sidecar.errors import ServerError, ServerUnavailable, SidecarError
from sidecar.pool import health
from sidecar.pool.opening import Spawn
from sidecar.pool.server import clock
from sidecar.pool.sideline import Answer, Sideline
from sidecar.protocol.authentication import ScramVerifier, parse_verifier

log = logging.getLogger("pgsidecar.proxy")

_TIMEOUT: Final = 5.0
"""Seconds for a look-up, connecting included."""
_KEPT: Final = 5.0  # s a result is good for
_MOST_KEPT: Final = 1000  # results
_MOST_ASKED: Final = 1000  # users at a time
_PAUSE: Final = 1.0
"""Seconds after a failure in which nothing is tried: logins are refused at once instead."""
MOST_ROWS: Final = 2  # one too many is enough to know that the query is wrong

_FOUND = ScramVerifier | None
_COLUMNS: Final = 2  # name and secret


class Lookup:
    """Of one pool, which has an ``auth_query``."""

    def __init__(self, pool: PoolConfig, spawn: Spawn) -> None:
        self._pool: Final = pool
        self._spawn: Final = spawn
        self._sideline: Final = Sideline(spawn)
        self._asked: dict[str, asyncio.Future[_FOUND | SidecarError]] = {}
        """Whom to look up, in order."""
        self._kept: dict[str, tuple[float, _FOUND]] = {}
        """Until when a result is good; the oldest first."""
        self.iterations: int | None = None
        """Of the verifier that was found last: the server's scram_iterations, as a rule."""
        self._is_working = False
        self._not_before = 0.0

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
        self._sideline.close()

    # -- the task ------------------------------------------------------------------------------

    async def _work(self) -> None:
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
        finally:
            self._is_working = False

    async def _look_up(self, user: str) -> _FOUND | SidecarError:
        """An error of the query is an outcome; one of the connection is raised."""
        pool = self._pool
        answer = await self._sideline.ask(
            auth_target(pool), pool.auth_query, user, MOST_ROWS, clock() + _TIMEOUT
        )
        try:
            return _verdict(self._pool.name, user, answer)
        except ServerError as exc:
            log.warning("auth_query failed", extra=self._about(exc))
            return SidecarError(
                f"users of pool {self._pool.name!r} cannot be looked up",
                hint="The log of the connection pool says why.",
                sqlstate="58000",
            )

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


def check_answer(answer: Answer) -> None:
    """Raises ServerError if the query failed, or is none for this purpose."""
    if answer.error is not None:
        raise answer.error
    if answer.columns != _COLUMNS:
        raise ServerError(f"it has {answer.columns} columns, not two: the user's name, its secret")


def _verdict(pool: str, user: str, answer: Answer) -> ScramVerifier | None:
    """Raises ServerError if the query cannot be used."""
    check_answer(answer)
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
