"""The console: what its commands say, who may say them, and which drivers and which bytes it bears."""

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import asyncpg
import psycopg
import pytest

from sidecar import __version__
from sidecar.console import commands, rows
from sidecar.console.commands import Command, Verb
from sidecar.console.facts import Averages
from sidecar.errors import SidecarError
from sidecar.events import PinReason
from sidecar.facts import PoolFacts, Totals
from sidecar.protocol import messages as m
from tests.sidecar_process import PATIENCE, environment
from tests.wire import (
    SYNC,
    Client,
    Sidecar,
    bind,
    close,
    describe,
    error,
    execute,
    kinds,
    parse,
    query,
    run,
    startup,
)

Row = dict[str, str | None]

CONSOLE = {"admin_users": ["admin"], "stats_users": ["stats"]}


@pytest.fixture
def sidecar(postgres) -> Iterator[Sidecar]:
    with Sidecar(postgres, console=CONSOLE, max_size=2, min_idle=0, acquire_timeout="20s") as it:
        yield it


@pytest.fixture
def admin(sidecar: Sidecar) -> Client:
    return sidecar.login("admin", "pgsidecar")


def table(client: Client, sql: str) -> list[Row]:
    """The rows of a command, by column."""
    messages = client.ask(query(sql))
    (head,) = [each for each in messages if each.kind == "T"]
    names = columns(head.body)
    return [
        {
            name: None if value is None else value.decode()
            for name, value in zip(names, each.columns, strict=True)
        }
        for each in messages
        if each.kind == "D"
    ]


def columns(body: bytes) -> list[str]:
    """The names in a RowDescription."""
    names = []
    rest = body[2:]
    while rest:
        name, _, rest = rest.partition(b"\0")
        names.append(name.decode())
        rest = rest[18:]
    return names


def one(client: Client, sql: str, **where: str) -> Row:
    """The one row that has these values."""
    (found,) = [row for row in table(client, sql) if where.items() <= row.items()]
    return found


# -- the language ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SHOW POOLS", Command(Verb.SHOW, "POOLS")),
        ("show\n pools ;", Command(Verb.SHOW, "POOLS")),
        ("-- who\nSHOW /* all */ clients", Command(Verb.SHOW, "CLIENTS")),
        ("show", Command(Verb.SHOW, "HELP")),
        ("SHOW client_encoding", Command(Verb.SHOW, "CLIENT_ENCODING")),
        ("PAUSE", Command(Verb.PAUSE)),
        ("pause main", Command(Verb.PAUSE, "main")),
        ('PAUSE "Main"', Command(Verb.PAUSE, "Main")),
        ("KILL 'main'", Command(Verb.KILL, "main")),
        ("KILL_CLIENT 12", Command(Verb.KILL_CLIENT, "12")),
        ("SHUTDOWN", Command(Verb.SHUTDOWN)),
        ("shutdown wait_for_clients", Command(Verb.SHUTDOWN, "WAIT_FOR_CLIENTS")),
        ("SET max_client_conn = 5", Command(Verb.SET, "max_client_conn")),
        ("START TRANSACTION", Command(Verb.BEGIN)),
    ],
)
def test_commands_are_read(text, expected):
    (words,) = commands.split(text)
    assert commands.parse(words) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("SHWO POOLS", "Did you mean SHOW?"),
        ("SHOW POOL", "Did you mean SHOW POOLS?"),
        ("SHOW CLIENTS NOW", "SHOW HELP"),
        ("RESUM", "Did you mean RESUME?"),
        ("PAUSE a b", "Did you mean PAUSE [<db>]?"),
        ("KILL", "Did you mean KILL <db>?"),
        ("KILL_CLIENT me", "Did you mean KILL_CLIENT <client_id>?"),
        ("SHUTDOWN NOW", "WAIT_FOR_SERVERS"),
        ("RELOAD main", "Did you mean RELOAD?"),
        ("SELECT 1", "SHOW HELP lists all commands."),
        ("SHOW 'POOLS", "SHOW HELP lists all commands."),
    ],
)
def test_what_is_no_command_is_a_syntax_error_with_a_hint(text, hint):
    with pytest.raises(SidecarError) as caught:
        commands.parse(commands.split(text)[0])
    assert caught.value.sqlstate == "42601"
    assert hint in caught.value.hint


