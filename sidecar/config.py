"""The configuration: one validated and immutable ``Config``, every option with its default.

Owns which options there are, their units, limits and what they mean together. The types of their
values are in ``config_values``, connection strings in ``dsn``; ``config_file`` reads the file. Does
not resolve names, read certificates or try servers; ``pgsidecar check`` does.

No error message and no repr contains a password or a part of a connection string.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sidecar.config_values import (
    CONSOLE_DATABASE,
    Conflict,
    duration,
    duration_or_none,
    file_path,
    flag,
    is_loopback,
    name_matches,
    pool_name,
    scram_verifier,
    socket_dir,
    some_host,
    user_name,
    user_names,
    whole,
)
from sidecar.dsn import parse_dsn
from sidecar.errors import SidecarError
from sidecar.events import PinPolicy, PoolMode, ResetPolicy
from sidecar.hba import Rule, odd_rules, parse_rules
from sidecar.target import ServerTarget as ServerTarget  # the type of PoolConfig.target


def _is_given(dsn: SecretStr) -> bool:
    return bool(dsn.get_secret_value().strip())


def _usable_dsn(dsn: SecretStr) -> SecretStr:
    if _is_given(dsn):
        parse_dsn(dsn.get_secret_value())
    return dsn


def _usable_rules(text: str) -> str:
    parse_rules(text)
    return text


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


class Section(BaseModel):
    """A group of options."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # pydantic's own messages would quote secrets
        use_attribute_docstrings=True,  # they are the fields' descriptions
    )


class ListenConfig(Section):
    """Where PostgreSQL clients connect."""

    host: str = "127.0.0.1"
    """Address of the TCP listener; empty: none."""
    port: Annotated[int, whole(0, 65535)] = 6432
    """TCP port, and the number in the Unix socket's name; 0: any free port."""
    unix_socket_dir: Annotated[str | None, BeforeValidator(socket_dir)] = None
    """Directory in which the socket ``.s.PGSQL.<port>`` is created; empty: none."""
    auth: Literal["scram-sha-256", "trust"] = "scram-sha-256"
    """How clients prove who they are; ``trust``: not at all, on loopback and Unix sockets only."""
    hba: Annotated[str, AfterValidator(_usable_rules)] = ""
    """Rules in the syntax of pg_hba.conf, first match counts; empty: ``auth`` for everyone."""
    auth_failure_delay: Annotated[float, duration("0", "1m")] = 1.0
    """Seconds before a failed login is answered, so that passwords cannot be tried fast."""
    tls_mode: Literal["disable", "allow", "require"] = "allow"
    """Whether clients may, or have to, encrypt; without ``tls_cert_file`` they cannot."""
    tls_cert_file: Annotated[str | None, BeforeValidator(file_path)] = None
    """PEM file with the certificate shown to clients, and its chain; empty: no TLS."""
    tls_key_file: Annotated[str | None, BeforeValidator(file_path)] = None
    """PEM file with the certificate's key; empty: it is in ``tls_cert_file``."""
    tls_ca_file: Annotated[str | None, BeforeValidator(file_path)] = None
    """PEM file with the CAs that clients' certificates are checked by; empty: none is asked for."""
    tls_min_version: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    """The oldest version of TLS that clients may use."""
    max_clients: Annotated[int, whole(1, 100_000)] = 5000
    """Most client connections at a time; further ones are refused."""
    max_logins: Annotated[int, whole(0, 100_000)] = 0
    """Most clients in login at a time; further ones are refused; 0: no limit of its own."""
    login_timeout: Annotated[float, duration("100ms", "10m")] = 10.0
    """Seconds from a client's connecting to the end of its login; then it is closed."""

    @field_validator("auth")
    @classmethod
    def _trust_stays_local(cls, auth: str, info: ValidationInfo) -> str:
        host = info.data.get("host", "")
        if auth == "trust" and host and not is_loopback(host):
            raise Conflict(
                f"would let everyone who can reach host {host!r} into the database without a"
                " password; allowed: scram-sha-256, or a host on loopback (127.0.0.1, ::1,"
                " localhost)",
                other="host",
            )
        return auth

    @model_validator(mode="after")
    def _has_what_tls_needs(self) -> "ListenConfig":
        if self.tls_mode == "require" and self.tls_cert_file is None:
            raise ValueError("with tls_mode require and without tls_cert_file; allowed: with both")
        return self

    @model_validator(mode="after")
    def _listens_somewhere(self) -> "ListenConfig":
        if not self.host and self.unix_socket_dir is None:
            raise ValueError("without host and without unix_socket_dir; allowed: one or both")
        return self

    @model_validator(mode="after")
    def _can_check_certificates(self) -> "ListenConfig":
        if self.tls_ca_file is None:
            for rule in self.rules:
                if rule.checks_certificate:
                    raise ValueError(
                        f"with a rule for certificates (hba, line {rule.line}) and without"
                        " tls_ca_file; allowed: with the CAs that they are checked by"
                    )
        return self

    @property
    def rules(self) -> tuple[Rule, ...]:
        """``hba``, read."""
        return parse_rules(self.hba)


