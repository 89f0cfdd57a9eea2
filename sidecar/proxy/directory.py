"""Which pools there are: those of the configuration, and those that templates make on demand.

Owns every pool with its tables, and who uses them. A template has a pool for each database and user
that somebody is logged in with, or connections are left of, and another one for those who have no secret
for the server (``trust``, ``cert``): they are let in by the server, or not, on their own account. All
of them share one budget of connections. A pool is made after the client has proved who it is, and is gone as soon as it has
neither clients nor connections: so there are never more than clients and connections together.

Runs no task: the service calls ``tick`` every 100 ms.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from sidecar.config import Config, PoolConfig, ServerTarget
from sidecar.errors import SidecarError
from sidecar.events import Observer, PoolGauges, PoolObserver, PoolSnapshot, Traffic
from sidecar.pool import health, report, steering
from sidecar.pool.budget import Budget
from sidecar.pool.diagnosis import Diagnosis
from sidecar.pool.opening import Spawn
from sidecar.pool.pool import Pool
from sidecar.pool.report import in_one
from sidecar.pool.server import ServerConnection, clock
from sidecar.proxy.login import Login
from sidecar.proxy.tables import PoolTables
from sidecar.proxy.texts import Texts

log = logging.getLogger("pgsidecar.proxy")


class Directory:
    def __init__(self, config: Config, observer: Observer, spawn: Spawn) -> None:
        self._observer: Final = observer
        self._spawn: Final = spawn
        self._fixed: Final[dict[str, PoolTables]] = {}
        self._templates: Final[dict[str, _Template]] = {}
        self.paused: frozenset[str] = frozenset()
        """Entries of the configuration that are paused, by name."""
        self._gone: list[PoolTables] = []  # pools that a reload took away, while they have clients
        self._gone_templates: list[_Template] = []  # so
        self._config = config
        self._diagnoses: Final[dict[str, Diagnosis]] = {}
        for each in config.pools.values():
            self._add(each)

    def _add(self, config: PoolConfig) -> None:
        name = config.name
        told = self._observer.pool(name), self._observer.pool_traffic(name)
        self._diagnoses[name] = Diagnosis(told[0], self._spawn, lambda: self)
        if config.is_template:
            self._templates[name] = _Template(config, *told, self._spawn)
        else:
            pool = Pool(config, *told, self._spawn)
            pool.opener.is_paused = name in self.paused
            self._fixed[name] = PoolTables(pool, Texts(pool.observer))

    def __iter__(self) -> Iterator[Pool]:
        """All pools there are now; several of a template have its name."""
        for name in self._config.pools:
            if name in self._fixed:
                yield self._fixed[name].pool
            else:
                yield from (tables.pool for tables in self._templates[name].pools.values())
        yield from (tables.pool for tables in self._gone)
        for template in self._gone_templates:
            yield from (tables.pool for tables in template.pools.values())

    # -- reload --------------------------------------------------------------------------------

    def reconfigure(self, config: Config, now: float) -> list[Pool]:
        """Take over a new configuration. Returns the pools that are gone: they close, and their
        clients are to be sent away. A pool with another mode is another pool, and so is a template
        with any other option."""
        old, self._config = self._config, config
        gone: list[Pool] = []
        for name, before in old.pools.items():
            after = config.pools.get(name)
            if after is None or _is_another(before, after):
                gone += self._remove(name)
        for name, after in config.pools.items():
            if name in self._fixed:
                if after != old.pools[name]:
                    steering.reconfigure(self._fixed[name].pool, after, now)
            elif name not in self._templates:
                self._add(after)
                if name in self._fixed:
                    self._fixed[name].pool.start(now)
        for pool in gone:
            pool.close(now)
        self.paused = self.paused.intersection(config.pools)
        return gone

    def _remove(self, name: str) -> list[Pool]:
        self._diagnoses.pop(name).close()
        if name in self._templates:
            template = self._templates.pop(name)
            self._gone_templates.append(template)
            return [tables.pool for tables in template.pools.values()]
        tables = self._fixed.pop(name)
        self._gone.append(tables)
        return [tables.pool]

    @property
    def fixed(self) -> dict[str, Pool]:
        """The pools that are no template's, by name."""
        return {name: tables.pool for name, tables in self._fixed.items()}

    # -- clients -------------------------------------------------------------------------------

    def enter(self, config: PoolConfig, login: Login, client: object) -> PoolTables:
        """The pool for this login; it stays at least until ``client`` leaves it.

        SidecarError (3D000) if a reload has removed the entry since the login began.
        """
        if config.name not in self._config.pools:
            raise SidecarError(f'database "{login.database}" does not exist', sqlstate="3D000")
        if config.is_template:
            tables = self._templates[config.name].enter(login, client)
            tables.pool.opener.is_paused = config.name in self.paused
            return tables
        tables = self._fixed[config.name]
        tables.clients.add(client)
        return tables

    def leave(self, tables: PoolTables, client: object) -> None:
        tables.clients.discard(client)
        config = tables.pool.config
        if config.is_template and not tables.clients:
            for template in (*self._templates.values(), *self._gone_templates):
                if tables in template.pools.values():
                    template.left(tables)
                    return

    # -- life ----------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Begin to open the warm connections; a template has none."""
        for tables in self._fixed.values():
            tables.pool.start(now)

    def tick(self, now: float) -> None:
        """Sweep every deadline of the pools; called every 100 ms."""
        for tables in self._fixed.values():
            tables.pool.tick(now)
            tables.texts.tick()
        for template in (*self._templates.values(), *self._gone_templates):
            template.tick(now)
        for tables in self._gone:
            tables.pool.tick(now)
            tables.texts.tick()
        self._gone = [each for each in self._gone if each.pool.state.size or each.clients]
        self._gone_templates = [each for each in self._gone_templates if each.pools]
        for name, diagnosis in self._diagnoses.items():
            diagnosis.tick(self._members(name), now)

    def close(self) -> None:
        """Every pool is being closed: the server is asked nothing more about them."""
        for diagnosis in self._diagnoses.values():
            diagnosis.close()

    def _members(self, name: str) -> Iterable[Pool]:
        """The pools of one entry that have connections, or clients that wait."""
        if name in self._fixed:
            return (self._fixed[name].pool,)
        return self._templates[name].members()

    def snapshots(self, now: float) -> list[PoolSnapshot]:
        """One for each entry of the configuration, all pools of a template in one."""
        return [
            self._fixed[name].pool.snapshot(now)
            if name in self._fixed
            else self._templates[name].snapshot(now)
            for name in self._config.pools
        ]

    def gauges(self, now: float) -> list[PoolGauges]:
        """As ``snapshots``, what is looked at every 100 ms."""
        found = []
        for name, config in self._config.pools.items():
            if name in self._fixed:
                pool = self._fixed[name].pool
                pools, is_up, why_down = [pool], pool.opener.is_up, pool.opener.why_down()
            else:
                pools = list(self._members(name))
                down = next(filter(_is_down, pools), None)
                is_up, why_down = down is None, "" if down is None else down.opener.why_down()
            found.append(
                report.gauges(
                    name,
                    [pool.state for pool in pools],
                    config.max_size,
                    now,
                    is_up=is_up,
                    is_paused=name in self.paused,
                    why_down=why_down,
                    logins=[since for pool in pools for since in pool.opener.logins()],
                )
            )
        return found