def test_every_word_of_show_has_a_table_or_a_reason(admin):
    """None is listed in the help and then unknown."""
    for what in commands.SHOWN:
        found = kinds(admin.ask(query(f"SHOW {what}")))
        assert found[-1] == "Z"
        assert found.startswith({"HELP": "NC", "FDS": "E"}.get(what, "T")), what


# -- what it shows ---------------------------------------------------------------------------------


def test_a_client_and_its_server_connection_are_told(sidecar, admin):
    """Who holds what: client and server name each other, as PgBouncer's ``ptr`` and ``link`` do."""
    client = sidecar.login("app", application_name="shop")
    client.ask(query("BEGIN"))
    pid = client.value("SELECT pg_backend_pid()")
    shown = one(admin, "SHOW CLIENTS", user="app")
    server = one(admin, "SHOW SERVERS", state="active")
    told = (shown["state"], shown["application_name"], shown["database"])
    assert told == ("active", "shop", "main")
    host, port = client.socket.getsockname()
    assert (shown["addr"], shown["port"]) == (host, str(port))
    assert (shown["link"], server["link"]) == (server["ptr"], shown["ptr"])
    assert server["remote_pid"] == pid
    assert server["application_name"] == "shop"
    client.ask(query("COMMIT"))
    assert one(admin, "SHOW CLIENTS", user="app")["state"] == "idle"
    assert one(admin, "SHOW CLIENTS", user="admin")["database"] == "pgsidecar"


def test_pools_show_who_is_active_idle_and_waiting(sidecar, admin):
    clients = [sidecar.login() for _ in range(4)]
    for client in clients[:2]:
        client.ask(query("BEGIN"))
    clients[2].send(query("SELECT 1"))
    sidecar.until(lambda: sidecar.pool.state.waiters, "one waits")
    pool = one(admin, "SHOW POOLS", database="main")
    assert (pool["cl_active"], pool["cl_waiting"]) == ("3", "1")  # PgBouncer calls idle ones active
    assert (pool["sv_active"], pool["sv_idle"], pool["pool_mode"]) == ("2", "0", "transaction")
    waits = one(admin, "SHOW CLIENTS", state="waiting")
    assert waits["id"] == one(admin, "SHOW WAITS")["client"]
    assert one(admin, "SHOW POOLS", database="pgsidecar")["cl_active"] == "1"


def test_waits_say_behind_whom_and_why(sidecar, admin):
    """Who waits first is first, and the oldest lease is named first."""
    holders = [sidecar.login(application_name=f"holder {n}") for n in range(2)]
    for holder in holders:
        holder.ask(query("BEGIN"))
    waiters = [sidecar.login(application_name=f"waiter {n}") for n in range(2)]
    for n, waiter in enumerate(waiters, 1):
        waiter.send(query("SELECT 1"))
        sidecar.until(lambda n=n: len(sidecar.pool.state.waiters) == n, f"{n} wait")
    ids = {row["application_name"]: row["id"] for row in table(admin, "SHOW CLIENTS")}
    first, second = table(admin, "SHOW WAITS")
    assert (first["application_name"], first["ahead"]) == ("waiter 0", "0")
    assert (second["application_name"], second["ahead"]) == ("waiter 1", "1")
    assert first["behind"] == f"{ids['holder 0']},{ids['holder 1']}"
    assert first["reason"] == "2 of 2 connections in use"
    assert 0 < int(first["timeout_us"] or 0) <= 20_000_000
    holders[0].ask(query("COMMIT"))
    waiters[0].until_ready()
    waiters[1].until_ready()
    assert table(admin, "SHOW WAITS") == []


