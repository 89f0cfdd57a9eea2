"""``pgsidecar check``: is the configuration usable, and does each pool's server let us in?

Uses the pool's own way to connect, so that what it finds is what the pool will find. Of a template
it can tell less: which databases and users there will be, is known to its clients.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sidecar.config import Config, ListenConfig, PoolConfig, ServerTarget, remarks
from sidecar.errors import ConfigError, ServerError, SidecarError
from sidecar.events import Traffic
from sidecar.pool import health, sideline
from sidecar.pool.server import ServerConnection, clock
from sidecar.protocol import messages as m
from sidecar.protocol.x509 import not_after
from sidecar.proxy.certificates import read_identity
from sidecar.proxy.credentials import first_line
from sidecar.proxy.lookup import MOST_ROWS, auth_target, check_answer
from sidecar.work import Who

_SOME_DATABASE = "postgres"
"""Where a template's user is tried: most servers have it."""

_LIMITS = m.query(
    b"SELECT current_setting('max_connections')::int"
    b" - current_setting('superuser_reserved_connections')::int"
)


_ENDS_SOON = 14
"""Days before its end from which a certificate should have been renewed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one pool's server said."""

    pool: PoolConfig
    problem: str = ""
    hint: str = ""
    version: str = ""
    took: float = 0.0  # seconds to connect
    encryption: str = ""  # the version of TLS; empty: none
    limit: int = 0  # connections that ordinary users can have, in all
    note: str = ""  # of a template: what was not found out

    @property
    def is_ok(self) -> bool:
        return not self.problem


class _Owner:
    def lost(self, server: ServerConnection) -> None:
        pass


class _FirstValue:
    """A receiver for the first column of the first row."""

    def __init__(self) -> None:
        self._data = b""
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def server_data(self, data: bytes) -> None:
        self._data += data
        found = dict(_messages(self._data))
        if m.READY_FOR_QUERY in found and not self.done.done():
            row = found.get(m.DATA_ROW, b"")
            self.done.set_result(row[6:])  # number of columns, length, value (54.7, DataRow)

    def server_lost(self) -> None:
        if not self.done.done():
            self.done.set_result(b"")

    def server_writable(self, is_writable: bool) -> None:
        pass

    def describe(self, now: float) -> str:
        return "the configuration check"

    def who(self) -> Who:
        return health.NOBODY


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    pos = 0
    while len(data) - pos >= 5:
        kind, length = m.HEADER.unpack_from(data, pos)
        if len(data) - pos < length + 1:
            return
        yield kind, data[pos + 5 : pos + 1 + length]
        pos += 1 + length


async def check(config: Config) -> list[Finding]:
    """Try every pool once, all at the same time."""
    return list(await asyncio.gather(*map(_try, config.pools.values())))


async def _try(pool: PoolConfig) -> Finding:
    target = pool.target
    if pool.is_template and target.user and not target.database:
        target = replace(target, database=_SOME_DATABASE)
    server = ServerConnection(_Owner(), target, Traffic())
    began = clock()
    try:
        deadline = began + pool.connect_timeout
        await server.open(deadline)
        took = clock() - began
        async with asyncio.timeout_at(deadline):
            answer = _FirstValue()
            server.receiver = answer
            server.write(_LIMITS)
            limit = await answer.done
    except (OSError, SidecarError) as exc:
        if pool.is_template and (note := _note(exc, target)):
            return Finding(pool, took=clock() - began, note=note)
        hint = exc.hint if isinstance(exc, SidecarError) else ""
        return Finding(pool, problem=health.describe(exc), hint=hint)
    finally:
        server.abort()
    if pool.auth_query and (problem := await _problem_of_auth_query(pool)):
        return Finding(pool, problem=f"auth_query: {problem}")
    version = server.parameters.get(b"server_version", b"?").decode()
    return Finding(
        pool, version=version, took=took, encryption=server.tls_version, limit=int(limit or 0)
    )


async def _problem_of_auth_query(pool: PoolConfig) -> str:
    """Empty if there is none: users can be looked up."""
    server = ServerConnection(_Owner(), auth_target(pool), Traffic())
    deadline = clock() + pool.connect_timeout
    try:
        await server.open(deadline)
        user = server.target.user
        answer = await sideline.ask(server, pool.auth_query, user, MOST_ROWS, deadline)
        check_answer(answer)
    except (OSError, SidecarError) as exc:
        return health.describe(exc)
    finally:
        server.abort()
    return ""


