"""Templates: a pool for each database and user that clients ask for, all under one budget."""

import asyncio
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from sidecar import check
from sidecar.config_file import parse
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import SidecarError
from sidecar.observe.verdict import Kind
from sidecar.proxy.login import Login
from tests.conftest import MakePostgres
from tests.sidecar_process import PATIENCE, POLL, Metrics, ServiceHere, come_true

TENANTS = 20

MakeTemplates = Callable[..., Awaitable[ServiceHere]]


def at(server: EmbeddedPostgres) -> str:
    """A template's dsn: where the server is, and nothing else."""
    return f"host={server.host} port={server.port}"


@pytest.fixture
async def make_templates() -> AsyncIterator[MakeTemplates]:
    """Starts sidecars with nothing but templates; ``pools`` by their pattern."""
    async with AsyncExitStack() as stack:

        async def make(
            pools: dict[str, dict[str, object]],
            users: dict[str, dict[str, object]] | None = None,
            **listen: object,
        ) -> ServiceHere:
            auth = "trust" if users is None else "scram-sha-256"
            text = {
                "listen": {"port": 0, "auth": auth, "auth_failure_delay": "0", **listen},
                "http": {"port": 0},
                "users": users or {},
                # what is counted is what the budget shares, not the diagnostic connection beside it
                "pools": {name: {"diagnose": False, **each} for name, each in pools.items()},
                "drain_timeout": "1s",
            }
            sidecar = await ServiceHere.start(json.dumps(text).replace("$", "$$"))
            stack.push_async_callback(sidecar.stop)
            return sidecar

        yield make


@pytest.fixture(scope="module")
def tenants(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    """20 databases, each with a user of its name."""
    for number in range(TENANTS):
        postgres.psql(f"CREATE DATABASE tenant_{number}; CREATE ROLE tenant_{number} LOGIN;")
    return postgres


def pools(sidecar: ServiceHere) -> list[tuple[str, str]]:
    """Database and user of each pool."""
    return [(pool.target.database, pool.target.user) for pool in sidecar.service.directory]


WHO = "SELECT current_database()::text, current_user::text"


@contextmanager
def watched(server: EmbeddedPostgres) -> Iterator[list[int]]:
    """How many backends the tenants have, every few milliseconds, as PostgreSQL sees it."""
    counts: list[int] = []
    stop = threading.Event()

    def look() -> None:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            while not stop.is_set():
                row = conn.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'tenant%'"
                ).fetchone()
                assert row is not None
                counts.append(row[0])
                time.sleep(0.003)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join(PATIENCE)


# -- who gets where --------------------------------------------------------------------------------


async def test_every_client_gets_to_its_own_database_as_itself(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """With both drivers; each pair of database and user has a pool, and keeps it while it is used."""
    sidecar = await make_templates({"tenant_*": {"dsn": at(tenants), "max_size": 4}})
    async with AsyncExitStack() as stack:
        pairs = [(f"tenant_{n}", f"tenant_{(n * 7) % TENANTS}") for n in range(TENANTS)]
        for database, user in pairs:
            dsn = sidecar.dsn(user=user, database=database)
            conn = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn))
            assert await (await conn.execute(WHO)).fetchone() == (database, user)
            await conn.commit()
            other = await asyncpg.connect(dsn)
            assert tuple(await other.fetchrow(WHO)) == (database, user)
            await other.close()
        assert sorted(pools(sidecar)) == sorted(pairs)
    metrics = await sidecar.metrics()
    assert metrics.errors == {}