def test_waits_say_that_the_server_has_no_room(postgres):
    """Fewer connections than ``max_size``: the reason is not that they are in use."""
    postgres.psql("CREATE ROLE narrow LOGIN CONNECTION LIMIT 1")
    try:
        dsn = postgres.dsn(user="narrow")
        with Sidecar(postgres, console=CONSOLE, dsn=dsn, max_size=3, min_idle=0) as sidecar:
            admin, holder, waiter = (
                sidecar.login("admin", "pgsidecar"),
                sidecar.login(),
                sidecar.login(),
            )
            holder.ask(query("BEGIN"))
            waiter.send(query("SELECT 1"))
            sidecar.until(lambda: sidecar.pool.opener.is_kept_small, "the server refuses")
            reason = one(admin, "SHOW WAITS")["reason"] or ""
            assert reason.startswith("1 of 3 connections in use")
            assert reason.endswith(
                'another cannot be opened: too many connections for role "narrow"'
            )
    finally:
        postgres.psql("DROP ROLE narrow")


def test_holders_say_what_they_do(sidecar, admin):
    idle, busy = sidecar.login("one"), sidecar.login("two")
    idle.ask(query("BEGIN"))
    busy.send(query("SELECT pg_sleep(20)"))
    sidecar.until(lambda: len(sidecar.pool.state.active) == 2, "both have a connection")
    first, second = table(admin, "SHOW HOLDERS")
    assert (first["user"], first["state"], first["query_us"]) == (
        "one",
        "idle in transaction",
        None,
    )
    assert (second["user"], second["state"], second["silent_us"]) == (
        "two",
        "running a query",
        None,
    )
    assert int(second["query_us"] or 0) > 0
    busy.cancel()


def test_pins_show_the_reason_and_go_with_it(sidecar, admin):
    client = sidecar.login("app", application_name="shop")
    client.ask(query("LISTEN news"))
    sidecar.until(lambda: sidecar.pool.snapshot(0.0).pinned[PinReason.LISTEN], "it is pinned")
    pin = one(admin, "SHOW PINS")
    assert (pin["user"], pin["application_name"], pin["reason"]) == ("app", "shop", "listen")
    assert pin["server"] == one(admin, "SHOW SERVERS", state="active")["id"]
    assert one(admin, "SHOW HOLDERS")["pin"] == "listen"
    client.ask(query("UNLISTEN *"))
    sidecar.until(lambda: not sidecar.pool.state.active, "the lease is over")
    assert table(admin, "SHOW PINS") == []


def test_a_client_in_session_mode_is_a_pin(postgres):
    with Sidecar(postgres, console=CONSOLE, mode="session", min_idle=0) as sidecar:
        client = sidecar.login()
        client.value("SELECT 1")
        assert one(sidecar.login("stats", "pgsidecar"), "SHOW PINS")["reason"] == "session_mode"


def test_statistics_count_what_the_pool_did(sidecar, admin):
    client = sidecar.login()
    for _ in range(3):
        client.value("SELECT pg_sleep(0.01)")
    stats = one(admin, "SHOW STATS", database="main")
    assert (stats["total_xact_count"], stats["total_query_count"]) == ("3", "3")
    assert stats["total_server_assignment_count"] == "3"
    assert 30_000 <= int(stats["total_query_time"] or 0) < 3_000_000  # microseconds
    assert int(stats["avg_query_time"] or 0) >= 10_000
    sent = 3 * len(query("SELECT pg_sleep(0.01)"))
    assert stats["total_received"] == str(sent)
    totals = {row["name"]: row["value"] for row in table(admin, "SHOW TOTALS")}
    assert totals["total_query_count"] == "3"
    assert totals["total_client_bytes"] == str(sent)
    assert one(admin, "SHOW STATS_TOTALS")["query_count"] == "3"


def test_averages_are_those_of_the_last_full_period(sidecar):
    """Before the first one is over, since the start."""
    (facts,) = sidecar.call(sidecar.operations.pools)
    assert isinstance(facts, PoolFacts)

    def with_queries(count: int) -> PoolFacts:
        return replace(facts, totals=Totals(queries=count))

    averages = Averages(100.0)
    assert averages.of(with_queries(30), 110.0) == (Totals(queries=30), 10.0)
    averages.tick(160.0, lambda: [with_queries(30)])
    averages.tick(200.0, lambda: [with_queries(50)])  # not yet
    averages.tick(220.0, lambda: [with_queries(90)])
    assert averages.of(with_queries(1000), 230.0) == (Totals(queries=60), 60.0)


