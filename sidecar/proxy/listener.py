"""Accepts PostgreSQL clients over TCP and a Unix socket.

Owns the listening sockets, the limit on clients, and the keys by which a CancelRequest finds its
client. One task for each client in login (see ``session``).
"""

import asyncio
import hmac
import logging
import secrets
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

from sidecar.config import Config, PoolConfig, remarks
from sidecar.errors import ConfigError, PoolClosed, PoolSaturated, SidecarError
from sidecar.events import ClientOutcome, ClientSnapshot, Listener, Observer
from sidecar.pool.opening import Spawn
from sidecar.pool.server import clock
from sidecar.protocol.startup import CancelRequest
from sidecar.proxy import telling
from sidecar.proxy.authenticate import Authenticator
from sidecar.proxy.certificates import Certificates, Identity
from sidecar.proxy.directory import Directory
from sidecar.proxy.guests import Console, Guest, NoConsole
from sidecar.proxy.limits import Limits, limits_of
from sidecar.proxy.login import Login
from sidecar.proxy.places import Places
from sidecar.proxy.relay import Relay
from sidecar.proxy.session import Session
from sidecar.proxy.sweeper import Sweeper
from sidecar.proxy.tables import PoolTables

log = logging.getLogger("pgsidecar.proxy")

_BACKLOG: Final = 1024

_LOGINS_BEYOND: Final = 100
"""Sockets beyond ``max_clients`` that may be in login, to be told why they are refused."""

_GUESTS_BEYOND: Final = 10
"""Clients of the console beyond ``max_clients``: a full pool is when one wants to look."""


