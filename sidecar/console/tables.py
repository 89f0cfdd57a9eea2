"""What SHOW shows: for each word its columns, and its rows made from a ``View``.

Pure. Columns are those of PgBouncer 1.24, in its order, so that people and programs find what they
look for; behind them come names of older versions that programs still read. Tables that PgBouncer
does not have are in ``beyond`` and ``why``. Times are in microseconds where PgBouncer's are.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from sidecar import __version__
from sidecar.config import Config, redacted
from sidecar.config_changes import needs_restart
from sidecar.config_values import CONSOLE_DATABASE
from sidecar.console import beyond, why
from sidecar.console.facts import View
from sidecar.console.rows import Column, Row, columns
from sidecar.console.words import application_of, flat, micro, word
from sidecar.events import ClientSnapshot, ServerSnapshot
from sidecar.facts import PoolFacts, Totals

MODE: Final = "statement"
"""What PgBouncer calls the mode of its console."""


@dataclass(frozen=True, slots=True)
class Show:
    columns: tuple[Column, ...]
    rows: Callable[[View], Iterator[Row]]


# -- pools and databases -------------------------------------------------------------------------


def _pools(view: View) -> Iterator[Row]:
    clients = Counter(client.pool_key for client in view.control.clients())
    servers: dict[int, list[ServerSnapshot]] = {}
    for server in view.control.servers():
        servers.setdefault(server.pool_key, []).append(server)
    for key, name, pool in view.control.live_pools():
        mine = servers.get(key, [])
        states = Counter(server.state for server in mine)
        cancels = sum(server.cancels for server in mine)
        yield (
            *(name, pool.user, clients[key] - pool.pending, pool.pending),
            *(cancels, 0),
            *(states["active"], cancels, states["being_canceled"]),
            *(states["idle"], 0, states["tested"], states["new"]),
            *(int(pool.oldest_wait), micro(pool.oldest_wait % 1), pool.mode.value, None),
        )
    yield (
        *(CONSOLE_DATABASE, CONSOLE_DATABASE, len(view.guests)),
        *([0] * 12),
        *(MODE, None),
    )


def _databases(view: View) -> Iterator[Row]:
    clients = Counter(client.pool for client in view.control.clients())
    for facts in view.control.pools():
        pool, config = facts.snapshot, facts.config
        yield (
            *(pool.name, *_host_and_port(pool.server), pool.database, pool.user),
            *(pool.max_size, pool.min_idle, 0, int(config.max_lifetime), pool.mode.value, None),
            *(pool.max_size, pool.used + pool.idle + pool.connecting),
            *(config.max_clients, clients[pool.name]),
            *(int(facts.is_paused), int(facts.is_disabled), 0),
        )
    yield (
        *(CONSOLE_DATABASE, None, view.control.pg_address[1], CONSOLE_DATABASE, CONSOLE_DATABASE),
        *(0, 0, 0, 0, MODE, None, 0, 0, 0, len(view.guests), 0, 0, 0),
    )


def _host_and_port(server: str) -> tuple[str, int]:
    """Of ``host:port``, or of the path of a socket: its folder, as a dsn names it. Of several hosts
    the first one's port."""
    hosts, ports = [], []
    for each in server.split(","):
        head, _, port = each.rpartition("/.s.PGSQL." if each.startswith("/") else ":")
        hosts.append(head.strip("[]") or each)
        ports.append(int(port) if port.isdigit() else 0)
    return ",".join(hosts), ports[0]


def _users(view: View) -> Iterator[Row]:
    config = view.control.config
    clients = Counter(client.user for client in view.control.clients())
    clients += Counter(guest.user for guest in view.guests)
    servers = Counter(server.user for server in view.control.servers())
    names = {*config.users, *clients, *servers}
    for name in sorted(names):
        user = config.users.get(name)
        yield (
            *(name, "", "", None),
            *(0, servers[name]),
            *(0 if user is None else user.max_clients, clients[name]),
        )


# -- clients and servers -------------------------------------------------------------------------