def test_configuration_is_shown_without_secrets(postgres):
    users = {"admin": "hunter2", "other": "secret-of-other"}
    with Sidecar(postgres, console=CONSOLE, users=users) as sidecar:
        admin = sidecar.login("admin", "pgsidecar")
        text = str(table(admin, "SHOW CONFIG"))
        shown = {row["key"]: row for row in table(admin, "SHOW CONFIG")}
    assert "hunter2" not in text
    assert "secret-of-other" not in text
    assert postgres.dsn() not in text
    assert shown["pools.main.max_size"] == {
        "key": "pools.main.max_size",
        "value": "25",
        "default": "25",
        "changeable": "yes",
    }
    assert shown["listen.port"]["changeable"] == "no"
    assert shown["admin_users"]["value"] == "admin"


def test_lists_users_databases_state_and_version(sidecar, admin):
    sidecar.login().value("SELECT 1")
    lists = {row["list"]: row["items"] for row in table(admin, "SHOW LISTS")}
    assert (lists["databases"], lists["used_clients"], lists["used_servers"]) == ("2", "2", "1")
    assert one(admin, "SHOW USERS", name="app")["current_client_connections"] == "1"
    database = one(admin, "SHOW DATABASES", name="main")
    assert (database["pool_size"], database["paused"], database["disabled"]) == ("2", "0", "0")
    assert database["port"] == str(sidecar.pool.config.target.hosts[0].port)
    assert one(admin, "SHOW STATE", key="active")["value"] == "yes"
    assert one(admin, "SHOW VERSION")["version"] == f"pgsidecar {__version__}"


def test_help_is_a_notice(admin):
    notice, done, _ = admin.ask(query("SHOW HELP"))
    assert notice.fields["M"] == "Console usage"
    assert "KILL_CLIENT <client_id>" in notice.fields["D"]
    assert done.body == b"SHOW\0"


# -- who may -----------------------------------------------------------------------------------


def refused(sidecar: Sidecar, user: str) -> dict[str, str]:
    client = sidecar.connect()
    client.send(startup({"user": user, "database": "pgsidecar"}))
    return error(client.until_closed())


def test_others_may_not_use_it(sidecar):
    found = refused(sidecar, "app")
    assert (found["S"], found["C"]) == ("FATAL", "28000")
    assert "console.admin_users" in found["H"]


def test_without_users_named_nobody_may(postgres):
    with Sidecar(postgres) as sidecar:
        assert refused(sidecar, "app")["C"] == "28000"


def test_users_of_the_console_prove_who_they_are(postgres):
    listen = {"auth": "scram-sha-256"}
    users = {"stats": "right"}
    with Sidecar(postgres, console=CONSOLE, listen=listen, users=users) as sidecar:

        def version(password: str) -> object:
            dsn = f"host=127.0.0.1 port={sidecar.port} dbname=pgsidecar user=stats"
            with psycopg.connect(dsn, password=password, autocommit=True) as conn:
                return conn.execute("SHOW VERSION").fetchone()

        assert version("right") == (f"pgsidecar {__version__}",)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            version("wrong")


@pytest.mark.parametrize(
    "command", ["PAUSE", "RESUME", "RELOAD", "KILL main", "SHUTDOWN", "KILL_CLIENT 1", "SUSPEND"]
)
def test_stats_users_may_only_look(sidecar, command):
    stats = sidecar.login("stats", "pgsidecar")
    found = error(stats.ask(query(command)))
    assert found["C"] == "42501"
    assert len(table(stats, "SHOW POOLS")) == 2


