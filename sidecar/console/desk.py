"""Who may use the console, what each command does, and who is there.

The ``Console`` of the proxy's listener. Reads and acts through ``Control``; runs no task of its
own but those of its sessions.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from sidecar.config_values import CONSOLE_DATABASE, PGBOUNCER
from sidecar.console import commands
from sidecar.console.commands import ANYONE, Command, Verb
from sidecar.console.facts import Averages, Control, View
from sidecar.console.rows import Column, columns
from sidecar.console.session import Answer, ConsoleSession, Spawn
from sidecar.console.tables import TABLES
from sidecar.errors import AuthenticationFailed, ConfigError, SidecarError
from sidecar.events import ClientSnapshot, Stop, Traffic

_STOPS: Final = {
    "": Stop.NOW,
    "WAIT_FOR_SERVERS": Stop.RELEASED,
    "WAIT_FOR_CLIENTS": Stop.CLIENTS_GONE,
}

_POLL: Final = 0.02  # s


class Registry(Protocol):
    """Who keeps the sessions: the proxy's listener."""

    def gone(self, guest: ConsoleSession) -> None: ...


class Desk:
    def __init__(
        self, control: Control, spawn: Spawn, traffic: Traffic, clock: Callable[[], float]
    ) -> None:
        self._control: Final = control
        self._spawn: Final = spawn
        self._traffic: Final = traffic
        self._clock: Final = clock
        self._averages: Final = Averages(clock())
        self._sessions: dict[ConsoleSession, Registry] = {}

    def tick(self, now: float) -> None:
        self._averages.tick(now, self._control.pools)

    # -- who comes -----------------------------------------------------------------------------

    def is_meant(self, database: str) -> bool:
        if database == PGBOUNCER:
            try:
                return self._control.config.pool_for(database).is_template
            except SidecarError:
                return True
        return database == CONSOLE_DATABASE

    def receive(
        self, user: str, database: str, application: str, registry: Registry
    ) -> ConsoleSession:
        if not self._may_show(user):
            raise AuthenticationFailed(
                f'user "{user}" may not use the console',
                hint="Those who may are in console.admin_users and console.stats_users.",
                sqlstate="28000",
            )
        session = ConsoleSession(
            self,
            self._spawn,
            self._traffic,
            user=user,
            database=database,
            application=application,
        )
        self._sessions[session] = registry
        return session

    def _is_admin(self, user: str) -> bool:
        return user in self._control.config.console.admin_users

    def _may_show(self, user: str) -> bool:
        return self._is_admin(user) or user in self._control.config.console.stats_users

    def gone(self, session: ConsoleSession) -> None:
        registry = self._sessions.pop(session, None)
        if registry is not None:
            registry.gone(session)

    # -- what they want ------------------------------------------------------------------------

    def columns(self, command: Command) -> Sequence[Column]:
        if command.verb is not Verb.SHOW:
            return ()
        if command.argument in TABLES:
            return TABLES[command.argument].columns
        if commands.setting(command.argument) is not None:
            return columns(command.argument.lower())
        return ()

    async def answer(self, session: ConsoleSession, command: Command) -> Answer:
        # asked each time: a reload may have taken the right away
        allowed = self._may_show if command.verb in ANYONE else self._is_admin
        if not allowed(session.user):
            raise SidecarError(
                f'user "{session.user}" may not {command.verb}',
                hint="Those who may are in console.admin_users"
                f"{' and console.stats_users' if command.verb in ANYONE else ''}.",
                sqlstate="42501",
            )
        match command.verb:
            case Verb.SHOW:
                return self._show(command)
            case Verb.SET:
                commands.refuse_set(command.argument)
                return Answer("SET", notices=[("SET ignored", "")])
            case Verb.BEGIN | Verb.COMMIT | Verb.ROLLBACK:
                return Answer(command.verb)  # for drivers that cannot do without
            case Verb.SUSPEND:
                raise commands.refuse(command.verb)
            case Verb.KILL_CLIENT:
                self._kill_client(int(command.argument))
            case Verb.SHUTDOWN:
                self._control.shut_down(_STOPS[command.argument])
            case Verb.RELOAD:
                return await self._reload()
            case _:
                await self._steer(command.verb, self._control.meant(command.argument))
        return Answer(command.verb)

    async def _steer(self, verb: Verb, pools: Sequence[str]) -> None:
        """The commands that are about pools."""
        control = self._control
        match verb:
            case Verb.PAUSE:
                await self._pause(pools)
            case Verb.RESUME:
                if not control.resume(pools):
                    raise SidecarError(f"{_listed(pools)} not paused", sqlstate="55000")
            case Verb.RECONNECT:
                control.reconnect(pools)
            case Verb.WAIT_CLOSE:
                await _until(lambda: not control.has_replaced(pools))
            case Verb.KILL:
                control.kill(pools)
            case Verb.DISABLE | Verb.ENABLE:
                control.set_enabled(pools, verb is Verb.ENABLE)

    async def _pause(self, pools: Sequence[str]) -> None:
        """Returns when no connection is left. Who interrupts it has paused nothing."""
        fresh = self._control.pause(pools)
        try:
            await _until(lambda: not self._control.has_connections(pools))
        except BaseException:
            self._control.resume(fresh)
            raise

    async def _reload(self) -> Answer:
        try:
            changes = await self._control.reload()
        except ConfigError as exc:
            raise SidecarError(
                "the configuration cannot be used, nothing was changed",
                detail=exc.message,
                sqlstate=exc.sqlstate,
            ) from exc
        notices = [
            (f"{option} changes with a restart only", "") for option in changes.needs_restart
        ]
        if changes.applied:
            notices.append((f"changed: {', '.join(changes.applied)}", ""))
        return Answer(Verb.RELOAD, notices=notices)

    def _kill_client(self, id: int) -> None:
        if self._control.kill_client(id):
            return
        for session in self._sessions:
            if session.id == id:
                session.end("terminating connection due to administrator command")
                return
        raise SidecarError(
            f"there is no client {id}", hint="SHOW CLIENTS has their ids.", sqlstate="42704"
        )

    def _show(self, command: Command) -> Answer:
        what = command.argument
        if what == "HELP":
            return Answer("SHOW", notices=[("Console usage", commands.HELP)])
        if what in TABLES:
            table = TABLES[what]
            return Answer("SHOW", table.columns, table.rows(self._view()))
        value = commands.setting(what)
        if value is None:
            raise commands.refuse(what)
        return Answer("SHOW", self.columns(command), iter([(value,)]))

    def _view(self) -> View:
        now = self._clock()
        offset = time.time() - now

        def when(instant: float) -> str:
            return _in_words(instant + offset) if instant > 0.0 else ""

        return View(
            self._control,
            now,
            when,
            _in_words,
            [_snapshot(session, now) for session in self._sessions if session.id],
            lambda facts: self._averages.of(facts, now),
            _memory(),
        )


