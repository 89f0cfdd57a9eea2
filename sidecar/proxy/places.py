"""How many clients there may be of a user, of a pool, and in login.

Owns who counts towards which limit, as sets of those who are there: the counts are their lengths.
"""

from typing import Final

from sidecar.config import Config
from sidecar.errors import PoolSaturated


class Places:
    def __init__(self, config: Config) -> None:
        self.config = config  # a reload brings another
        self._logins: Final[set[object]] = set()
        self._clients: Final[dict[object, tuple[str, str]]] = {}
        """User and pool of each client."""
        self._of_user: Final[dict[str, set[object]]] = {}
        self._of_pool: Final[dict[str, set[object]]] = {}

    # -- in login ------------------------------------------------------------------------------

    def admit_login(self, session: object) -> None:
        """Raises PoolSaturated. A client counts from its startup packet on: before, it may as well be a
        cancel request, which makes room rather than takes it, and comes over TLS, too."""
        limit = self.config.listen.max_logins
        if limit and len(self._logins) >= limit:
            raise PoolSaturated(
                "sorry, too many clients in login already",
                detail=f"{limit} clients are in login.",
                hint="The limit is listen.max_logins.",
            )
        self._logins.add(session)

    def login_ended(self, session: object) -> None:
        self._logins.discard(session)

    # -- logged in -----------------------------------------------------------------------------

    def admit(self, user: str, pool: str) -> None:
        """Raises PoolSaturated. For those who have proved who they are: strangers learn nothing."""
        entry = self.config.users.get(user)
        if entry is not None and _is_reached(entry.max_clients, self._of_user.get(user)):
            raise PoolSaturated(
                f'too many connections for user "{user}"',
                detail=f"{entry.max_clients} clients of this user are connected.",
                hint=f"The limit is users.{user}.max_clients.",
            )
        limit = self.config.pools[pool].max_clients
        if _is_reached(limit, self._of_pool.get(pool)):
            raise PoolSaturated(
                f'too many connections for pool "{pool}"',
                detail=f"{limit} clients of this pool are connected.",
                hint=f"The limit is pools.{pool}.max_clients.",
            )

    def enter(self, client: object, user: str, pool: str) -> None:
        self._clients[client] = user, pool
        self._of_user.setdefault(user, set()).add(client)
        self._of_pool.setdefault(pool, set()).add(client)

    def leave(self, client: object) -> None:
        """Idempotent."""
        user, pool = self._clients.pop(client, (None, None))
        if user is None or pool is None:
            return
        for clients, name in ((self._of_user, user), (self._of_pool, pool)):
            clients[name].discard(client)
            if not clients[name]:
                del clients[name]  # users need not be those of the configuration: they are many


def _is_reached(limit: int, clients: set[object] | None) -> bool:
    return bool(limit and clients and len(clients) >= limit)