def test_a_full_sidecar_can_be_looked_at(postgres):
    """Places beyond ``max_clients`` are kept: when nobody gets in is when one wants to look."""
    with Sidecar(postgres, console=CONSOLE, listen={"max_clients": 1}) as sidecar:
        sidecar.login()
        with pytest.raises(AssertionError, match="too many clients"):
            sidecar.login()
        consoles = [sidecar.login("stats", "pgsidecar") for _ in range(10)]
        assert one(consoles[-1], "SHOW LISTS", list="used_clients")["items"] == "11"
        with pytest.raises(AssertionError, match="too many clients"):
            sidecar.login("stats", "pgsidecar")


def test_pgbouncer_s_name_of_the_console_is_known_too(sidecar, postgres):
    """Programs have it built in. A pool of that name is meant first."""
    assert len(table(sidecar.login("stats", "pgbouncer"), "SHOW POOLS")) == 2
    with Sidecar(pools={"pgbouncer": {"dsn": postgres.dsn()}}, console=CONSOLE) as other:
        assert other.login("stats", "pgbouncer").value("SELECT 1") == "1"


# -- programs and drivers --------------------------------------------------------------------------


def test_psql_reads_it(sidecar, postgres):
    done = subprocess.run(
        [postgres.bin_dir / "psql", "-XqAt", "-d", sidecar.dsn("admin", "pgsidecar")],
        input="SHOW VERSION;\nSHOW STATE; SHOW VERSION;\n\\d\nSHOW VERSION;\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
        check=True,
    )
    version = f"pgsidecar {__version__}"
    assert done.stdout.splitlines() == [
        *(version, "active|yes", "paused|no", "suspended|no", version, version)
    ]
    assert "invalid command" in done.stderr  # \d


def test_psycopg_reads_it_in_a_transaction_and_outside(sidecar):
    with psycopg.connect(sidecar.dsn("admin", "pgsidecar")) as conn:
        assert conn.execute("SHOW VERSION").fetchone() == (f"pgsidecar {__version__}",)
        conn.commit()
        for _ in range(8):  # then it prepares
            pools = conn.execute("SHOW POOLS").fetchall()
            assert [pool[0] for pool in pools] == ["main", "pgsidecar"]
        cursor = conn.cursor(binary=True)
        cursor.execute("SHOW TOTALS")
        assert all(value is not None for _, value in cursor.fetchall())


async def test_asyncpg_reads_it(sidecar):
    """It prepares, and wants every number in binary."""
    conn = await asyncpg.connect(sidecar.dsn("admin", "pgsidecar"))
    try:
        (row,) = [row for row in await conn.fetch("SHOW POOLS") if row["database"] == "main"]
        assert (row["cl_active"], row["pool_mode"]) == (0, "transaction")
        stats = await conn.fetchrow("SHOW STATS")
        assert stats["total_query_count"] == 0
        async with conn.transaction():
            assert await conn.fetchval("SHOW VERSION") == f"pgsidecar {__version__}"
    finally:
        await conn.close()


@pytest.mark.parametrize("value", [0, 1, -1, 9999, 10_000, 123_456_789_012, -40_000, 10**15])
def test_numeric_is_written_in_binary_as_postgres_does(postgres, value):
    with psycopg.connect(postgres.dsn()) as conn:
        cursor = conn.cursor(binary=True)
        cursor.execute(f"SELECT {value}::numeric")
        assert cursor.pgresult is not None
        expected = cursor.pgresult.get_value(0, 0) or b""
    (column,) = rows.columns("x:numeric")
    row = rows.data_row([column], [value], [1])
    assert row[-len(expected) :] == expected
    assert struct.unpack("!i", row[7:11]) == (len(expected),)


def test_two_commands_in_one_query(admin):
    assert kinds(admin.ask(query("SHOW VERSION; SHOW STATE; SHOW HELP"))) == "TDCTDDDCNCZ"
    assert kinds(admin.ask(query("SHOW VERSION; SHWO; SHOW STATE"))) == "TDCEZ"
    assert kinds(admin.ask(query(" ; -- nothing"))) == "IZ"


