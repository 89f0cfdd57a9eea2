"""The configuration: a file and the environment in, one validated and immutable ``Config`` out.

Owns every option with its default, unit and limits, and the wording of what is wrong with a value.
Reads one file and nothing else: the environment is a parameter. Does not resolve names or try
servers; ``pgsidecar check`` does. How YAML, variables and overrides become a tree of text is in
``config_text``, connection strings are in ``dsn``.

No error message and no repr contains a password or a part of a connection string.
"""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from sidecar import config_text
from sidecar.config_text import Layout, Node, dotted, instead_of, shown
from sidecar.dsn import ServerTarget as ServerTarget  # the type of PoolConfig.target
from sidecar.dsn import parse_dsn
from sidecar.errors import ConfigError, SidecarError
from sidecar.events import PoolMode

CONSOLE_DATABASE = "pgsidecar"
"""The database that is the console; no pool may have its name."""


# Types of options: each converts text (or the Python value, when built in code), and its ValueError
# is the rest of a sentence that starts with the option's path and the value.


class _Conflict(ValueError):
    """A value that does not go with the one of ``other``, an option of the same section."""

    def __init__(self, message: str, other: str) -> None:
        super().__init__(message)
        self.other = other


def _whole(low: int, high: int) -> BeforeValidator:
    def convert(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"is not a whole number; allowed: {low} to {high}")
        if not low <= value <= high:
            raise ValueError(f"is out of range; allowed: {low} to {high}")
        return value

    return BeforeValidator(convert)


_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in _UNITS))


def _seconds(text: str) -> float | None:
    """Seconds of ``1m30s``; ``None`` if the text is not a duration."""
    found = _DURATION.fullmatch(text) if text else None
    if found is None:
        return 0.0 if text == "0" else None
    amounts = zip(found.groups("0"), _UNITS.values(), strict=True)
    # Through milliseconds, so that 0.1s and 100ms are the same float.
    return sum(float(amount) * unit for amount, unit in amounts) / 1000


def _duration(low: str, high: str) -> BeforeValidator:
    least, most = _seconds(low), _seconds(high)
    assert least is not None
    assert most is not None

    def convert(value: object) -> float:
        if isinstance(value, str):
            text = value.strip()
            if text.startswith("-"):
                raise ValueError(f"is negative; allowed: {low} to {high}")
            if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) and text != "0":
                raise ValueError(f"has no unit, write {text}s or {text}m; allowed: {low} to {high}")
            seconds = _seconds(text)
        else:  # only code can give a number: it means seconds
            seconds = float(value) if isinstance(value, int | float) else None
        if seconds is None:
            raise ValueError(
                f"is not a duration; allowed: {low} to {high},"
                " written like 100ms, 30s, 5m, 1m30s, 2h or 1d"
            )
        if not least <= seconds <= most:
            raise ValueError(f"is out of range; allowed: {low} to {high}")
        return seconds

    return BeforeValidator(convert)


def _flag(value: object) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "yes", "on"):
        return True
    if word in (False, "false", "no", "off"):
        return False
    raise ValueError("is neither true nor false; allowed: true, false")


def _some_host(host: str) -> str:
    # Left to the system, an empty address means all of them.
    if not host:
        raise ValueError("is empty; allowed: an address or a name (0.0.0.0 for all addresses)")
    return host


def _socket_dir(value: object) -> object:
    if value in ("", "null", "~"):
        return None
    # 107 bytes is Linux's limit for a socket's path (unix(7)); "/.s.PGSQL.65535" takes 15.
    if isinstance(value, str) and not (value.startswith("/") and len(value.encode()) <= 92):
        raise ValueError("is not usable; allowed: an absolute path of at most 92 bytes")
    return value


def _pool_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,63}", name):
        raise ValueError("is not a pool's name; allowed: 1 to 63 of A-Z a-z 0-9 _ . -")
    if name == CONSOLE_DATABASE:
        raise ValueError("is the name of the console; allowed: any other name")
    return name


def _user_name(name: str) -> str:
    # NAMEDATALEN - 1: PostgreSQL has no longer names.
    if not 1 <= len(name.encode()) <= 63:
        raise ValueError("is not a user's name; allowed: 1 to 63 bytes")
    return name


