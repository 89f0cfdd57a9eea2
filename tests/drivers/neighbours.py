"""Other clients of the pools, who make sure that nobody keeps a server connection to himself.

Two for each address: short transactions with pauses, so that whoever is tested beside them gets one
server connection after the other, which they have used. They have settings of their own, and prepared
statements with the names that drivers give theirs, and look whether these are still their own.

A process of its own: ``python -m tests.drivers.neighbours URL...``, until its input ends.
"""

import asyncio
import os
import random
import sys
import threading
from typing import Any

import psycopg
from psycopg import pq

NAMES = (b"S_1", b"S_2", b"__asyncpg_stmt_1__", b"_pg3_0", b"q1", b"pdo_stmt_1", b"lrupsc_1_0")
"""What JDBC, asyncpg, psycopg 3, node-postgres as its users do, PDO and pgx call their statements."""

SETTINGS = (
    {"timezone": "Asia/Kathmandu", "datestyle": "German", "intervalstyle": "iso_8601"},
    {"timezone": "America/Caracas", "client_encoding": "LATIN1", "datestyle": "SQL, DMY"},
)
PAUSE = 0.01  # seconds at most, in a transaction and between two


def _checked(result: pq.abc.PGresult) -> bytes | None:
    good = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
    assert result.status in good, result.error_message
    return result.get_value(0, 0) if result.ntuples else None


async def neighbour(url: str, number: int) -> None:
    settings = SETTINGS[number]
    options = " ".join(f"-c {k}={v.replace(' ', chr(92) + ' ')}" for k, v in settings.items())
    chance = random.Random(number)
    async with await psycopg.AsyncConnection.connect(
        url,
        autocommit=True,
        options=options,
        application_name=f"neighbour {number}",
        prepare_threshold=None,  # the names are taken
    ) as conn:
        for name in NAMES:
            await _prepare(conn, name, b"SELECT '%b of %d'::text" % (name, number))
        turn = 0
        while True:
            turn += 1
            async with conn.transaction():
                name = NAMES[turn % len(NAMES)]
                found = await _execute(conn, name)
                assert found == b"%b of %d" % (name, number), found
                await asyncio.sleep(chance.random() * PAUSE)
                if turn % 5 == 0:
                    for setting, value in settings.items():
                        cursor = await conn.execute(f"SHOW {setting}")
                        row = await cursor.fetchone()
                        assert row is not None
                        assert value in row[0], (setting, row)
            await asyncio.sleep(chance.random() * PAUSE)


async def _prepare(conn: psycopg.AsyncConnection[Any], name: bytes, query: bytes) -> None:
    conn.pgconn.send_prepare(name, query)
    await _reply(conn)


async def _execute(conn: psycopg.AsyncConnection[Any], name: bytes) -> bytes | None:
    conn.pgconn.send_query_prepared(name, [])
    return await _reply(conn)


async def _reply(conn: psycopg.AsyncConnection[Any]) -> bytes | None:
    from psycopg import generators

    results = await conn.wait(generators.execute(conn.pgconn))
    return _checked(results[0])


async def main(urls: list[str]) -> None:
    async with asyncio.TaskGroup() as group:
        for url in urls:
            for number in range(2):
                group.create_task(neighbour(url, number))


def _end_with_our_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_our_input, daemon=True).start()
    asyncio.run(main(sys.argv[1:]))