def test_extended_protocol(admin):
    assert kinds(admin.ask(run("SHOW VERSION"))) == "12TDCZ"
    assert kinds(admin.ask(run("SHOW HELP"))) == "12nNCZ"
    assert kinds(admin.ask(run(""))) == "12nIZ"
    named = parse("SHOW STATE", "s") + describe("S", "s") + SYNC
    assert kinds(admin.ask(named)) == "1tTZ"
    limited = bind(name="s", portal="p") + execute(2, "p") + execute(2, "p") + SYNC
    assert kinds(admin.ask(limited)) == "2DDsDCZ"
    assert kinds(admin.ask(close("S", "s") + SYNC)) == "3Z"
    assert error(admin.ask(bind(name="s") + SYNC))["C"] == "26000"


def test_an_error_skips_to_sync(admin):
    found = admin.ask(parse("SHWO") + bind() + describe("P") + execute() + SYNC)
    assert kinds(found) == "EZ"
    assert kinds(admin.ask(run("SHOW VERSION"))) == "12TDCZ"


@pytest.mark.parametrize(
    ("messages", "sqlstate"),
    [
        (parse("SHOW STATE; SHOW STATE") + SYNC, "42601"),
        (parse("SHOW STATE", "x") + parse("SHOW STATE", "x") + SYNC, "42P05"),
        (execute(portal="none") + SYNC, "34000"),
        (parse("SHOW STATE") + bind("1") + SYNC, "08P01"),
        (parse(b"SHOW \xff") + SYNC, "22021"),
        (query(b"SHOW \xff"), "22021"),
        (query("SUSPEND"), "0A000"),
        (query("SHOW FDS"), "0A000"),
        (query("SET max_client_conn = 5"), "0A000"),
        (m.message(m.FUNCTION_CALL, b"\0" * 10), "0A000"),
    ],
)
def test_what_is_refused_leaves_the_session_usable(admin, messages, sqlstate):
    assert error(admin.ask(messages))["C"] == sqlstate
    assert admin.value("SHOW VERSION") == f"pgsidecar {__version__}"


def test_settings_of_drivers_are_ignored(admin):
    assert kinds(admin.ask(query("SET client_encoding TO 'UTF8'"))) == "NCZ"
    assert kinds(admin.ask(query("SET extra_float_digits = 3"))) == "NCZ"
    assert admin.value("SHOW transaction_read_only") == "off"


# -- hostile clients -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        m.HEADER.pack(m.QUERY, 3),
        m.HEADER.pack(m.QUERY, 0x7FFFFFFF),
        m.HEADER.pack(0, 4),
        m.HEADER.pack(m.PASSWORD, 8) + b"none",
        m.message(m.QUERY, b"SHOW POOLS"),  # no NUL
        m.message(m.QUERY, b"SHOW POOLS\0\0"),
        m.message(m.PARSE, b""),
        m.message(m.PARSE, b"\0SHOW POOLS\0\0\1"),
        m.message(m.BIND, b"\0\0\xff\xff"),
        m.message(m.DESCRIBE, b"X\0"),
        m.message(m.EXECUTE, b"\0"),
    ],
)
def test_a_broken_protocol_is_told_and_ends_the_connection(sidecar, data):
    admin = sidecar.login("admin", "pgsidecar")
    admin.send(data)
    found = error(admin.until_closed())
    assert (found["S"], found["C"]) == ("FATAL", "08P01")
    sidecar.until_whole()


def test_a_client_that_goes_leaves_nothing(sidecar):
    for _ in range(5):
        client = sidecar.login("stats", "pgsidecar")
        client.send(query("SHOW CLIENTS") * 20)
        client.abort()
    sidecar.until_whole()


def test_statements_and_text_are_bounded(sidecar, admin):
    found = kinds(admin.ask(b"".join(parse("SHOW STATE", f"s{n}") for n in range(1001)) + SYNC))
    assert found == "1" * 1000 + "EZ"
    admin.send(query("SHOW STATE" + " " * 70_000))
    assert error(admin.until_closed())["C"] == "08P01"
    sidecar.until_whole()