def _some_password(password: SecretStr) -> SecretStr:
    if not password.get_secret_value():
        raise ValueError("is empty; allowed: any other text")
    return password


def _is_given(dsn: SecretStr) -> bool:
    return bool(dsn.get_secret_value().strip())


def _usable_dsn(dsn: SecretStr) -> SecretStr:
    if _is_given(dsn):
        parse_dsn(dsn.get_secret_value())
    return dsn


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # pydantic's own messages would quote secrets
        use_attribute_docstrings=True,  # they are the fields' descriptions
    )


class ListenConfig(_Section):
    """Where PostgreSQL clients connect."""

    host: str = "127.0.0.1"
    """Address of the TCP listener; empty: none."""
    port: Annotated[int, _whole(0, 65535)] = 6432
    """TCP port, and the number in the Unix socket's name; 0: any free port."""
    unix_socket_dir: Annotated[str | None, BeforeValidator(_socket_dir)] = None
    """Directory in which the socket ``.s.PGSQL.<port>`` is created; empty: none."""
    auth: Literal["scram-sha-256", "trust"] = "scram-sha-256"
    """How clients prove who they are; ``trust``: not at all, on loopback and Unix sockets only."""
    max_clients: Annotated[int, _whole(1, 100_000)] = 5000
    """Most client connections at a time; further ones are refused."""
    login_timeout: Annotated[float, _duration("100ms", "10m")] = 10.0
    """Seconds from a client's connecting to the end of its login; then it is closed."""

    @field_validator("auth")
    @classmethod
    def _trust_stays_local(cls, auth: str, info: ValidationInfo) -> str:
        host = info.data.get("host", "")
        if auth == "trust" and host and not _is_loopback(host):
            raise _Conflict(
                f"would let everyone who can reach host {host!r} into the database without a"
                " password; allowed: scram-sha-256, or a host on loopback (127.0.0.1, ::1,"
                " localhost)",
                other="host",
            )
        return auth

    @model_validator(mode="after")
    def _listens_somewhere(self) -> "ListenConfig":
        if not self.host and self.unix_socket_dir is None:
            raise ValueError("without host and without unix_socket_dir; allowed: one or both")
        return self


class HttpConfig(_Section):
    """The HTTP service: metrics and health."""

    host: Annotated[str, AfterValidator(_some_host)] = "127.0.0.1"
    """Address it listens on."""
    port: Annotated[int, _whole(0, 65535)] = 9632
    """TCP port; 0: any free port."""
    max_connections: Annotated[int, _whole(1, 10_000)] = 100
    """Most HTTP connections at a time; further ones are refused."""
    access_log: Annotated[bool, BeforeValidator(_flag)] = False
    """Whether each HTTP request is logged."""


class UserConfig(_Section):
    """A user who may log in. The user of a pool's connection string may besides."""

    password: Annotated[SecretStr, AfterValidator(_some_password)]
    """The password clients log in with; not empty."""