def _in_words(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


async def _until(condition: Callable[[], bool]) -> None:
    """As long as it takes: who waits may interrupt it."""
    while not condition():  # noqa: ASYNC110  rare; an event would need a hook in the hot path
        await asyncio.sleep(_POLL)


def _listed(pools: Sequence[str]) -> str:
    return f"pool {pools[0]} is" if len(pools) == 1 else f"pools {', '.join(pools)} are"


def _snapshot(session: ConsoleSession, now: float) -> ClientSnapshot:
    transport = session.transport
    address, port = _address(transport.get_extra_info("peername"))
    local_address, local_port = _address(transport.get_extra_info("sockname"))
    tls = transport.get_extra_info("ssl_object")
    return ClientSnapshot(
        id=session.id,
        pool=CONSOLE_DATABASE,
        pool_key=0,
        user=session.user,
        database=session.database,
        application=session.application,
        address=address,
        port=port,
        local_address=local_address,
        local_port=local_port,
        tls="" if tls is None else str(tls.version()),
        opened_at=session.opened_at,
        asked_at=now,
        waiting_since=0.0,
        deadline=0.0,
        server=0,
        prepared_statements=0,
    )


def _address(name: object) -> tuple[str, int]:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else ("unix", 0)


def _memory() -> int:
    """Resident bytes; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