def _clients(view: View) -> Iterator[Row]:
    pids = {server.id: server.pid for server in view.control.servers()}
    for client in view.control.clients():
        yield _client(view, client, pids)
    for guest in view.guests:
        yield _client(view, guest, pids)


def _client(view: View, client: ClientSnapshot, pids: dict[int, int]) -> Row:
    waited = view.now - client.waiting_since if client.waiting_since else 0.0
    if client.waiting_since:
        state = "waiting"
    else:
        state = "active" if client.server or client.pool == CONSOLE_DATABASE else "idle"
    return (
        *("C", client.user, client.database, "none", state),
        *(client.address, client.port or view.control.pg_address[1]),
        *(client.local_address, client.local_port or view.control.pg_address[1]),
        *(view.when(client.opened_at), view.when(client.asked_at or client.opened_at)),
        *(int(waited), micro(waited % 1), 0),
        *(f"C{client.id}", f"S{client.server}" if client.server else "", 0, client.tls),
        *(client.application, client.prepared_statements, client.id),
    )


def _servers(view: View) -> Iterator[Row]:
    linked = {client.server: client for client in view.control.clients() if client.server}
    for server in view.control.servers():
        yield _server(view, server, linked.get(server.id))


def _server(view: View, server: ServerSnapshot, client: ClientSnapshot | None) -> Row:
    return (
        *("S", server.user, server.pool, "none", server.state),
        *(server.address, server.port, server.local_address, server.local_port),
        *(view.when(server.opened_at), view.when(max(server.leased_at, server.query_started))),
        *(0, 0, int(server.is_replaced)),
        *(f"S{server.id}", f"C{client.id}" if client else "", server.pid, server.tls),
        *(application_of(client), server.prepared_statements, server.id),
    )


def _sockets(view: View) -> Iterator[Row]:
    unknown = [0] * 7  # PgBouncer's buffers, which there are not
    for row in _clients(view):
        yield (*row, *unknown)
    for row in _servers(view):
        yield (*row, *unknown)


# -- statistics ----------------------------------------------------------------------------------


def _counts(totals: Totals) -> tuple[int, ...]:
    """Of PgBouncer's statistics, in its order. Binds are not counted."""
    return (
        *(totals.assignments, totals.transactions, totals.queries),
        *(totals.received, totals.sent),
        *(micro(totals.transaction_time), micro(totals.query_time), micro(totals.wait_time)),
        *(totals.client_parses, totals.server_parses, 0),
    )


def _means(totals: Totals, seconds: float) -> tuple[int, ...]:
    """Counts a second; durations by how many there were."""

    def mean(time: float, count: int) -> int:
        return micro(time / count) if count else 0

    return (
        *(int(totals.assignments / seconds), int(totals.transactions / seconds)),
        *(int(totals.queries / seconds), int(totals.received / seconds)),
        int(totals.sent / seconds),
        mean(totals.transaction_time, totals.transactions),
        mean(totals.query_time, totals.queries),
        mean(totals.wait_time, totals.assignments),
        *(int(totals.client_parses / seconds), int(totals.server_parses / seconds), 0),
    )


def _stats(view: View) -> Iterator[Row]:
    for facts in view.control.pools():
        counts, means = _counts(facts.totals), _means(*view.averages(facts))
        yield (facts.snapshot.name, *counts, *means, facts.totals.queries)


def _stats_totals(view: View) -> Iterator[Row]:
    for facts in view.control.pools():
        yield (facts.snapshot.name, *_counts(facts.totals))


def _stats_averages(view: View) -> Iterator[Row]:
    for facts in view.control.pools():
        yield (facts.snapshot.name, *_means(*view.averages(facts)))


_KINDS: Final = (
    *("server_assignment_count", "xact_count", "query_count", "client_bytes", "server_bytes"),
    *("xact_time", "query_time", "wait_time"),
    *("ps_client_parse_count", "ps_server_parse_count", "ps_bind_count"),
)


def _totals(view: View) -> Iterator[Row]:
    pools = view.control.pools()
    counts = [_counts(facts.totals) for facts in pools]
    sums = [sum(each) for each in zip(*counts, strict=True)]
    recent, seconds = _together(view, pools)
    for name, value in zip(_KINDS, sums, strict=True):
        yield (f"total_{name}", value)
    for name, value in zip(_KINDS, _means(recent, seconds), strict=True):
        yield (f"avg_{name}", value)


