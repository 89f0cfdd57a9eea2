"""Sweeps the limits of all clients, every 100 ms.

Leases are looked at in each sweep: they are as many as server connections. The other clients are
thousands, so each is looked at only when its time may be over. What is over is decided in
``limits``, what is a leak in ``pool.leaks``; here is what is done then. Runs no task: the service's
janitor calls ``tick``.
"""

import logging
from collections.abc import Iterable
from typing import Final

from sidecar.events import TimeoutKind
from sidecar.pool.leaks import Leak, Leaks
from sidecar.pool.pool import Pool
from sidecar.pool.report import statement_of
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy.limits import CANCEL, CLIENT_IDLE, QUERY, Over, Watch, Wheel, leaked
from sidecar.proxy.relay import Relay

log = logging.getLogger("pgsidecar.proxy")

LAST_WORDS: Final = 5.0
"""Seconds that a client gets to read why it is closed."""

_STEP: Final = 0.1  # s

_LOGGED: Final = 200
"""Characters of a statement."""

_COPY_IS_OVER: Final = m.message(m.COPY_FAIL, CANCEL.message.encode() + b"\0")


class Sweeper:
    def __init__(self, now: float) -> None:
        self._wheel: Final[Wheel[Relay]] = Wheel(_STEP, now)
        self._watches: dict[ServerConnection, Watch] = {}
        self._leaks: Final = Leaks()

    def came(self, relay: Relay) -> None:
        """The client has logged in."""
        if relay.limits.client_idle:
            self._wheel.put(relay, relay.idle_since + relay.limits.client_idle)

    def closing(self, relay: Relay, now: float) -> None:
        """The client has been told to go. One that does not read would stay for ever."""
        self._wheel.put(relay, now + LAST_WORDS)

    def gone(self, relay: Relay) -> None:
        self._wheel.remove(relay)

    def tick(self, pools: Iterable[Pool], now: float) -> None:
        pools = list(pools)
        watches: dict[ServerConnection, Watch] = {}
        for pool in pools:
            for server in list(pool.state.active):
                relay = server.receiver
                if isinstance(relay, Relay) and relay.limits.concern_leases:
                    watches[server] = watch = self._watches.get(server) or Watch()
                    self._sweep_lease(relay, server, watch, now)
        self._watches = watches
        for relay in self._wheel.due(now):
            if relay.transport.is_closing():
                relay.transport.abort()
            else:
                self._sweep_idle(relay, now)
        self._sweep_leaks(pools, now)

    def _sweep_leaks(self, pools: Iterable[Pool], now: float) -> None:
        for leak in self._leaks.over():
            leak.pool.observer.leak_ended(leak.holder)
            log.info("leak ended", extra=_told(leak, now))
        for leak in self._leaks.search(pools, now):
            leak.pool.observer.leak_began(leak.holder)
            closes = leak.pool.config.leak_action == "close"
            extra = _told(leak, now) | {"hint": _CLOSED if closes else _LOOK_THERE}
            log.warning("leak", extra=extra)
            relay = leak.server.receiver
            if closes and isinstance(relay, Relay):
                _end(relay, leaked(leak.pool.config.leak_threshold, now - leak.since), now)

    def _sweep_lease(
        self, relay: Relay, server: ServerConnection, watch: Watch, now: float
    ) -> None:
        over = watch.judge(
            relay.limits,
            server,
            now,
            is_at_rest=relay.replies.is_at_rest,
            passing=relay.requests.passing,
        )
        if over is CANCEL:
            _cancel(relay, server)
        elif over is not None:
            _end(relay, over, now)

    def _sweep_idle(self, relay: Relay, now: float) -> None:
        limit = relay.limits.client_idle
        if not limit:
            return
        since = _silent_since(relay, now)
        if now - since < limit:
            self._wheel.put(relay, since + limit)
        else:
            _end(relay, CLIENT_IDLE, now)


_LOOK_THERE: Final = (
    "look in this application for a transaction that is not ended, or for work that is done within"
    " one; leak_action: close ends such clients"
)
_CLOSED: Final = "its client is closed, as leak_action says; look in this application for why"


def _told(leak: Leak, now: float) -> dict[str, object]:
    """A leak as it began, for the log; its age is that of now."""
    holder = leak.holder
    statement = holder.statement
    return {
        "pool": holder.pool,
        "client": holder.who.address,
        "application": holder.who.application,
        "user": holder.who.user,
        "fingerprint": "" if statement is None else statement.fingerprint,
        "query": "" if statement is None else statement.text[:_LOGGED],
        "state": holder.state,
        "age": round(now - leak.since, 3),
        "pin": holder.pin,
        "backend_pid": holder.backend_pid,
    }


def _silent_since(relay: Relay, now: float) -> float:
    """Since when the client has wanted nothing, outside of a transaction."""
    server = relay.server
    if server is None:
        return now if relay.is_waiting else relay.idle_since
    is_silent = relay.replies.is_at_rest and server.tx_status == m.IDLE
    return server.status_since if is_silent else now


def _cancel(relay: Relay, server: ServerConnection) -> None:
    """Its query has run for too long."""
    relay.pool.observer.timed_out(TimeoutKind.QUERY)
    relay.replies.why_cancelled = CANCEL.message
    if server.copy_in and not server.mid_message:
        server.write(_COPY_IS_OVER)  # a server that waits for COPY data is deaf to cancels
    # What the client sends next must not be hit instead, should the query end meanwhile.
    relay.transport.pause_reading()
    relay.pool.cancel(server).add_done_callback(relay.read_again)


def _end(relay: Relay, over: Over, now: float) -> None:
    """Close the client for a limit. Its server connection is kept where that is sound."""
    if over.kind is not None and over is not QUERY:  # that was counted when it was to be cancelled
        relay.pool.observer.timed_out(over.kind)
    is_in_message = relay.replies.incoming > 0
    statement = None
    if relay.server is not None:
        statement = statement_of(relay.server)
        relay.leave(relay.server, over.reason, now)
    if is_in_message:
        relay.close()
    else:
        relay.fail(over.error, statement)