def _note(exc: Exception, target: ServerTarget) -> str:
    """What is still good news for a template: an answer of the server that is not about what the
    configuration says. Empty if it is none."""
    if not isinstance(exc, ServerError) or not health.is_refusal(exc):
        return ""
    if not target.user:
        return "it answers; databases and users are the clients'"
    if exc.sqlstate in ("3D000", "42501"):  # after the password: PostgreSQL looks at it first
        return f"it lets {target.user} in; databases are the clients'"
    return ""


@dataclass(frozen=True, slots=True)
class TlsFinding:
    """What the files of TLS to clients are good for."""

    problem: str = ""
    ends: float = 0.0  # when the certificate does, in seconds since 1970; 0: there is none

    @property
    def is_ok(self) -> bool:
        return not self.problem


def check_tls(listen: ListenConfig) -> TlsFinding:
    """Read the files of TLS to clients, if there are any; blocks."""
    if listen.tls_cert_file is None:
        return TlsFinding()
    try:
        identity = read_identity(listen)
        ends = not_after(identity.certificate)
    except ConfigError as exc:
        return TlsFinding(exc.message)
    except (ValueError, IndexError):
        return TlsFinding("listen.tls_cert_file: its end cannot be read")
    if ends <= time.time():
        return TlsFinding(f"listen.tls_cert_file: the certificate has expired ({_date(ends)})")
    return TlsFinding(ends=ends)


def _date(instant: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(instant))


def _describe_tls(config: Config, tls: TlsFinding) -> Iterator[str]:
    if tls.problem:
        yield f"FAIL  TLS to clients: {tls.problem}"
    elif tls.ends:
        mode = {"disable": "disabled", "allow": "allowed", "require": "required"}
        yield f"TLS to clients      {mode[config.listen.tls_mode]}, certificate good until {_date(tls.ends)}"
        days = (tls.ends - time.time()) / 86400
        if days < _ENDS_SOON:
            yield f"warning: the certificate for clients ends in {days:.0f} days"
    else:
        yield "TLS to clients      none"


def _odd_users(config: Config) -> Iterator[str]:
    """Those who cannot log in; blocks for a moment."""
    for name, user in config.users.items():
        if user.password_file is not None:
            try:
                first_line(user.password_file)
            except (OSError, ValueError) as exc:
                why = getattr(exc, "strerror", None) or str(exc)
                yield f"users.{name}.password_file: {why}; this user cannot log in"
    methods = {str(rule.method) for rule in config.listen.rules} or {config.listen.auth}
    if methods & {"trust", "cert"}:
        return  # some can without a password
    known = {*config.users, *(pool.target.user for pool in config.pools.values())}
    console = config.console
    for option, names in (
        ("admin_users", console.admin_users),
        ("stats_users", console.stats_users),
    ):
        for name in names:
            if name not in known:
                yield f"console.{option}: {name} is in no users entry and no dsn, and cannot log in"


def report(config: Config, findings: list[Finding], tls: TlsFinding) -> str:
    """The findings, to read."""
    rules = len(config.listen.rules)
    who = f"{rules} rules" if rules else config.listen.auth
    lines = [
        f"PostgreSQL clients  {config.listen.host}:{config.listen.port}"
        f"  (at most {config.listen.max_clients}, {who})",
        *_describe_tls(config, tls),
        f"HTTP                {config.http.host}:{config.http.port}",
        *(f"warning: listen.hba, {remark}" for remark in remarks(config)),
        *(f"warning: {remark}" for remark in _odd_users(config)),
        "",
    ]
    for finding in findings:
        lines.extend(_describe(finding))
    bad = sum(not finding.is_ok for finding in findings)
    lines.append("")
    if bad:
        lines.append(f"{bad} of {len(findings)} pools cannot be used.")
    else:
        lines.append("All is well." if tls.is_ok else "TLS to clients cannot be used.")
    return "\n".join(lines)


def _describe(finding: Finding) -> Iterator[str]:
    pool, target = finding.pool, finding.pool.target
    mark = "ok  " if finding.is_ok else "FAIL"
    yield (
        f"{mark}  pool {pool.name}: {pool.mode} mode, at most {pool.max_size} connections, "
        f"{pool.min_idle} kept idle, as {target.user or 'each user'} to "
        f"{target.database or 'each database'} at {target.describe()}"
    )
    if finding.note:
        yield f"      PostgreSQL: {finding.note}"
    elif finding.is_ok:
        how = finding.encryption or "without TLS"
        yield f"      PostgreSQL {finding.version}, connected in {finding.took * 1000:.1f} ms, {how}"
    else:
        yield f"      {finding.problem}"
    if finding.hint:
        yield f"      {finding.hint}"
    if finding.is_ok and finding.limit and pool.max_size > finding.limit:
        yield (
            f"      warning: max_size {pool.max_size} is more than the {finding.limit} connections "
            "that this server allows in all"
        )
