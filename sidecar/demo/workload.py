"""Several applications that use the sidecar's PostgreSQL port, so that there is something to see.

Owns: the demo's schema and what the applications do when. Does not own: the sidecar; this is a
process of its own (``python -m sidecar.demo.workload --dsn ...``), so that its work does not run on
the sidecar's event loop and the figures are those of a true network client.

Tasks: one for each client connection of an application. Each runs until cancelled, and connects
again half a second after any error. ``_watch_parent`` looks every 0.5 s whether the process that
started us lives.
"""

import argparse
import asyncio
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf

import psycopg
from psycopg import AsyncConnection

log = logging.getLogger(__name__)

Connection = AsyncConnection[tuple[object, ...]]

PRODUCTS = 2_000
CATEGORIES = 20

# Instants are seconds after the start.
FORGETFUL_FIRST, FORGETFUL_EVERY, FORGETFUL_HOLDS = 4.0, 60.0, 20.0
BURST_FIRST, BURST_EVERY, BURST_LASTS = 8.0, 45.0, 4.0
BURST_CLIENTS = 36  # the pool has 25: the others wait
LONG_REPORT_FIRST, LONG_REPORT_EVERY = 12.0, 60.0
LONG_REPORT_TAKES = 5.5  # above the slow query threshold of 5 s

_RETRY = 0.5  # seconds from an error to the next attempt to connect
_STOP_TIMEOUT = 1.5  # seconds for open queries to be cancelled; then we just exit

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS products (
    id int PRIMARY KEY, sku text UNIQUE NOT NULL, category int NOT NULL,
    price numeric(10, 2) NOT NULL, stock int NOT NULL);
CREATE INDEX IF NOT EXISTS products_category ON products (category);
CREATE TABLE IF NOT EXISTS orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer int NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS order_items (
    order_id bigint NOT NULL REFERENCES orders ON DELETE CASCADE,
    product_id int NOT NULL REFERENCES products, quantity int NOT NULL);
CREATE INDEX IF NOT EXISTS order_items_order ON order_items (order_id);
CREATE TABLE IF NOT EXISTS price_changes (
    sku text NOT NULL, price numeric(10, 2) NOT NULL, changed_at timestamptz DEFAULT now());
INSERT INTO products
    SELECT i, 'sku-' || i, i % {CATEGORIES}, 1 + i % 97, 1000 FROM generate_series(1, {PRODUCTS}) i
    ON CONFLICT DO NOTHING;