def _together(view: View, pools: list[PoolFacts]) -> tuple[Totals, float]:
    total, longest = Totals(), 0.001
    nothing = Totals()
    for facts in pools:
        recent, seconds = view.averages(facts)
        total = total.since(nothing.since(recent))
        longest = max(longest, seconds)
    return total, longest


# -- the sidecar itself --------------------------------------------------------------------------


def _lists(view: View) -> Iterator[Row]:
    pools = len(view.control.live_pools())
    clients = sum(1 for _ in view.control.clients()) + len(view.guests)
    servers = sum(1 for _ in view.control.servers())
    counts = {
        "databases": len(view.control.pools()) + 1,
        "users": sum(1 for _ in _users(view)),
        "peers": 0,
        "pools": pools + 1,
        "peer_pools": 0,
        "free_clients": 0,
        "used_clients": clients,
        "login_clients": view.control.logins(),
        "free_servers": 0,
        "used_servers": servers,
        "dns_names": 0,
        "dns_zones": 0,
        "dns_queries": 0,
        "dns_pending": 0,
    }
    yield from counts.items()


def _memory(view: View) -> Iterator[Row]:
    """Objects in use; their bytes are known for the whole process only."""
    yield ("process", view.memory, 1, 0, view.memory)
    counts = {
        "user_cache": sum(1 for _ in _users(view)),
        "pool_cache": len(view.control.live_pools()),
        "server_cache": sum(1 for _ in view.control.servers()),
        "client_cache": sum(1 for _ in view.control.clients()) + len(view.guests),
    }
    for name, used in counts.items():
        yield (name, 0, used, 0, 0)


def _state(view: View) -> Iterator[Row]:
    paused = all(facts.is_paused for facts in view.control.pools())
    yield ("active", "no" if paused else "yes")
    yield ("paused", "yes" if paused else "no")
    yield ("suspended", "no")


def _config(view: View) -> Iterator[Row]:
    config = view.control.config
    values, defaults = dict(flat(redacted(config))), _defaults(config)
    names = {option: option for option in values} | _PGBOUNCER_NAMES
    for name, option in names.items():
        changeable = "no" if needs_restart(option) else "yes"
        yield (name, values.get(option, ""), defaults.get(option), changeable)


_PGBOUNCER_NAMES: Final = {
    "admin_users": "console.admin_users",
    "auth_type": "listen.auth",
    "client_tls_sslmode": "listen.tls_mode",
    "listen_addr": "listen.host",
    "listen_port": "listen.port",
    "max_client_conn": "listen.max_clients",
    "stats_users": "console.stats_users",
    "unix_socket_dir": "listen.unix_socket_dir",
}
"""Options that mean the same as PgBouncer's, for programs that look for those."""


def _defaults(config: Config) -> dict[str, str]:
    """The default of every option that has one."""
    found: dict[str, str] = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        entries = section.items() if isinstance(section, dict) else ()
        for key, entry in entries:
            found |= _defaults_of(f"{name}.{key}.", entry)
        if hasattr(type(section), "model_fields"):
            found |= _defaults_of(f"{name}.", section)
    found["drain_timeout"] = word(type(config).model_fields["drain_timeout"].default)
    return found


def _defaults_of(path: str, section: object) -> dict[str, str]:
    fields = getattr(type(section), "model_fields", {})
    return {
        path + name: word(field.default)
        for name, field in fields.items()
        if not field.is_required()
    }


def _version(view: View) -> Iterator[Row]:
    yield (f"pgsidecar {__version__}",)


def _nothing(view: View) -> Iterator[Row]:
    yield from ()


_SOCKET: Final = (
    "type user database replication state addr port:int4 local_addr local_port:int4 connect_time"
    " request_time wait:int4 wait_us:int4 close_needed:int4 ptr link remote_pid:int4 tls"
    " application_name prepared_statements:int4 id:int4"
)
_BUFFERS: Final = (
    " recv_pos:int4 pkt_pos:int4 pkt_remain:int4 send_pos:int4 send_remain:int4 pkt_avail:int4"
    " send_avail:int4"
)