class PoolConfig(_Section):
    """One pool: which server, database and user, and how many connections for how long."""

    name: str
    """The pool's key in the file; not an option."""
    dsn: Annotated[SecretStr, AfterValidator(_usable_dsn)]
    """Connection string of the server, a URL or key=value; empty: the pool is left out."""
    mode: PoolMode = PoolMode.TRANSACTION
    """How long a client keeps a server connection: one transaction, or its whole session."""
    max_size: Annotated[int, _whole(1, 1000)] = 25
    """Most server connections."""
    min_idle: Annotated[int, _whole(0, 1000)] = 5
    """Idle server connections kept ready; where not given, no more than ``max_size``."""
    max_waiting: Annotated[int, _whole(0, 100_000)] = 0
    """Most clients that wait for a connection; further ones get an error; 0: no limit of its own."""
    connect_timeout: Annotated[float, _duration("1ms", "1h")] = 30.0
    """Seconds to open a server connection, its login included."""
    acquire_timeout: Annotated[float, _duration("1ms", "1h")] = 30.0
    """Seconds a client waits for a server connection; then it gets an error."""
    idle_timeout: Annotated[float, _duration("1ms", "7d")] = 300.0
    """Seconds after which an idle server connection is closed, as long as ``min_idle`` are left."""
    max_lifetime: Annotated[float, _duration("1ms", "7d")] = 300.0
    """Seconds (less a random part) after which a server connection is replaced, once released."""
    ping_interval: Annotated[float, _duration("1ms", "1h")] = 30.0
    """Seconds between pings on an idle server connection."""
    ping_timeout: Annotated[float, _duration("1ms", "10m")] = 5.0
    """Seconds a ping may take; then its connection is closed."""
    max_prepared_statements: Annotated[int, _whole(1, 10_000)] = 200
    """Most prepared statements kept on one server connection."""
    slow_query_threshold: Annotated[float, _duration("1ms", "1d")] = 5.0
    """Seconds after which a query counts as slow."""

    @field_validator("min_idle")
    @classmethod
    def _min_idle_fits(cls, min_idle: int, info: ValidationInfo) -> int:
        max_size = info.data.get("max_size", min_idle)
        if min_idle > max_size:
            raise _Conflict(
                f"is more than max_size {max_size}; allowed: 0 to {max_size}", other="max_size"
            )
        return min_idle

    @model_validator(mode="after")
    def _default_min_idle_fits(self) -> "PoolConfig":
        # Who writes "max_size: 3" should not have to know of min_idle.
        if "min_idle" not in self.model_fields_set and self.min_idle > self.max_size:
            self.__dict__["min_idle"] = self.max_size  # past "frozen", before anyone has seen it
        return self

    @property
    def target(self) -> ServerTarget:
        """The connection string, read."""
        return parse_dsn(self.dsn.get_secret_value())


class LogConfig(_Section):
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


class Config(_Section):
    """The whole configuration. Durations are seconds."""

    listen: ListenConfig = Field(default_factory=ListenConfig)
    """Where PostgreSQL clients connect."""
    http: HttpConfig = Field(default_factory=HttpConfig)
    """The HTTP service: metrics and health."""
    users: dict[Annotated[str, AfterValidator(_user_name)], UserConfig] = Field(
        default_factory=dict
    )
    """Who may log in, by user name, besides the users of the pools' connection strings."""
    pools: Annotated[
        dict[Annotated[str, AfterValidator(_pool_name)], PoolConfig], AfterValidator(_given_pools)
    ]
    """The pools by name, at least one."""
    log: LogConfig = Field(default_factory=LogConfig)
    """The log."""
    drain_timeout: Annotated[float, _duration("0", "1h")] = 30.0
    """Seconds that leases get to finish at shutdown; 0: none."""

    def pool_for(self, database: str) -> PoolConfig:
        """The pool a client means by ``database``: a pool's name, else the database of its server.

        ``SidecarError`` with SQLSTATE 3D000 if no pool is meant, or several are.
        """
        if database in self.pools:
            return self.pools[database]
        serving = [pool for pool in self.pools.values() if pool.target.database == database]
        if len(serving) == 1:
            return serving[0]
        if serving:
            names = ", ".join(sorted(pool.name for pool in serving))
            message = f'database "{database}" is served by several pools: {names}'
            hint = "Name the pool instead of the database: dbname=<pool>."
        else:
            message = f'database "{database}" does not exist'
            hint = f"The pools are: {', '.join(sorted(self.pools))}."
        raise SidecarError(message, hint=hint, sqlstate="3D000")


def redacted(config: Config) -> dict[str, object]:
    """The configuration for printing: values as a file has them, secrets as ``***``.

    Each pool also shows its ``server``, ``database`` and ``user``, which the hidden dsn names.
    """
    return {key: _printable(getattr(config, key)) for key in Config.model_fields}


def _printable(value: object) -> object:
    match value:
        case _Section():
            options = {key: _printable(getattr(value, key)) for key in _options(type(value))}
            if isinstance(value, PoolConfig):
                target = value.target
                options["server"] = target.describe()
                options["database"] = target.database
                options["user"] = target.user
            return options
        case dict():
            return {key: _printable(entry) for key, entry in value.items()}
        case SecretStr():
            return "***"
        case PoolMode():
            return value.value
        case float():  # each is a duration
            return f"{value:.6f}".rstrip("0").rstrip(".") + "s"
        case _:
            return value