ANALYZE products;
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """Where the applications connect, when they began (loop time) and how fast they go."""

    dsn: str
    began: float
    rate: float
    is_calm: bool = False  # without the nightly burst

    async def connect(self, application: str) -> Connection:
        return await AsyncConnection.connect(
            self.dsn, application_name=application, autocommit=True, connect_timeout=10
        )

    async def keep(self, application: str, work: Callable[[Connection], Awaitable[None]]) -> None:
        """Run ``work`` on a connection for ever; on a new one after an error."""
        while True:
            with _survived(application):
                async with await self.connect(application) as conn:
                    await work(conn)
            await asyncio.sleep(_RETRY)

    async def times(self, first: float, every: float) -> AsyncIterator[None]:
        """Yield at ``first`` seconds after the start, then every ``every``; leave out what is past."""
        clock = asyncio.get_running_loop().time
        due = self.began + first
        while True:
            while due < clock():
                due += every
            await asyncio.sleep(due - clock())
            yield
            due += every

    async def think(self, mean: float) -> None:
        """Pause for a random time of ``mean`` seconds (Poisson arrivals)."""
        await asyncio.sleep(random.expovariate(self.rate / mean))

    # the applications; each method but the last two works on one connection

    async def shop_api(self, conn: Connection) -> None:
        """Fast reads, each prepared by the driver after its fifth execution."""
        while True:
            await self.think(0.02)
            if random.random() < 0.8:
                await conn.execute(
                    "SELECT sku, price, stock FROM products WHERE id = %s", (_any_product(),)
                )
            else:
                await conn.execute(
                    "SELECT id, sku, price FROM products WHERE category = %s ORDER BY price LIMIT 20",
                    (random.randrange(CATEGORIES),),
                )

    async def orders_worker(self, conn: Connection) -> None:
        """Orders, each one transaction of four statements and a commit."""
        while True:
            await self.think(0.1)
            first, second = sorted(random.sample(range(1, PRODUCTS + 1), 2))  # no deadlocks
            async with conn.transaction():
                cursor = await conn.execute(
                    "INSERT INTO orders (customer) VALUES (%s) RETURNING id",
                    (random.randrange(500),),
                )
                row = await cursor.fetchone()
                assert row is not None
                await conn.execute(
                    "INSERT INTO order_items VALUES (%s, %s, 1), (%s, %s, 2)",
                    (row[0], first, row[0], second),
                )
                for product in (first, second):
                    await conn.execute(
                        "UPDATE products SET stock = stock - 1 WHERE id = %s", (product,)
                    )

    async def reporting(self, conn: Connection) -> None:
        """A heavier query now and then; one in five divides by zero."""
        while True:
            await self.think(4.0)
            await conn.execute(
                "SELECT category, sum(quantity * price), pg_sleep(0.02) FROM order_items"
                " JOIN products ON id = product_id GROUP BY category ORDER BY 2 DESC"
            )
            if random.random() < 0.2:
                with suppress(psycopg.errors.DivisionByZero):
                    await conn.execute("SELECT sum(stock) / 0 FROM products")

    async def long_report(self, conn: Connection) -> None:
        """Once a minute a report that is slower than the threshold for slow queries."""
        async for _ in self.times(LONG_REPORT_FIRST, LONG_REPORT_EVERY):
            await conn.execute(
                "SELECT count(*), avg(price), pg_sleep(%s) FROM products", (LONG_REPORT_TAKES,)
            )

    async def importer(self, conn: Connection) -> None:
        """COPY of new prices, a product that exists already, and removal of what is old."""
        async for _ in self.times(2.0, 5.0):
            copying = conn.cursor().copy("COPY price_changes (sku, price) FROM STDIN")
            async with copying as copy:
                for _ in range(random.randrange(300, 1500)):
                    await copy.write_row((f"sku-{_any_product()}", random.randrange(1, 99)))
            with suppress(psycopg.errors.UniqueViolation):
                await conn.execute("INSERT INTO products VALUES (0, 'sku-1', 0, 1, 1)")
            for table, column in (("price_changes", "changed_at"), ("orders", "created_at")):
                await conn.execute(f"DELETE FROM {table} WHERE {column} < now() - interval '5 min'")

    async def nightly_burst(self) -> None:
        """More transactions at once than the pool has connections, for a few seconds."""
        async for _ in self.times(BURST_FIRST, BURST_EVERY):
            ends = asyncio.get_running_loop().time() + BURST_LASTS
            async with asyncio.TaskGroup() as tasks:
                for _ in range(BURST_CLIENTS):
                    tasks.create_task(self._burst_client(ends))

    async def _burst_client(self, ends: float) -> None:
        with _survived("nightly-burst"):
            async with await self.connect("nightly-burst") as conn:
                while asyncio.get_running_loop().time() < ends:
                    async with conn.transaction():
                        await conn.execute("SELECT count(*) FROM orders WHERE customer < 50")
                        await conn.execute("SELECT pg_sleep(%s)", (random.uniform(0.1, 0.5),))

    async def forgetful(self) -> None:
        """A client that begins a transaction, forgets it, and is closed after a while."""
        async for _ in self.times(FORGETFUL_FIRST, FORGETFUL_EVERY):
            with _survived("forgetful"):
                async with await self.connect("forgetful") as conn:
                    await conn.execute("BEGIN")
                    await conn.execute("SELECT * FROM products WHERE id = %s", (_any_product(),))
                    await asyncio.sleep(FORGETFUL_HOLDS)

    async def run(self) -> None:
        """All applications, until cancelled."""
        clients: list[tuple[str, int, Callable[[Connection], Awaitable[None]]]] = [
            ("shop-api", 8, self.shop_api),
            ("orders-worker", 3, self.orders_worker),
            ("reporting", 1, self.reporting),
            ("reporting", 1, self.long_report),
            ("importer", 1, self.importer),
        ]
        async with asyncio.TaskGroup() as tasks:
            for application, count, work in clients:
                for _ in range(count):
                    tasks.create_task(self.keep(application, work))
            if not self.is_calm:
                tasks.create_task(self.nightly_burst())
            tasks.create_task(self.forgetful())


def create_schema(dsn: str) -> None:
    """Create the tables, on the server itself: the pool need not be up for it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(SCHEMA)


@contextmanager
def _survived(application: str) -> Iterator[None]:
    """Log what went wrong with one client; its application goes on."""
    try:
        yield
    except (psycopg.Error, OSError) as error:
        log.warning("%s: %s", application, str(error).strip().partition("\n")[0])


def _any_product() -> int:
    return random.randint(1, PRODUCTS)


def _watch_parent(parent: int, stop: Callable[[], object]) -> None:
    """Stop when the process that started us is gone: the sidecar went down without telling us."""
    if os.getppid() != parent:
        stop()
        return
    asyncio.get_running_loop().call_later(0.5, _watch_parent, parent, stop)


async def run(dsn: str, rate: float, is_calm: bool = False) -> None:
    """All applications, until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(Workload(dsn, loop.time(), rate, is_calm).run())

    def stop() -> None:
        loop.call_later(_STOP_TIMEOUT, os._exit, 0)  # a server that hangs must not hold us up
        work.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    _watch_parent(os.getppid(), stop)
    with suppress(asyncio.CancelledError):
        await work


def _factor(text: str) -> float:
    if not 0 < (factor := float(text)) < inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return factor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sidecar.demo.workload")
    parser.add_argument("--dsn", required=True, help="where the applications connect")
    parser.add_argument("--schema-dsn", help="create the schema there first; default: --dsn")
    parser.add_argument(
        "--rate", type=_factor, default=1.0, help="factor on the requests per second"
    )
    parser.add_argument(
        "--calm", action="store_true", help="without the burst that exhausts the pool"
    )
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    create_schema(options.schema_dsn or options.dsn)
    asyncio.run(run(options.dsn, options.rate, options.calm))


if __name__ == "__main__":
    main()