class _Template:
    """The pools made from one entry."""

    def __init__(
        self, config: PoolConfig, observer: PoolObserver, traffic: Traffic, spawn: Spawn
    ) -> None:
        self._config: Final = config
        self._target: Final = config.target
        self._observer: Final = observer
        self._traffic: Final = traffic
        self._spawn: Final = spawn
        self._budget: Final[Budget[ServerConnection, Pool]] = Budget(config.max_size)
        self.pools: Final[dict[tuple[str, str, bool], PoolTables]] = {}
        """By database, user, and whether there is a secret to log in to the server with."""
        self._unused: Final[dict[PoolTables, None]] = {}  # without clients
        self._texts: Final = Texts(observer)

    def enter(self, login: Login, client: object) -> PoolTables:
        target = _target_of(self._target, login)
        key = _key_of(target)
        tables = self.pools.get(key)
        if tables is None:
            pool = Pool(
                self._config,
                self._observer,
                self._traffic,
                self._spawn,
                target=target,
                budget=self._budget,
                share=self._share,
            )
            tables = self.pools[key] = PoolTables(pool, self._texts)
            log.debug("pool made", extra=_names(pool))
        else:
            tables.pool.target = target  # the password may have been changed
        tables.clients.add(client)
        self._unused.pop(tables, None)
        tables.pool.state.min_idle = self._config.min_idle
        return tables

    def left(self, tables: PoolTables) -> None:
        """Nobody uses this pool any more."""
        tables.pool.state.min_idle = 0
        self._unused[tables] = None
        self._drop_if_empty(tables)

    def _drop_if_empty(self, tables: PoolTables) -> None:
        pool = tables.pool
        if pool.state.size:
            return
        del self._unused[tables]
        del self.pools[_key_of(pool.target)]
        self._budget.forget(pool)
        log.debug("pool dropped", extra=_names(pool))

    def tick(self, now: float) -> None:
        self._texts.tick()
        for pool in self._budget.members():  # the others have nothing that could be due
            pool.tick(now)
        for tables in list(self._unused):
            self._drop_if_empty(tables)
        self._share(now)

    def _share(self, now: float) -> None:
        """Do what the budget decides, in all pools."""
        plan = self._budget.share(now)
        for pool in plan.opening:
            pool.opener.open_one()
        for pool, server in plan.closing:
            pool.give_up(server, now)
        if plan.again is not None:
            delay = plan.again - now
            asyncio.get_running_loop().call_later(delay, lambda: self._share(clock()))

    def members(self) -> Iterable[Pool]:
        """Those with connections, or clients that wait."""
        return self._budget.members()

    def snapshot(self, now: float) -> PoolSnapshot:
        """Of all pools together. The server counts as up unless one of them cannot reach it: as
        long as nobody asks for a connection, nothing is known."""
        pools = list(self._budget.members())
        parts = [pool.snapshot(now) for pool in pools]
        return in_one(self._config, parts, is_up=not any(map(_is_down, pools)))


def _is_another(before: PoolConfig, after: PoolConfig) -> bool:
    if before.mode is not after.mode:
        return True
    return before.is_template and before != after


def _target_of(template: ServerTarget, login: Login) -> ServerTarget:
    """As whom and to which database to connect for this login: what the dsn leaves open is the
    client's. A password is better than keys: those are only good for a server with the same salt."""
    database = template.database or login.database
    if template.user:
        return replace(template, database=database)
    keys = login.keys if login.password is None else None
    return replace(
        template,
        database=database,
        user=login.user,
        password=login.password,
        scram_keys=keys,
    )


def _key_of(target: ServerTarget) -> tuple[str, str, bool]:
    has_secret = target.password is not None or target.scram_keys is not None
    return target.database, target.user, has_secret


def _is_down(pool: Pool) -> bool:
    failure = pool.opener.last_failure
    return not pool.state.established and failure is not None and not health.is_refusal(failure)


def _names(pool: Pool) -> dict[str, str]:
    return {"pool": pool.name, "database": pool.target.database, "user": pool.target.user}
