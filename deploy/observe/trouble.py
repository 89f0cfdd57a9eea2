"""An application that begins transactions and forgets to commit: the commonest reason for a full pool."""

from contextlib import ExitStack, suppress
from typing import Final

import psycopg

CULPRIT: Final = "billing-worker"


def forget(dsn: str, transactions: int, held: ExitStack) -> None:
    """Begin so many, which stay open until ``held`` is closed; fewer, if the pool is full meanwhile.

    Blocks for as long as the pool has it wait. Raises psycopg.Error if it may not even log in.
    """
    for _ in range(transactions):
        conn = psycopg.connect(dsn, application_name=CULPRIT, connect_timeout=10)
        held.callback(conn.close)
        with suppress(psycopg.Error):  # others have all connections
            conn.execute("SELECT id FROM orders LIMIT 1")
