"""Opens a pool's server connections: when, how many at a time, and what follows a failure.

Owns the attempts to connect, the delay between them, whether the server is known to be up, and who
waits for the first connection. Runs one task for each attempt. Whom a connection serves is decided
by ``pool.pool``.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final

from sidecar.config import PoolConfig
from sidecar.errors import AcquireTimeout, ServerError, ServerUnavailable, SidecarError
from sidecar.events import ConnectReason, ErrorReason, PoolObserver, TimeoutKind
from sidecar.pool import health
from sidecar.pool.server import ServerConnection, clock
from sidecar.pool.state import ConnectionState, PoolState

log = logging.getLogger("pgsidecar.pool")

LIFETIME_JITTER: Final = 0.1
"""Connections opened together must not all be replaced together."""

_PROVEN: Final = 1.0
"""Seconds. A login that the server takes back sooner was none: think of a proxy whose server is gone."""

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class Opener:
    """``make`` adds a connection that is not open yet, ``remove`` takes one off that could not be
    opened, ``opened`` gets it when it is, ``refused``
    is told when the server refuses this user or database. With ``share`` the pool has a budget
    together with others: then that decides who opens connections, and calls ``open_one``."""

    def __init__(
        self,
        config: PoolConfig,
        observer: PoolObserver,
        state: PoolState[ServerConnection, Any],
        spawn: Spawn,
        rng: random.Random,
        *,
        make: Callable[[], ServerConnection],
        remove: Callable[[ServerConnection], object],
        opened: Callable[[ServerConnection, float], None],
        refused: Callable[[SidecarError], None],
        share: Callable[[float], None] | None = None,
    ) -> None:
        self.is_up = False
        self.is_closed = False
        self.is_paused = False  # nothing is opened
        self.last_failure: BaseException | None = None
        self.parameters: dict[bytes, bytes] = {}
        """ParameterStatus of the first connection: what a client is told at its login."""
        self.owed = 0  # lost connections not yet replaced
        self.config = config
        self._observer: Final = observer
        self._state: Final = state
        self._spawn: Final = spawn
        self._rng: Final = rng
        self._make: Final = make
        self._remove: Final = remove
        self._opened: Final = opened
        self._refused: Final = refused
        self._share: Final = share
        self._backoff: Final = health.Backoff(rng)
        self._is_doubtful = False  # logins succeed, but were taken back
        self._logins: dict[asyncio.Future[None], float] = {}  # and since when each waits
        self._asks_again = False  # after a refusal, whatever the backoff says

    # -- how many ------------------------------------------------------------------------------

    def wanted(self, now: float) -> int:
        """How many connections should be opened now: all that are missing, or one at a time while
        the server refuses or is lost."""
        state = self._state
        if self.is_closed or self.is_paused:
            return 0
        is_trying = bool(state.by_state[ConnectionState.CONNECTING])
        missing = state.missing()
        if state.established and not is_trying and state.wanted() <= 0:
            self.owed = 0  # fewer are enough: what is opened later is not in their place
        if self._logins and not (missing or is_trying or state.established):
            missing = min(1, state.max_size - state.size)
        if self._asks_again and self._logins:
            return 0 if is_trying else min(missing, 1)
        if self._backoff.failures or (self.owed and not state.established):
            return 0 if is_trying or now < self._backoff.not_before else min(missing, 1)
        return missing

    def waits_since(self) -> float | None:
        """When the login that waits longest began to; None if none waits."""
        return next(iter(self._logins.values()), None)

    def logins(self) -> list[float]:
        """Since when each login waits."""
        return list(self._logins.values())

    def grow(self, now: float) -> None:
        """Open what is wanted."""
        if self._share is not None:
            self._share(now)
            return
        for _ in range(self.wanted(now)):
            self.open_one()

    def ensure_one(self, now: float) -> None:
        """Open a connection if there is none at all: for a ping, which needs one even where
        ``min_idle`` is 0."""
        if self.is_paused:
            return
        if not self._state.size and not self.is_closed and now >= self._backoff.not_before:
            self.open_one()

    def tick(self, now: float) -> None:
        """The backoff may be over; every 100 ms."""
        if self._is_doubtful and any(
            now - server.opened_at >= _PROVEN
            for servers in (self._state.idle, self._state.active)
            for server in servers
        ):
            self._is_doubtful = False
            self._backoff.succeeded()
        if self._share is None:  # who shares does so for all pools at once
            self.grow(now)

    def lost(self, server: ServerConnection, now: float, *, was_leased: bool) -> None:
        """The server has closed a connection unbidden. What a client made it do is no reason to
        pause; else a new one that is lost is a failed attempt."""
        self.owed += 1
        if not was_leased and now - server.opened_at < _PROVEN:
            self._is_doubtful = True
            if now >= self._backoff.not_before:
                self._backoff.failed(now)

    def open_one(self) -> None:
        """Begin to open a connection; it was ``wanted``."""
        self._asks_again = False
        if self.owed:
            reason = ConnectReason.RECONNECT
        elif self._state.waiters or self._logins:
            reason = ConnectReason.DEMAND
        else:
            reason = ConnectReason.WARM
        self._spawn(self._open(self._make(), reason))

    # -- one attempt ---------------------------------------------------------------------------

    async def _open(self, server: ServerConnection, reason: ConnectReason) -> None:
        started = clock()
        try:
            await server.open(started + self.config.connect_timeout)
        except (OSError, SidecarError) as exc:  # TimeoutError is an OSError
            self._failed(server, reason, exc)
        except Exception as exc:
            log.exception("login to the server failed", extra={"pool": self.config.name})
            self._failed(server, reason, exc)
        except BaseException:
            self._remove(server)
            server.abort()
            raise
        else:
            self._succeeded(server, reason, started)

    def _failed(self, server: ServerConnection, reason: ConnectReason, exc: Exception) -> None:
        self._remove(server)
        server.abort()
        if self._share is not None and not self.config.target.user:
            exc = health.hinted(exc, server.target)
        phase, cause = health.explain(exc, has_connected=server.has_connected)
        self._observer.connection_failed(phase, cause)
        if cause is ErrorReason.TIMEOUT:
            self._observer.timed_out(TimeoutKind.CONNECT)
        if reason is ConnectReason.RECONNECT:
            self._observer.reconnected(False)
        self.last_failure = exc
        if not self._state.established:
            self.is_up = False
        delay = self._backoff.failed(clock())
        log.warning(
            "cannot connect to the server",
            extra={
                "pool": self.config.name,
                "server": self.config.target.describe(),
                "cause": health.describe(exc),
                "attempt": self._backoff.failures,
                "next_attempt_in": round(delay, 3),
            },
        )
        if isinstance(exc, SidecarError) and not self._state.established:
            if health.is_refusal(exc):
                self.end_logins(exc)
            if health.is_permanent(exc):
                self._refused(exc)
        if self._share is not None:
            self._share(clock())  # others may have the place

    def _succeeded(self, server: ServerConnection, reason: ConnectReason, started: float) -> None:
        now = clock()
        pool = self.config.name
        if server.state is not ConnectionState.CONNECTING:
            return  # closed meanwhile
        if not self._is_doubtful:
            if self._backoff.failures:
                log.info("the server accepts connections again", extra={"pool": pool})
            self._backoff.succeeded()
        self.is_up = True
        self.last_failure = None
        if not self.parameters:
            self.parameters = dict(server.parameters)
        self.end_logins(None)
        server.opened_at = now
        server.status_since = now
        if server.age_limit >= 0.0:  # else it is to be replaced already
            lifetime = self.config.max_lifetime
            server.age_limit = now + lifetime * self._rng.uniform(1.0 - LIFETIME_JITTER, 1.0)
        self._observer.connection_opened(reason, now - started)
        if reason is ConnectReason.RECONNECT:
            self.owed = max(0, self.owed - 1)
            self._observer.reconnected(True)
        log.debug("server connection opened", extra={"pool": pool, "backend_pid": server.pid})
        self._opened(server, now)
        self.grow(now)

    # -- logins --------------------------------------------------------------------------------

    async def wait_for_parameters(self, deadline: float) -> None:
        """Return once a server connection has told us the server's parameters.

        Raises ServerUnavailable at the deadline, and the server's own refusal at once. A refusal is
        not remembered: who comes after it has the server asked again, together with all who
        wait then.
        """
        is_refused = health.is_refusal(self.last_failure) and not self._state.established
        if self.parameters and not is_refused:
            return
        now = clock()
        known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._logins[known] = now
        if is_refused and not self._state.by_state[ConnectionState.CONNECTING]:
            self._asks_again = True
        try:
            self.grow(now)
            async with asyncio.timeout_at(deadline):
                await known
        except TimeoutError:
            raise self._too_late(now) from self.last_failure
        finally:
            del self._logins[known]

    def _too_late(self, since: float) -> SidecarError:
        """The error for a login whose time is over."""
        if self._share is None or self.last_failure is not None or self._state.size:
            return self.unavailable()
        name, limit = self.config.name, self.config.max_size
        return AcquireTimeout(
            f"no connection from template {name!r} in {clock() - since:.1f} s",
            detail=f"Its pools have all {limit} connections in use.",
            hint=f"The limit is max_size ({limit}).",
        )

    def end_logins(self, error: SidecarError | None) -> None:
        """Let those go on who wait for the parameters, or tell them why not."""
        self._asks_again = False
        for known in self._logins:
            if not known.done():
                if error is None:
                    known.set_result(None)
                else:
                    known.set_exception(error)

    def unavailable(self) -> SidecarError:
        """The error for who waited while there was no connection at all, or none to be had."""
        if self.is_paused:
            return AcquireTimeout(
                f"no connection from pool {self.config.name!r}: it is paused",
                hint="An administrator has paused it; RESUME at the console lets it go on.",
            )
        cause = f": {self.why_down()}" if self.last_failure is not None else ""
        return ServerUnavailable(
            f"pool {self.config.name!r} cannot reach PostgreSQL at "
            f"{self.config.target.describe()}{cause}",
            hint="The pool keeps trying; retry later.",
        )

    def why_down(self) -> str:
        """The cause of the last failure to connect, for a person; empty if there is none."""
        return "" if self.last_failure is None else health.describe(self.last_failure)

    def why_small(self) -> str:
        """Why there are fewer connections than ``max_size``, although clients wait; else empty."""
        return self.why_down() if len(self._state.active) < self._state.max_size else ""

    @property
    def is_kept_small(self) -> bool:
        """The server has no room for more connections."""
        failure = self.last_failure
        is_full = isinstance(failure, ServerError) and failure.sqlstate == "53300"
        return is_full and bool(self.why_small())