async def test_a_dsn_may_name_the_user_or_the_database(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """What it names is the same for all; what it leaves out is the client's."""
    sidecar = await make_templates(
        {
            "tenant_*": {"dsn": f"{at(tenants)} user=tenant_3"},
            "one_*": {"dsn": f"{at(tenants)} dbname=tenant_5"},
        }
    )
    clients = [
        ("anybody", "tenant_1", ("tenant_1", "tenant_3")),
        ("someone", "tenant_1", ("tenant_1", "tenant_3")),
        ("tenant_6", "one_x", ("tenant_5", "tenant_6")),
    ]
    kept = []
    for user, database, expected in clients:
        client = await asyncpg.connect(sidecar.dsn(user=user, database=database))
        assert tuple(await client.fetchrow(WHO)) == expected
        kept.append(client)
    assert pools(sidecar) == [("tenant_1", "tenant_3"), ("tenant_5", "tenant_6")]
    for client in kept:
        await client.close()


async def test_names_are_taken_as_they_are(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """Quotes, blanks, letters beyond ASCII, and a star: a name is a name."""
    name = "tenant 'ü' \"*\" %s = $1"
    quoted = name.replace('"', '""')
    tenants.psql(f'CREATE DATABASE "{quoted}"; CREATE ROLE "{quoted}" LOGIN;')
    sidecar = await make_templates({"tenant*": {"dsn": at(tenants)}})
    client = await asyncpg.connect(
        host="127.0.0.1", port=sidecar.pg_port, user=name, database=name, ssl=False
    )
    assert tuple(await client.fetchrow(WHO)) == (name, name)
    await client.close()
    metrics = await sidecar.metrics()
    assert metrics.value("pgsidecar_pool_connections", pool="tenant*", state="idle") == 1
    assert "%s" not in metrics.text


async def test_sessions_share_the_budget_too(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """Who keeps a connection for its session makes others wait, and the next one gets its place."""
    sidecar = await make_templates(
        {"*": {"dsn": at(tenants), "max_size": 2, "mode": "session"}}, login_timeout="30s"
    )
    dsns = [sidecar.dsn(user=f"tenant_{n}", database=f"tenant_{n}") for n in range(6)]
    done: list[int] = []

    async def visit(number: int) -> None:
        client = await asyncpg.connect(dsns[number])
        await client.execute("SET work_mem = '1MB'")
        await asyncio.sleep(0.05)
        assert await client.fetchval("SELECT current_database()") == f"tenant_{number}"
        await client.close()
        done.append(number)

    with watched(tenants) as counts:
        await asyncio.gather(*(visit(number) for number in range(6)))
    assert sorted(done) == list(range(6))
    assert max(counts) <= 2


async def test_it_starts_and_is_ready_with_templates_only(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """Nothing is connected before somebody asks; the metrics have the template from the start."""
    sidecar = await make_templates({"*": {"dsn": at(tenants), "max_size": 3}})
    assert await asyncio.to_thread(sidecar.get, "/readyz") == (200, "ok\n")
    metrics = await sidecar.metrics()
    assert metrics.value("pgsidecar_pool_connections_max", pool="*") == 3
    assert metrics.value("pgsidecar_up", pool="*") == 1
    assert metrics.total("pgsidecar_connections_opened_total") == 0
    assert pools(sidecar) == []


# -- the budget ------------------------------------------------------------------------------------


async def test_all_pools_together_stay_within_the_budget(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """40 busy clients in 20 databases on 5 connections: all are served, and PostgreSQL never sees
    a sixth."""
    sidecar = await make_templates({"tenant_*": {"dsn": at(tenants), "max_size": 5}})
    end = time.monotonic() + 4
    done = [0] * (2 * TENANTS)

    async def psycopg_client(number: int) -> None:
        name = f"tenant_{number % TENANTS}"
        dsn = sidecar.dsn(user=name, database=name)
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
            while time.monotonic() < end:
                assert await (await conn.execute(WHO)).fetchone() == (name, name)
                done[number] += 1

    async def asyncpg_client(number: int) -> None:
        name = f"tenant_{number % TENANTS}"
        client = await asyncpg.connect(sidecar.dsn(user=name, database=name))
        while time.monotonic() < end:
            async with client.transaction():
                assert tuple(await client.fetchrow(WHO)) == (name, name)
            done[number] += 1
        await client.close()

    with watched(tenants) as counts:
        async with asyncio.TaskGroup() as group:
            for number in range(TENANTS):
                group.create_task(psycopg_client(number))
                group.create_task(asyncpg_client(TENANTS + number))
    assert len(counts) > 50
    assert max(counts) == 5
    assert min(done) > 0, f"some are not served: {done}"
    metrics = await sidecar.metrics()
    assert metrics.errors == {}
    assert metrics.total("pgsidecar_connections_closed_total", reason="budget") > 0
    assert metrics.value("pgsidecar_pool_connections_used_peak", pool="tenant_*", window="1m") == 5
    assert metrics.value("pgsidecar_pool_connections", pool="tenant_*", state="used") == 0


async def test_two_templates_have_a_budget_each(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """One that is used up is no burden for the other."""
    sidecar = await make_templates(
        {
            "tenant_1*": {"dsn": at(tenants), "max_size": 1},
            "tenant_2*": {"dsn": at(tenants), "max_size": 1},
        },
    )
    dsn = sidecar.dsn(user="tenant_1", database="tenant_1")
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute("SELECT 1")
        client = await asyncpg.connect(sidecar.dsn(user="tenant_2", database="tenant_2"))
        assert await client.fetchval("SELECT 1") == 1
        await client.close()


async def test_an_idle_connection_of_another_pool_makes_room(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """Who waits does not wait for ``idle_timeout``."""
    sidecar = await make_templates({"*": {"dsn": at(tenants), "max_size": 2}})
    clients = []
    began = time.monotonic()
    for number in range(6):
        name = f"tenant_{number}"
        client = await asyncpg.connect(sidecar.dsn(user=name, database=name))
        assert tuple(await client.fetchrow(WHO)) == (name, name)
        clients.append(client)
    assert time.monotonic() - began < 5
    assert len(pools(sidecar)) == 6
    for client in clients:
        assert await client.fetchval("SELECT 1") == 1
        await client.close()


async def test_a_login_for_which_there_is_no_room_is_told_so(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """53300 with the limit, at its deadline, not that the server cannot be reached."""
    sidecar = await make_templates(
        {"*": {"dsn": at(tenants), "max_size": 1, "acquire_timeout": "300ms"}}, login_timeout="1s"
    )
    dsn = sidecar.dsn(user="tenant_1", database="tenant_1")
    other = await asyncpg.connect(sidecar.dsn(user="tenant_2", database="tenant_2"))
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute("SELECT 1")
        with pytest.raises(asyncpg.exceptions.TooManyConnectionsError) as login:
            await asyncpg.connect(sidecar.dsn(user="tenant_3", database="tenant_3"))
        with pytest.raises(asyncpg.exceptions.TooManyConnectionsError) as query:
            await other.fetchval("SELECT 1")
        await holder.commit()
    assert login.value.hint == "The limit is max_size (1)."
    assert "All pools of template '*' have 1 of 1" in str(query.value.detail)
    assert await other.fetchval("SELECT 1") == 1
    await other.close()
    assert ("tenant_3", "tenant_3") not in pools(sidecar)


# -- pools go again --------------------------------------------------------------------------------


@pytest.mark.parametrize("min_idle", [0, 1])
async def test_a_pool_goes_after_its_clients_and_connections(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates, min_idle: int
) -> None:
    """The connections by ``idle_timeout``, even those that ``min_idle`` kept; then all else."""
    sidecar = await make_templates(
        {"*": {"dsn": at(tenants), "idle_timeout": "400ms", "min_idle": min_idle}}
    )
    client = await asyncpg.connect(sidecar.dsn(user="tenant_1", database="tenant_1"))
    await client.fetchval("SELECT 1")
    (pool,) = sidecar.service.directory
    if min_idle:
        await asyncio.sleep(1)
        assert pool.state.idle
    else:
        await come_true(lambda: not pool.state.size, "its connection is closed")
        assert pools(sidecar) == [("tenant_1", "tenant_1")]
        assert await client.fetchval("SELECT 1") == 1
    await client.close()
    assert pools(sidecar) == [("tenant_1", "tenant_1")]
    await come_true(lambda: not pools(sidecar), "the pool is gone")
    assert not pool.state.size


async def test_pools_that_come_and_go_leave_nothing_behind(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """400 pairs of database and user in turn: no pool, no table, no metric is left of any."""
    sidecar = await make_templates(
        {"*": {"dsn": at(tenants), "max_size": 10, "idle_timeout": "50ms"}}
    )
    lines = len(_of_pools(await sidecar.metrics()))
    rng = random.Random(1)
    pairs = [(f"tenant_{a}", f"tenant_{b}") for a in range(TENANTS) for b in range(TENANTS)]
    rng.shuffle(pairs)
    seen: list[weakref.ref[Any]] = []

    async def visit(database: str, user: str) -> None:
        client = await asyncpg.connect(sidecar.dsn(user=user, database=database))
        assert tuple(await client.fetchrow(f"{WHO} WHERE $1 = 1", 1)) == (database, user)
        await client.execute(f"SET application_name = '{database}'")
        seen.extend(weakref.ref(pool.opener) for pool in sidecar.service.directory)
        await client.close()

    for begin in range(0, len(pairs), 20):
        await asyncio.gather(*(visit(*pair) for pair in pairs[begin : begin + 20]))
    await come_true(lambda: not pools(sidecar), "all pools are gone")
    gc.collect()
    assert len(seen) >= 400
    assert not any(ref() for ref in seen)
    assert len(_of_pools(await sidecar.metrics())) == lines


def _of_pools(metrics: Metrics) -> list[str]:
    """The lines about pools, but for those of statements and applications, which are bounded by tables
    of their own."""
    lines = metrics.text.splitlines()
    return [line for line in lines if 'pool="' in line and not line.startswith(_BOUNDED)]


_BOUNDED = ("pgsidecar_statement_", "pgsidecar_blamed_wait_", "pgsidecar_pool_connections_held")


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "database", "sqlstate", "message"),
    [
        ("tenant_1", "tenant_none", "3D000", 'database "tenant_none" does not exist'),
        ("tenant_none", "tenant_1", "28000", 'role "tenant_none" does not exist'),
    ],
)
async def test_what_the_server_refuses_is_told_at_once_and_kept_nowhere(
    tenants: EmbeddedPostgres,
    make_templates: MakeTemplates,
    user: str,
    database: str,
    sqlstate: str,
    message: str,
) -> None:
    """In the server's words; no pool is left of it, and nobody else has to wait."""
    sidecar = await make_templates({"*": {"dsn": at(tenants), "max_size": 2}})
    began = time.monotonic()
    for _ in range(10):
        with pytest.raises(asyncpg.PostgresError, match=message) as caught:
            await asyncpg.connect(sidecar.dsn(user=user, database=database))
        assert caught.value.sqlstate == sqlstate
        assert pools(sidecar) == []
    client = await asyncpg.connect(sidecar.dsn(user="tenant_1", database="tenant_1"))
    assert await client.fetchval("SELECT 1") == 1
    await client.close()
    assert time.monotonic() - began < 5
    metrics = await sidecar.metrics()
    assert metrics.value("pgsidecar_up", pool="*") == 1


async def test_a_name_that_no_template_matches_is_not_the_server_s_matter(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    sidecar = await make_templates({"tenant_*": {"dsn": at(tenants)}})
    with pytest.raises(asyncpg.InvalidCatalogNameError) as caught:
        await asyncpg.connect(sidecar.dsn(user="tenant_1", database="postgres"))
    assert caught.value.hint == "The pools are: tenant_*."
    assert (await sidecar.metrics()).total("pgsidecar_connection_errors_total") == 0


async def test_a_server_that_is_not_there_is_waited_for_and_told(
    make_templates: MakeTemplates, unused_tcp_port: int
) -> None:
    """Until the login's deadline; the template counts as down so long, and leaves no pool."""
    dsn = f"host=127.0.0.1 port={unused_tcp_port}"
    sidecar = await make_templates({"*": {"dsn": dsn}}, login_timeout="1500ms")
    login = asyncio.create_task(asyncpg.connect(sidecar.dsn(user="u", database="d")))
    await sidecar.until(lambda now: now.value("pgsidecar_up", pool="*") == 0)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await login
    assert caught.value.sqlstate == "08001"
    await come_true(lambda: not pools(sidecar), "its last attempt is over")
    assert await asyncio.to_thread(sidecar.get, "/readyz") == (200, "ok\n")


# -- logins ----------------------------------------------------------------------------------------


@pytest.fixture
def guarded(own_postgres: MakePostgres) -> EmbeddedPostgres:
    """A server that asks for passwords by SCRAM: users alice and bob, databases of their names."""
    server = own_postgres(auth="scram-sha-256")
    for name in ("alice", "bob"):
        server.psql(f"CREATE DATABASE {name}; CREATE ROLE {name} LOGIN PASSWORD '{name}-secret';")
    return server


def verifier_of(server: EmbeddedPostgres, user: str) -> str:
    return server.psql(f"SELECT rolpassword FROM pg_authid WHERE rolname = '{user}'")


def as_user(sidecar: ServiceHere, user: str, password: str | None = None) -> str:
    where = f"127.0.0.1:{sidecar.pg_port}/{user}"
    return f"postgresql://{user}:{password or f'{user}-secret'}@{where}"


async def test_who_proves_a_verifier_s_password_logs_in_to_the_server_with_it(
    guarded: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """Pass-through: no password is known here, only what pg_authid has."""
    users: dict[str, dict[str, object]] = {
        name: {"verifier": verifier_of(guarded, name)} for name in ("alice", "bob")
    }
    sidecar = await make_templates({"*": {"dsn": at(guarded), "max_size": 3}}, users)
    for name in ("alice", "bob"):
        client = await asyncpg.connect(as_user(sidecar, name))
        assert tuple(await client.fetchrow(WHO)) == (name, name)
        await client.close()
        dsn = as_user(sidecar, name)
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            assert await (await conn.execute(WHO)).fetchone() == (name, name)


async def test_a_wrong_password_makes_no_pool(
    guarded: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """Names of databases come from strangers: nothing is made or asked for before the password."""
    users: dict[str, dict[str, object]] = {"alice": {"verifier": verifier_of(guarded, "alice")}}
    sidecar = await make_templates({"*": {"dsn": at(guarded)}}, users)
    for user in ("alice", "nobody"):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(as_user(sidecar, user, "wrong"))
    assert pools(sidecar) == []
    assert (await sidecar.metrics()).total("pgsidecar_connection_errors_total") == 0


async def test_a_verifier_with_another_salt_is_refused_with_a_hint(
    guarded: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """The proof of one is not the proof of the other, though the password is right."""
    old = verifier_of(guarded, "alice")
    guarded.psql("ALTER ROLE alice PASSWORD 'alice-secret'")
    sidecar = await make_templates({"*": {"dsn": at(guarded)}}, {"alice": {"verifier": old}})
    with pytest.raises(asyncpg.InvalidPasswordError) as caught:
        await asyncpg.connect(as_user(sidecar, "alice"))
    assert "verifier" in str(caught.value.hint)
    assert pools(sidecar) == []


async def test_passwords_of_the_configuration_log_in_to_the_server(
    guarded: EmbeddedPostgres, make_templates: MakeTemplates, tmp_path: Path
) -> None:
    """In the file, and in a file of its own."""
    secret = tmp_path / "secret"
    secret.write_text("bob-secret\n")
    sidecar = await make_templates(
        {"*": {"dsn": at(guarded)}},
        {"alice": {"password": "alice-secret"}, "bob": {"password_file": str(secret)}},
    )
    for name in ("alice", "bob"):
        client = await asyncpg.connect(as_user(sidecar, name))
        assert tuple(await client.fetchrow(WHO)) == (name, name)
        await client.close()


async def test_a_user_without_a_secret_is_told_that_the_server_wants_one(
    guarded: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    sidecar = await make_templates({"*": {"dsn": at(guarded)}})
    with pytest.raises(asyncpg.InvalidPasswordError, match="asks for a password") as caught:
        await asyncpg.connect(sidecar.dsn(user="alice", database="alice"))
    assert "users" in str(caught.value.hint)


async def test_the_last_proven_secret_opens_the_next_connections(
    guarded: EmbeddedPostgres, make_templates: MakeTemplates, tmp_path: Path
) -> None:
    """After the password has been changed, one new login is enough for those who stayed."""
    secret = tmp_path / "secret"
    secret.write_text("alice-secret\n")
    sidecar = await make_templates(
        {"*": {"dsn": at(guarded), "idle_timeout": "200ms"}},
        {"alice": {"password_file": str(secret)}},
    )
    stayed = await asyncpg.connect(as_user(sidecar, "alice"))
    guarded.psql("ALTER ROLE alice PASSWORD 'new'")
    (pool,) = sidecar.service.directory
    await come_true(lambda: not pool.state.size, "no connection is left")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await stayed.fetchval("SELECT 1")
    secret.write_text("new\n")
    newcomer = await asyncpg.connect(as_user(sidecar, "alice", "new"))
    assert await newcomer.fetchval("SELECT 1") == 1
    assert await stayed.fetchval("SELECT 1") == 1
    assert list(sidecar.service.directory) == [pool]
    await newcomer.close()
    await stayed.close()


async def test_secrets_are_not_in_the_log(
    guarded: EmbeddedPostgres,
    make_templates: MakeTemplates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither a password nor a key, whatever is printed."""
    caplog.set_level("DEBUG")
    users: dict[str, dict[str, object]] = {
        "alice": {"verifier": verifier_of(guarded, "alice")},
        "bob": {"password": "bob-secret"},
    }
    sidecar = await make_templates({"*": {"dsn": at(guarded)}}, users)
    clients = [await asyncpg.connect(as_user(sidecar, name)) for name in ("alice", "bob")]
    targets = [pool.target for pool in sidecar.service.directory]
    keys = next(target.scram_keys for target in targets if target.scram_keys is not None)
    shown = "".join(map(repr, (*sidecar.service.directory, *targets, keys)))
    shown += "".join(str(vars(record)) for record in caplog.records)
    assert "bob-secret" not in shown
    assert repr(keys.client_key) not in shown
    assert keys.client_key.hex() not in shown
    for client in clients:
        await client.close()


def test_a_configuration_with_a_template_is_redacted(tenants: EmbeddedPostgres) -> None:
    from sidecar.config import redacted

    config = parse(json.dumps({"pools": {"*": {"dsn": at(tenants)}}}), {}, "test")
    shown = redacted(config)["pools"]
    assert isinstance(shown, dict)
    assert shown["*"]["database"] == shown["*"]["user"] == "the client's"
    assert shown["*"]["dsn"] == "***"


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (
            "",
            "as each user to each database at {where}\n      PostgreSQL: it answers; databases and",
        ),
        (
            "dbname=alice",
            "as each user to alice at {where}\n      PostgreSQL: it answers; databases",
        ),
        (
            "user=alice password=alice-secret",
            "as alice to each database at {where}\n      PostgreSQL 1",
        ),
        ("user=alice password=wrong", "FAIL  pool t*: transaction mode"),
    ],
)
async def test_check_tells_of_a_template_what_can_be_known(
    guarded: EmbeddedPostgres, parts: str, line: str
) -> None:
    """That the server answers; and of a user of the dsn, whether its password is right."""
    config = parse(json.dumps({"pools": {"t*": {"dsn": f"{at(guarded)} {parts}"}}}), {}, "test")
    findings = await check.check(config)
    told = check.report(config, findings, check.check_tls(config.listen))
    assert line.format(where=f"127.0.0.1:{guarded.port}") in told
    assert findings[0].is_ok == ("FAIL" not in line)


async def test_check_of_a_template_without_a_server(unused_tcp_port: int) -> None:
    text = json.dumps({"pools": {"t*": {"dsn": f"host=127.0.0.1 port={unused_tcp_port}"}}})
    (finding,) = await check.check(parse(text, {}, "test"))
    assert finding.problem == "connection refused"


async def test_log_ins_by_the_hundred_share_few_connections(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """A crowd that comes at once, over all databases, with one connection for all."""
    sidecar = await make_templates({"*": {"dsn": at(tenants), "max_size": 1}})

    async def visit(number: int) -> None:
        name = f"tenant_{number % TENANTS}"
        client = await asyncpg.connect(sidecar.dsn(user=name, database=name))
        assert tuple(await client.fetchrow(WHO)) == (name, name)
        await client.close()

    with watched(tenants) as counts:
        await asyncio.gather(*(visit(number) for number in range(100)))
    assert max(counts) == 1
    await asyncio.sleep(POLL)


async def test_a_login_whose_template_a_reload_has_removed_is_refused(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """It had found the template before it proved who it is; that takes a while."""
    sidecar = await make_templates({"*": {"dsn": at(tenants)}, "other*": {"dsn": at(tenants)}})
    directory, before = sidecar.service.directory, sidecar.service.config.pools["*"]
    text = json.dumps({"pools": {"other*": {"dsn": at(tenants)}}})
    directory.reconfigure(parse(text, {}, "test"), time.monotonic())
    with pytest.raises(SidecarError) as caught:
        directory.enter(before, Login("tenant_1", "tenant_1"), object())
    assert caught.value.sqlstate == "3D000"


# -- why -------------------------------------------------------------------------------------------


async def test_who_waits_already_in_login_is_one_who_waits(
    tenants: EmbeddedPostgres, make_templates: MakeTemplates
) -> None:
    """One tenant has all connections, and leaves them idle in transactions; another's first client
    cannot log in before there is one for it."""
    sidecar = await make_templates({"tenant_*": {"dsn": at(tenants), "max_size": 2}})
    dsn = sidecar.dsn("tenant_1", "tenant_1", application_name="greedy")
    greedy = [await psycopg.AsyncConnection.connect(dsn) for _ in range(2)]
    for conn in greedy:
        await conn.execute("SELECT 1")
    late = asyncio.create_task(psycopg.AsyncConnection.connect(sidecar.dsn("tenant_2", "tenant_2")))

    recorder = sidecar.service.recorder.pool("tenant_*")
    verdict = await come_true(
        lambda: next(
            (
                found
                for found in [recorder.verdict(time.monotonic())]
                if found.kind is not Kind.HEALTHY
            ),
            None,
        ),
        "it is told",
    )
    assert (verdict.kind, verdict.application) == (Kind.LEAK, "greedy")
    assert verdict.headline.endswith("1 client waits.")
    assert any("1 of them in login" in sentence for sentence in verdict.evidence)
    for conn in greedy:
        await conn.close()
    await (await late).close()