class HttpConfig(Section):
    """The HTTP service: metrics and health."""

    host: Annotated[str, AfterValidator(some_host)] = "127.0.0.1"
    """Address it listens on."""
    port: Annotated[int, whole(0, 65535)] = 9632
    """TCP port; 0: any free port."""
    max_connections: Annotated[int, whole(1, 10_000)] = 100
    """Most HTTP connections at a time; further ones are refused."""
    access_log: Annotated[bool, BeforeValidator(flag)] = False
    """Whether each HTTP request is logged."""
    token: Annotated[SecretStr | None, BeforeValidator(_none_if_empty)] = None
    """What ``/api`` asks for as a bearer token; empty: clients on loopback only, without one."""


class UserConfig(Section):
    """A user who may log in. The user of a pool's connection string may besides."""

    password: Annotated[SecretStr | None, BeforeValidator(_none_if_empty)] = None
    """The password clients log in with; empty: see ``password_file`` and ``verifier``."""
    password_file: Annotated[str | None, BeforeValidator(file_path)] = None
    """File with the password in its first line; read anew for each login."""
    verifier: Annotated[
        Annotated[SecretStr, AfterValidator(scram_verifier)] | None, BeforeValidator(_none_if_empty)
    ] = None
    """``SCRAM-SHA-256$...`` as in pg_authid.rolpassword: enough to check a password by."""
    max_clients: Annotated[int, whole(0, 100_000)] = 0
    """Most client connections of this user; 0: no limit of its own."""
    acquire_timeout: Annotated[float | None, duration_or_none("1ms", "1h")] = None
    """Instead of the pool's; empty: the pool's. So for the next four."""
    query_timeout: Annotated[float | None, duration_or_none("0", "7d")] = None
    """Seconds a query may run; 0: no limit."""
    transaction_timeout: Annotated[float | None, duration_or_none("0", "7d")] = None
    """Seconds a transaction may last; 0: no limit."""
    idle_in_transaction_timeout: Annotated[float | None, duration_or_none("0", "7d")] = None
    """Seconds a client may be silent in a transaction; 0: no limit."""
    client_idle_timeout: Annotated[float | None, duration_or_none("0", "30d")] = None
    """Seconds a client may be silent outside of one; 0: no limit."""

    @model_validator(mode="after")
    def _one_secret(self) -> "UserConfig":
        given = [
            name
            for name in ("password", "password_file", "verifier")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            what = f"with {' and '.join(given)}" if given else "without a secret"
            raise ValueError(f"{what}; allowed: one of password, password_file, verifier")
        return self


class PoolConfig(Section):
    """One pool: which server, database and user, and how many connections for how long."""

    name: str
    """The pool's key in the file; not an option. With ``*`` it is a pattern, and the pool a template."""
    dsn: SecretStr
    """Connection string of the server, a URL or key=value; empty: the pool is left out."""
    mode: PoolMode = PoolMode.TRANSACTION
    """How long a client keeps a server connection: a statement, a transaction, or its session."""
    pin: PinPolicy = PinPolicy.AUTO
    """What happens to a statement whose effect outlives the transaction, in transaction mode."""
    reset: ResetPolicy = ResetPolicy.DIRTY
    """Which connections get DISCARD ALL before the next client: those known to need it, or all."""
    auth_query: str = ""
    """Query for the verifier of a user that is not in ``users``, with $1 for its name."""
    auth_dsn: Annotated[
        Annotated[SecretStr, AfterValidator(_usable_dsn)] | None, BeforeValidator(_none_if_empty)
    ] = None
    """Connection string for ``auth_query``; empty: the pool's own."""
    max_size: Annotated[int, whole(1, 1000)] = 25
    """Most server connections; of a template: of all its pools together."""
    min_idle: Annotated[int, whole(0, 1000)] = 5
    """Idle server connections kept ready; where not given, no more than ``max_size``, and 0 for
    a template, of which each pool keeps so many while it has clients."""
    max_waiting: Annotated[int, whole(0, 100_000)] = 0
    """Most clients that wait for a connection; further ones get an error; 0: no limit of its own."""
    max_clients: Annotated[int, whole(0, 100_000)] = 0
    """Most client connections of this pool; 0: no limit but ``listen.max_clients``."""
    connect_timeout: Annotated[float, duration("1ms", "1h")] = 30.0
    """Seconds to open a server connection, its login included."""
    acquire_timeout: Annotated[float, duration("1ms", "1h")] = 30.0
    """Seconds a client waits for a server connection; then it gets an error."""
    query_timeout: Annotated[float, duration("0", "7d")] = 0.0
    """Seconds a query may run; then it is cancelled (57014); 0: no limit."""
    transaction_timeout: Annotated[float, duration("0", "7d")] = 0.0
    """Seconds a transaction may last; then its client is closed (25P04); 0: no limit."""
    idle_in_transaction_timeout: Annotated[float, duration("0", "7d")] = 0.0
    """Seconds a client may be silent in a transaction; then it is closed (25P03); 0: no limit."""
    client_idle_timeout: Annotated[float, duration("0", "30d")] = 0.0
    """Seconds a client may be silent outside of one; then it is closed (57P05); 0: no limit."""
    idle_timeout: Annotated[float, duration("1ms", "7d")] = 300.0
    """Seconds after which an idle server connection is closed, as long as ``min_idle`` are left."""
    max_lifetime: Annotated[float, duration("1ms", "7d")] = 300.0
    """Seconds (less a random part) after which a server connection is replaced, once released."""
    ping_interval: Annotated[float, duration("1ms", "1h")] = 30.0
    """Seconds between pings on an idle server connection."""
    ping_timeout: Annotated[float, duration("1ms", "10m")] = 5.0
    """Seconds a ping may take; then its connection is closed."""
    max_prepared_statements: Annotated[int, whole(1, 10_000)] = 200
    """Most prepared statements kept on one server connection."""
    slow_query_threshold: Annotated[float, duration("1ms", "1d")] = 5.0
    """Seconds after which a query counts as slow."""
    leak_threshold: Annotated[float, duration("0", "7d")] = 60.0
    """Seconds after which a lease, or a transaction of a pinned or session-mode client, counts as a
    leak; 0: none does."""
    leak_action: Literal["report", "close"] = "report"
    """What becomes of a leak: it is told, or its client is closed (25P04), too."""
    diagnose: Annotated[bool, BeforeValidator(flag)] = True
    """Whether the server is asked what a slow query waits for, on one connection beside the pool."""

    @field_validator("dsn")
    @classmethod
    def _dsn_is_usable(cls, dsn: SecretStr, info: ValidationInfo) -> SecretStr:
        if _is_given(dsn):
            parse_dsn(dsn.get_secret_value(), is_template="*" in info.data.get("name", ""))
        return dsn

    @field_validator("min_idle")
    @classmethod
    def _min_idle_fits(cls, min_idle: int, info: ValidationInfo) -> int:
        max_size = info.data.get("max_size", min_idle)
        if min_idle > max_size:
            raise Conflict(
                f"is more than max_size {max_size}; allowed: 0 to {max_size}", other="max_size"
            )
        return min_idle

    @model_validator(mode="after")
    def _default_min_idle_fits(self) -> "PoolConfig":
        # Who writes "max_size: 3" should not have to know of min_idle.
        if "min_idle" not in self.model_fields_set:
            fitting = 0 if self.is_template else min(self.min_idle, self.max_size)
            self.__dict__["min_idle"] = fitting  # past "frozen", before anyone has seen it
        return self

    @model_validator(mode="after")
    def _auth_query_has_a_login(self) -> "PoolConfig":
        if (
            self.auth_query
            and self.auth_dsn is None
            and _is_given(self.dsn)
            and not (self.target.user and self.target.database)
        ):
            raise ValueError(
                "with auth_query, and a dsn that names no user or no database; allowed: with"
                " auth_dsn, too"
            )
        if self.auth_query and "$1" not in self.auth_query:
            raise ValueError(
                "with auth_query, and no $1 in it; allowed: with $1 for the user's name"
            )
        return self

    def has_same_users(self, other: "PoolConfig") -> bool:
        """Whether who has proved to be a user of this pool has done so for the other one, too."""
        return all(
            getattr(self, each) == getattr(other, each)
            for each in ("name", "dsn", "auth_query", "auth_dsn")
        )

    @property
    def is_template(self) -> bool:
        """Its name is a pattern: a pool for each database and user that clients ask for."""
        return "*" in self.name

    @property
    def auth_target(self) -> ServerTarget:
        """Where ``auth_query`` is run."""
        return self.target if self.auth_dsn is None else parse_dsn(self.auth_dsn.get_secret_value())

    @property
    def target(self) -> ServerTarget:
        """The connection string, read; a template's may have no database and no user."""
        return parse_dsn(self.dsn.get_secret_value(), is_template=self.is_template)


class ConsoleConfig(Section):
    """The console: the database ``pgsidecar``, for psql."""

    admin_users: Annotated[tuple[str, ...], BeforeValidator(user_names)] = ()
    """Users who may do everything there: SHOW, PAUSE, KILL, RELOAD, SHUTDOWN ..."""
    stats_users: Annotated[tuple[str, ...], BeforeValidator(user_names)] = ()
    """Users who may SHOW."""


class StatementsConfig(Section):
    """The figures of single statements."""

    limit: Annotated[int, whole(10, 10_000)] = 500
    """Most statements of one pool that are told apart; the least useful make room."""
    exported: Annotated[int, whole(0, 500)] = 50
    """Of them, those with series of their own in ``/metrics``; the rest is in "other"."""


class IncidentsConfig(Section):
    """The flight recorder: what was going on when something went wrong."""

    directory: Annotated[str | None, BeforeValidator(file_path)] = None
    """Where each incident is written as a JSON file; empty: incidents are in memory only."""
    keep: Annotated[int, whole(1, 1000)] = 50
    """Most incidents kept, in memory and as files; the oldest make room."""


class LogConfig(Section):
    """The log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""
    format: Literal["text", "json"] = "text"
    """Lines to read, or one JSON object a line."""


def _given_pools(pools: dict[str, PoolConfig]) -> dict[str, PoolConfig]:
    given = {name: pool for name, pool in pools.items() if _is_given(pool.dsn)}
    if not given:
        why = f" (left out, as their dsn is empty: {', '.join(pools)})" if pools else ""
        raise ValueError(f"without a pool{why}; allowed: at least one with a dsn")
    return given


class Config(Section):
    """The whole configuration. Durations are seconds."""

    listen: ListenConfig = Field(default_factory=ListenConfig)
    """Where PostgreSQL clients connect."""
    http: HttpConfig = Field(default_factory=HttpConfig)
    """The HTTP service: metrics and health."""
    users: dict[Annotated[str, AfterValidator(user_name)], UserConfig] = Field(default_factory=dict)
    """Who may log in, by user name, besides the users of the pools' connection strings."""
    pools: Annotated[
        dict[Annotated[str, AfterValidator(pool_name)], PoolConfig], AfterValidator(_given_pools)
    ]
    """The pools by name, at least one."""
    console: ConsoleConfig = Field(default_factory=ConsoleConfig)
    """The console: the database ``pgsidecar``, for psql."""
    statements: StatementsConfig = Field(default_factory=StatementsConfig)
    """The figures of single statements."""
    incidents: IncidentsConfig = Field(default_factory=IncidentsConfig)
    """The flight recorder: what was going on when something went wrong."""
    log: LogConfig = Field(default_factory=LogConfig)
    """The log."""
    drain_timeout: Annotated[float, duration("0", "1h")] = 30.0
    """Seconds that leases get to finish at shutdown; 0: none."""

    def pool_for(self, database: str) -> PoolConfig:
        """The pool a client means by ``database``: a pool's name, else the database of its server,
        else the most specific template: the one with most characters besides ``*``, the first of
        equals.

        ``SidecarError`` with SQLSTATE 3D000 if no pool is meant, or several are.
        """
        templates = [pool for pool in self.pools.values() if pool.is_template]
        pools = [pool for pool in self.pools.values() if not pool.is_template]
        if database in self.pools and not self.pools[database].is_template:
            return self.pools[database]
        serving = [pool for pool in pools if pool.target.database == database]
        if len(serving) == 1:
            return serving[0]
        matching = [pool for pool in templates if database and name_matches(pool.name, database)]
        if matching and not serving:
            return max(matching, key=lambda pool: len(pool.name.replace("*", "")))
        if serving:
            names = ", ".join(sorted(pool.name for pool in serving))
            message = f'database "{database}" is served by several pools: {names}'
            hint = "Name the pool instead of the database: dbname=<pool>."
        else:
            message = f'database "{database}" does not exist'
            hint = f"The pools are: {', '.join(sorted(self.pools))}."
        raise SidecarError(message, hint=hint, sqlstate="3D000")


def remarks(config: Config) -> list[str]:
    """What is odd about ``listen.hba``: rules that can never match, or that are risky."""
    listen = config.listen
    databases: set[str] | None = {CONSOLE_DATABASE}
    for name, pool in config.pools.items():
        if pool.is_template:
            databases = None  # a client can ask for whatever fits the pattern
        elif databases is not None:
            databases |= {name, pool.target.database}
    return odd_rules(
        listen.rules,
        has_tls=listen.tls_cert_file is not None and listen.tls_mode != "disable",
        requires_tls=listen.tls_mode == "require",
        has_tcp=bool(listen.host),
        has_socket=listen.unix_socket_dir is not None,
        databases=databases,
    )


def options(model: type[Section]) -> list[str]:
    """The names of a section's options."""
    return [key for key in model.model_fields if (model, key) != (PoolConfig, "name")]


def redacted(config: Config) -> dict[str, object]:
    """The configuration for printing: values as a file has them, secrets as ``***``, no empty ones.

    Each pool also shows its ``server``, ``database`` and ``user``, which the hidden dsn names.
    """
    return {key: _printable(getattr(config, key)) for key in Config.model_fields}


def _printable(value: object) -> object:
    match value:
        case Section():
            given = {key: getattr(value, key) for key in options(type(value))}
            shown = {key: _printable(each) for key, each in given.items() if each is not None}
            if isinstance(value, PoolConfig):
                target = value.target
                shown["server"] = target.describe()
                shown["database"] = target.database or "the client's"
                shown["user"] = target.user or "the client's"
            return shown
        case tuple():
            return ", ".join(value)
        case dict():
            return {key: _printable(entry) for key, entry in value.items()}
        case SecretStr():
            return "***"
        case StrEnum():
            return value.value
        case float():  # each is a duration
            return f"{value:.6f}".rstrip("0").rstrip(".") + "s"
        case _:
            return value
