"""What can be told of clients, for people who look.

Reads attributes and sockets' addresses; decides nothing and keeps nothing.
"""

from collections.abc import Iterable, Iterator

from sidecar.events import ClientSnapshot
from sidecar.pool.telling import addresses, tls
from sidecar.proxy.relay import Relay


def clients(relays: Iterable[Relay]) -> Iterator[ClientSnapshot]:
    """One after the other: the caller may pause between, and some may be gone by then."""
    for relay in relays:
        if not relay.is_closed:
            yield _client(relay)


def _client(relay: Relay) -> ClientSnapshot:
    (address, port), (local_address, local_port) = addresses(relay.transport)
    server = relay.server
    if server is not None:
        asked_at = max(server.leased_at, server.query_started)
    else:
        asked_at = relay.waiting_since if relay.is_waiting else relay.idle_since
    return ClientSnapshot(
        id=relay.id,
        pool=relay.pool.name,
        pool_key=id(relay.pool),
        user=relay.client.user,
        database=relay.client.database,
        application=relay.carrier.application,
        address=address,
        port=port,
        local_address=local_address,
        local_port=local_port,
        tls=tls(relay.transport),
        opened_at=relay.opened_at,
        asked_at=asked_at,
        waiting_since=relay.waiting_since if relay.is_waiting else 0.0,
        deadline=relay.deadline if relay.is_waiting else 0.0,
        server=0 if server is None else server.id,
        prepared_statements=len(relay.requests.statements),
    )
