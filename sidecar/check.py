"""``pgsidecar check``: is the configuration usable, and does each pool's server let us in?

Uses the pool's own way to connect, so that what it finds is what the pool will find.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from sidecar.config import Config, PoolConfig, remarks
from sidecar.errors import SidecarError
from sidecar.events import Traffic
from sidecar.pool import health
from sidecar.pool.server import ServerConnection, clock
from sidecar.protocol import messages as m

_LIMITS = m.query(
    b"SELECT current_setting('max_connections')::int"
    b" - current_setting('superuser_reserved_connections')::int"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one pool's server said."""

    pool: PoolConfig
    problem: str = ""
    hint: str = ""
    version: str = ""
    took: float = 0.0  # seconds to connect
    limit: int = 0  # connections that ordinary users can have, in all

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
    server = ServerConnection(_Owner(), pool.target, Traffic())
    began = clock()
    try:
        async with asyncio.timeout_at(began + pool.connect_timeout):
            await server.open()
            took = clock() - began
            answer = _FirstValue()
            server.receiver = answer
            server.write(_LIMITS)
            limit = await answer.done
    except (OSError, SidecarError) as exc:
        hint = exc.hint if isinstance(exc, SidecarError) else ""
        return Finding(pool, problem=health.describe(exc), hint=hint)
    finally:
        server.abort()
    version = server.parameters.get(b"server_version", b"?").decode()
    return Finding(pool, version=version, took=took, limit=int(limit or 0))


def report(config: Config, findings: list[Finding]) -> str:
    """The findings, to read."""
    rules = len(config.listen.rules)
    who = f"{rules} rules" if rules else config.listen.auth
    lines = [
        f"PostgreSQL clients  {config.listen.host}:{config.listen.port}"
        f"  (at most {config.listen.max_clients}, {who})",
        f"HTTP                {config.http.host}:{config.http.port}",
        *(f"warning: listen.hba, {remark}" for remark in remarks(config)),
        "",
    ]
    for finding in findings:
        lines.extend(_describe(finding))
    bad = sum(not finding.is_ok for finding in findings)
    lines.append("")
    lines.append(f"{bad} of {len(findings)} pools cannot be used." if bad else "All is well.")
    return "\n".join(lines)


def _describe(finding: Finding) -> Iterator[str]:
    pool, target = finding.pool, finding.pool.target
    mark = "ok  " if finding.is_ok else "FAIL"
    yield (
        f"{mark}  pool {pool.name}: {pool.mode} mode, at most {pool.max_size} connections, "
        f"{pool.min_idle} kept idle, as {target.user} to {target.database} at {target.describe()}"
    )
    if finding.is_ok:
        yield f"      PostgreSQL {finding.version}, connected in {finding.took * 1000:.1f} ms"
    else:
        yield f"      {finding.problem}"
    if finding.hint:
        yield f"      {finding.hint}"
    if finding.is_ok and finding.limit and pool.max_size > finding.limit:
        yield (
            f"      warning: max_size {pool.max_size} is more than the {finding.limit} connections "
            "that this server allows in all"
        )