# Reading: text becomes a tree, overrides change it, the models check it, problems get words.

_SECRETS = ("dsn", "password")
_REQUIRED: dict[str, type[_Section]] = {"pools": Config, "dsn": PoolConfig, "password": UserConfig}


def _options(model: type[_Section]) -> list[str]:
    return [key for key in model.model_fields if (model, key) != (PoolConfig, "name")]


_LAYOUT = Layout(
    top=["drain_timeout"],
    sections={
        "listen": _options(ListenConfig),
        "http": _options(HttpConfig),
        "log": _options(LogConfig),
    },
    named={"users": _options(UserConfig), "pools": _options(PoolConfig)},
)


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Read the file and its overrides. ``ConfigError`` lists all that is wrong, a line each."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text, see byte {exc.start + 1}") from None
    return parse(text, environ, str(path))


def parse(text: str, environ: Mapping[str, str], source: str) -> Config:
    """Like ``load``, with the file's text; ``source`` names the file in errors."""
    try:
        raw, duplicates = config_text.read(text)
    except config_text.YamlProblem as exc:
        raise ConfigError(f"{source}, {exc}") from None
    tree, broken = config_text.expand(raw, environ)
    if not isinstance(tree, dict):
        allowed = ", ".join(_LAYOUT.keys(()))
        raise ConfigError(f"{source}: is not a mapping; allowed: {allowed}")
    origins, problems = config_text.override(tree, environ, _LAYOUT)
    # What an override replaced need not have been sound.
    broken = {path: problem for path, problem in broken.items() if path not in origins}
    problems = [f"{source}, {duplicate}" for duplicate in duplicates] + problems
    problems += [f"{dotted(path)}: {problem}" for path, problem in broken.items()]
    _name_pools(tree, problems)
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as exc:
        for error in exc.errors():
            path = tuple(str(part) for part in error["loc"] if part != "[key]")
            if path not in broken:
                problems.append(_worded(path, error, origins))
    # Outside of the except block: pydantic's error holds the values, and must not be the context.
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return config


def _name_pools(tree: dict[str, Node], problems: list[str]) -> None:
    pools = tree.get("pools")
    for name, pool in pools.items() if isinstance(pools, dict) else ():
        if isinstance(pool, dict):
            if "name" in pool:
                problems.append(_unknown_key(("pools", name, "name")))
            pool["name"] = name


def _worded(
    path: config_text.Path, error: ErrorDetails, origins: dict[config_text.Path, str]
) -> str:
    """A line on one of pydantic's errors: path, value unless it may be secret, what is allowed."""
    cause = error.get("ctx", {}).get("error")
    variable = origins.get(path)
    value = error["input"]
    kinds: dict[type, str] = {list: "a list", dict: "a mapping"}
    given = kinds.get(type(value), repr(value))
    if path[-1] in _SECRETS:
        given = "***"
    elif error["loc"][-1] == "[key]":
        given = repr(shown(path[-1]))
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(path)
        case "missing":
            variable = origins.get(path[:-1])
            meaning = _REQUIRED[path[-1]].model_fields[path[-1]].description
            problem = f"is missing; allowed: {meaning}"
        case "model_type" | "dict_type":
            # The value is not shown: "main: postgresql://..." is how a secret gets here.
            allowed = ", ".join(_LAYOUT.keys(path)) or "names, each with its options"
            problem = f"is not a mapping; allowed: {allowed}"
        case "literal_error" | "enum":
            problem = f"{given} is unknown; allowed: {error['ctx']['expected']}"
        case "value_error":
            problem = f"{given} {cause}"
            if isinstance(cause, _Conflict):
                variable = variable or origins.get((*path[:-1], cause.other))
        case _:
            problem = f"{given} is not text; allowed: text"
    return f"{dotted(path)}: {problem}" + (f" (set by {variable})" if variable else "")


def _unknown_key(path: config_text.Path) -> str:
    return f"{dotted(path)}: unknown key{instead_of(path[-1], _LAYOUT.keys(path[:-1]))}"