class PgListener:
    def __init__(
        self,
        config: Config,
        directory: Directory,
        observer: Observer,
        spawn: Spawn,
        console: Console | None = None,
    ) -> None:
        self.console: Final = console or NoConsole()
        self._config = config
        self._directory: Final = directory
        self._observer: Final = observer
        self._spawn: Final = spawn
        self._servers: list[asyncio.Server] = []
        self._socket_path: Path | None = None
        self._logins: set[Session] = set()
        self._places: Final = Places(config)
        self._relays: set[Relay | Guest] = set()
        self._keys: dict[int, list[Relay | Guest]] = {}
        """By the pid of their cancel keys. Those who keep a server connection have its backend's, one
        after the other, and we may have chosen the same for another client."""
        self._ids = count(1)
        self._sweeper: Final = Sweeper(clock())
        self._next_pid = secrets.randbelow(1 << 30) + 1
        self._certificates = _certificates_of(config)
        self.is_draining = False
        self.disabled: frozenset[str] = frozenset()
        """Pools that take no new clients, by name."""
        self.authenticator = Authenticator(config, spawn)
        self.traffic: Final = observer.traffic
        self.login_timeout = config.listen.login_timeout
        self.address: tuple[str, int] = (config.listen.host, config.listen.port)

    def reconfigure(self, config: Config) -> None:
        """For logins from now on, and for the limits of all clients; other things that are under way
        go on by the old one."""
        old, self._config = self._config, config
        self._places.config = config
        self.authenticator.close()
        self.authenticator = Authenticator(config, self._spawn)
        self.login_timeout = config.listen.login_timeout
        if old.listen != config.listen:
            self._certificates = _certificates_of(config)
        for relay in self._relays:
            if isinstance(relay, Relay) and relay.tables.pool.name in config.pools:
                pool = config.pools[relay.tables.pool.name]
                relay.limits = self.limits(pool, relay.client.user)
                self._sweeper.came(relay)
        _warn(config)

    # -- sockets -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises ConfigError if an address cannot be used."""
        listen = self._config.listen
        if self._certificates is not None:
            await self._certificates.load()
        _warn(self._config)
        loop = asyncio.get_running_loop()
        if listen.host:
            try:
                server = await loop.create_server(
                    self._accept, listen.host, listen.port, backlog=_BACKLOG
                )
            except OSError as exc:
                raise ConfigError(
                    f"listen: cannot listen on {listen.host}:{listen.port}: {exc.strerror or exc}"
                ) from exc
            self._servers.append(server)
            self.address = server.sockets[0].getsockname()[:2]
        if listen.unix_socket_dir is not None:
            await self._listen_on_unix_socket(Path(listen.unix_socket_dir))

    async def _listen_on_unix_socket(self, folder: Path) -> None:
        path = folder / f".s.PGSQL.{self.address[1]}"
        try:
            _remove_stale_socket(path)
            server = await asyncio.get_running_loop().create_unix_server(
                self._accept, str(path), backlog=_BACKLOG
            )
            path.chmod(0o777)  # as PostgreSQL's: who may enter is a matter of authentication
        except OSError as exc:
            raise ConfigError(
                f"listen.unix_socket_dir: cannot listen on {path}: {exc.strerror or exc}"
            ) from exc
        self._servers.append(server)
        self._socket_path = path

    def _accept(self) -> Any:  # a protocol by shape, which typeshed cannot see
        session = Session(self)
        self._logins.add(session)
        self._spawn(self._welcome(session))
        return session

    async def _welcome(self, session: Session) -> None:
        if self.clients >= self._config.listen.max_clients + _LOGINS_BEYOND:
            session.abort()
            self.login_ended(session, ClientOutcome.REJECTED)
            return
        await session.run()

    def stop_accepting(self) -> None:
        """Close the listening sockets, and let in nobody who is in login now."""
        if self.is_draining:
            return
        self.is_draining = True
        for server in self._servers:
            server.close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)

    def send_away(self) -> None:
        """Let every client go as soon as it has no lease."""
        for relay in list(self._relays):
            relay.shut_down()

    def end_all(self) -> None:
        """Close the clients that are still there."""
        for relay in list(self._relays):
            relay.end()
        for session in list(self._logins):
            session.abort()
        self.authenticator.close()

    # -- clients -------------------------------------------------------------------------------

    @property
    def clients(self) -> int:
        """Client connections now, those in login included."""
        return len(self._relays) + len(self._logins)

    @property
    def logins(self) -> int:
        return len(self._logins)

    def relays(self) -> list[Relay]:
        """The clients that are logged in, but for those of the console."""
        found = [relay for relay in self._relays if isinstance(relay, Relay)]
        return sorted(found, key=lambda relay: relay.id)

    def snapshots(self) -> Iterator[ClientSnapshot]:
        return telling.clients(self.relays())

    def pool_for(self, database: str) -> PoolConfig:
        return self._config.pool_for(database)

    def enter(self, pool: PoolConfig, login: Login, client: object) -> PoolTables:
        return self._directory.enter(pool, login, client)

    def leave(self, tables: PoolTables, client: object) -> None:
        self._directory.leave(tables, client)

    def admit_login(self, session: Session) -> None:
        self._places.admit_login(session)

    def admit(self, user: str, pool: PoolConfig) -> None:
        limit = self._config.listen.max_clients
        if self.is_draining:
            raise PoolClosed("the connection pool is shutting down")
        if len(self._relays) >= limit:
            raise PoolSaturated(
                "sorry, too many clients already",
                detail=f"{limit} clients are connected to the pool.",
                hint="The limit is listen.max_clients.",
            )
        self._places.admit(user, pool.name)

    def check_enabled(self, pool: str) -> None:
        if pool in self.disabled:
            raise SidecarError(
                f'database "{pool}" is not currently accepting connections',
                hint="An administrator has disabled it; ENABLE at the console lets clients in again.",
                sqlstate="55000",
            )

    def admit_guest(self) -> None:
        limit = self._config.listen.max_clients + _GUESTS_BEYOND
        if len(self._relays) >= limit:
            raise PoolSaturated(
                "sorry, too many clients already",
                detail=f"{limit} clients are connected to the pool and to its console.",
            )

    def register(self, relay: Relay | Guest, pid: int | None = None) -> None:
        """Let cancel requests find the relay. ``pid`` is its backend's, where it has one of its own."""
        if pid is None:
            while self._next_pid in self._keys:
                self._next_pid = self._next_pid % 0x7FFFFFFF + 1
            pid = self._next_pid
            self._next_pid = pid % 0x7FFFFFFF + 1
        relay.pid = pid
        relay.id = next(self._ids)
        relay.opened_at = clock()
        self._relays.add(relay)
        if isinstance(relay, Relay):
            relay.tables.clients.add(relay)
            self._places.enter(relay, relay.client.user, relay.tables.pool.name)
            self._sweeper.came(relay)
            relay.pool.observer.client_came(relay.who())
        self._keys.setdefault(pid, []).append(relay)

    def gone(self, relay: Relay | Guest) -> None:
        self._relays.discard(relay)
        if isinstance(relay, Relay):
            self._directory.leave(relay.tables, relay)
            self._places.leave(relay)
            self._sweeper.gone(relay)
        sharing = self._keys.get(relay.pid)
        if sharing is not None and relay in sharing:
            sharing.remove(relay)
            if not sharing:
                del self._keys[relay.pid]

    def closing(self, relay: Relay) -> None:
        self._sweeper.closing(relay, clock())

    def tick(self, now: float) -> None:
        """Sweep every limit of the clients; called every 100 ms."""
        self._sweeper.tick(self._directory, now)

    def limits(self, pool: PoolConfig, user: str) -> Limits:
        return limits_of(pool, self._config.users.get(user))

    def cancel(self, request: CancelRequest) -> asyncio.Future[None] | None:
        """Takes as long for every wrong secret, so that none can be found by trying."""
        meant = [
            relay
            for relay in self._keys.get(request.pid, ())
            if hmac.compare_digest(relay.secret, request.secret)
        ]
        return meant[0].cancel() if meant else None

    def login_ended(self, session: Session, outcome: ClientOutcome | None) -> None:
        self._logins.discard(session)
        self._places.login_ended(session)
        if outcome is not None:
            self._observer.client_ended(Listener.PG, outcome)

    def login_timed_out(self, pool: str | None) -> None:
        self._observer.login_timed_out(pool)

    # -- TLS -----------------------------------------------------------------------------------

    @property
    def requires_tls(self) -> bool:
        return self._config.listen.tls_mode == "require"

    async def identity(self) -> Identity | None:
        return None if self._certificates is None else await self._certificates.identity()

    async def reload_certificates(self) -> None:
        """Read the files of TLS now. Raises ConfigError, and then goes on with what it had."""
        if self._certificates is not None:
            await self._certificates.load()


def _certificates_of(config: Config) -> Certificates | None:
    if config.listen.tls_cert_file is None or config.listen.tls_mode == "disable":
        return None
    return Certificates(config.listen)


def _warn(config: Config) -> None:
    for remark in remarks(config):
        log.warning("rule in listen.hba", extra={"remark": remark})


def _remove_stale_socket(path: Path) -> None:
    """What a killed process left behind is removed, what somebody listens on is not."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise OSError("another process listens there")
