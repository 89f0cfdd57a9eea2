"""What the relays of one pool share, and who a client is.

Holds it, and decides nothing: ``directory`` makes the tables of a pool and drops them.
"""

from dataclasses import dataclass
from typing import Final

from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy.limits import Limits
from sidecar.proxy.prepared import PreparedTable
from sidecar.proxy.settings import SettingsTable
from sidecar.proxy.texts import Texts
from sidecar.work import Who


@dataclass(frozen=True, slots=True)
class Client:
    """Who a client is, for messages and logs."""

    user: str
    database: str
    address: str

    def who(self, id: int, application: str) -> Who:
        return Who(id, application, self.user, self.database, self.address)

    def describe(self, application: str, server: ServerConnection | None, now: float) -> str:
        """For the error of another client that waits for what this one has: ``server``."""
        who = f'application "{application}"' if application else "a client without application_name"
        who += f', user "{self.user}", {self.address}'
        if server is None:
            return who
        if server.expected:
            return f"{who}, running a query for {now - server.query_started:.1f} s"
        where = "idle" if server.tx_status == m.IDLE else "idle in transaction"
        return f"{who}, {where} for {now - server.status_since:.1f} s"


class PoolTables:
    """What the clients of one pool share in the proxy."""

    def __init__(self, pool: Pool, texts: Texts) -> None:
        self.pool: Final = pool
        self.settings: Final = SettingsTable()
        self.statements: Final = PreparedTable()
        self.texts: Final = texts
        self.limits: dict[Limits, Limits] = {}
        """Those that clients have: one object for each combination."""
        self.leases = 0
        self.clients: Final[set[object]] = set()
        """Who uses the pool: relays, and sessions in login."""