def _numbers(names: str, prefix: str = "") -> str:
    return " ".join(f"{prefix}{name}:numeric" for name in names.split())


_COUNTED: Final = (
    "server_assignment_count xact_count query_count {0} {1} xact_time query_time wait_time"
)
_PARSES: Final = "client_parse_count server_parse_count bind_count"

TABLES: Final = {
    "POOLS": Show(
        columns(
            "database user cl_active:int4 cl_waiting:int4 cl_active_cancel_req:int4"
            " cl_waiting_cancel_req:int4 sv_active:int4 sv_active_cancel:int4 sv_being_canceled:int4"
            " sv_idle:int4 sv_used:int4 sv_tested:int4 sv_login:int4 maxwait:int4 maxwait_us:int4"
            " pool_mode load_balance_hosts"
        ),
        _pools,
    ),
    "DATABASES": Show(
        columns(
            "name host port:int4 database force_user pool_size:int4 min_pool_size:int4"
            " reserve_pool_size:int4 server_lifetime:int4 pool_mode load_balance_hosts"
            " max_connections:int4 current_connections:int4 max_client_connections:int4"
            " current_client_connections:int4 paused:int4 disabled:int4"
            " reserve_pool:int4"  # before 1.24; Debian's exporter reads it
        ),
        _databases,
    ),
    "USERS": Show(
        columns(
            "name pool_size reserve_pool_size pool_mode max_user_connections:int4"
            " current_connections:int4 max_user_client_connections:int4"
            " current_client_connections:int4"
        ),
        _users,
    ),
    "CLIENTS": Show(columns(_SOCKET), _clients),
    "SERVERS": Show(columns(_SOCKET), _servers),
    "SOCKETS": Show(columns(_SOCKET + _BUFFERS), _sockets),
    "ACTIVE_SOCKETS": Show(columns(_SOCKET + _BUFFERS), _sockets),
    "STATS": Show(
        columns(
            "database "
            + _numbers(_COUNTED.format("received", "sent") + " " + _PARSES, "total_")
            + " "
            + _numbers(_COUNTED.format("recv", "sent") + " " + _PARSES, "avg_")
            + " total_requests:numeric"  # before 1.8; Debian's exporter reads it
        ),
        _stats,
    ),
    "STATS_TOTALS": Show(
        columns(
            "database " + _numbers(_COUNTED.format("bytes_received", "bytes_sent") + " " + _PARSES)
        ),
        _stats_totals,
    ),
    "STATS_AVERAGES": Show(
        columns(
            "database "
            + _numbers(_COUNTED.format("bytes_received", "bytes_sent"))
            + " "
            + _numbers(_PARSES, "avg_")
        ),
        _stats_averages,
    ),
    "TOTALS": Show(columns("name value:numeric"), _totals),
    "LISTS": Show(columns("list items:int4"), _lists),
    "MEM": Show(columns("name size:int4 used:int4 free:int4 memtotal:int4"), _memory),
    "STATE": Show(columns("key value"), _state),
    "CONFIG": Show(columns("key value default changeable"), _config),
    "VERSION": Show(columns("version"), _version),
    "DNS_HOSTS": Show(columns("hostname ttl:int8 addrs"), _nothing),
    "DNS_ZONES": Show(columns("zonename serial:int8 count:int4"), _nothing),
    "WAITS": Show(beyond.WAITS, beyond.waits),
    "HOLDERS": Show(beyond.HOLDERS, beyond.holders),
    "PINS": Show(beyond.PINS, beyond.pins),
    "WHY": Show(why.WHY, why.why),
    "INCIDENTS": Show(why.INCIDENTS, why.incidents),
    "STATEMENTS": Show(why.STATEMENTS, why.statements),
    "SLOW": Show(why.SLOW, why.slow),
    "LEAKS": Show(why.LEAKS, why.leaks),
    "ERRORS": Show(why.ERRORS, why.errors),
    "BLAME": Show(why.BLAME, why.blame),
}
