"""Why a client keeps its server connection: each reason pins, shows itself, and ends when it is undone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.events import PinReason
from tests import wire
from tests.sidecar_process import MakeProcess, MakeService, ServiceHere


@asynccontextmanager
async def connected(sidecar: ServiceHere) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    conn = await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True)
    try:
        yield conn
    finally:
        await conn.close()


async def one(conn: psycopg.AsyncConnection[Any], query: str, *values: object) -> Any:
    cursor = await conn.execute(query, values or None)
    row = await cursor.fetchone()
    assert row is not None
    return row[0]


def pinned(metrics: Any) -> dict[str, float]:
    """How many connections are pinned, by reason."""
    found = metrics.above_zero("pgsidecar_pinned_connections", "reason")
    return {reason: count for (reason,), count in found.items()}


async def shown_pins(sidecar: ServiceHere) -> list[tuple[str, str]]:
    """What the console tells: user and reason."""
    conn = await psycopg.AsyncConnection.connect(
        sidecar.dsn(database="pgsidecar"), autocommit=True, row_factory=psycopg.rows.dict_row
    )
    async with conn:
        rows = await (await conn.execute("SHOW PINS")).fetchall()
    return [(row["user"], row["reason"]) for row in rows]


TEMPORARY = "CREATE TEMP TABLE pinned (n int)"
HOLD = "BEGIN; DECLARE pinned CURSOR WITH HOLD FOR SELECT 1; COMMIT"
UNDONE = [
    ("LISTEN pinned", "listen", "UNLISTEN pinned"),
    ("LISTEN pinned", "listen", "UNLISTEN *"),
    ("LISTEN pinned", "listen", "DISCARD ALL"),
    (TEMPORARY, "temp_table", "DROP TABLE pinned"),
    (TEMPORARY, "temp_table", "DISCARD TEMP"),
    ("CREATE TEMP VIEW pinned AS SELECT 1", "temp_table", "DROP VIEW pinned"),
    ("CREATE TEMP SEQUENCE pinned", "temp_table", "DROP SEQUENCE pinned"),
    (
        "CREATE FUNCTION pg_temp.pinned() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "temp_table",
        "DROP FUNCTION pg_temp.pinned()",
    ),
    ("SELECT 1 AS n INTO TEMP pinned", "temp_table", "BEGIN; DROP TABLE pinned; COMMIT"),
    ("SELECT pg_advisory_lock(1)", "advisory_lock", "SELECT pg_advisory_unlock(1)"),
    ("SELECT pg_try_advisory_lock(1, 2)", "advisory_lock", "SELECT pg_advisory_unlock_all()"),
    (
        "SELECT pg_advisory_lock_shared(1)",
        "advisory_lock",
        "SELECT pg_advisory_unlock_shared(1)",
    ),
    (HOLD, "cursor", "CLOSE pinned"),
    (HOLD, "cursor", "CLOSE ALL"),
    ("PREPARE pinned AS SELECT 1", "prepare", "DEALLOCATE pinned"),
    ("PREPARE pinned AS SELECT 1", "prepare", "DEALLOCATE ALL"),
    ("SET ROLE pg_monitor", "set", "RESET ROLE"),
    ("SET ROLE pg_monitor", "set", "SET ROLE NONE"),
    ("SET SESSION AUTHORIZATION pg_monitor", "set", "RESET SESSION AUTHORIZATION"),
    ("SELECT set_config(lower('A.B'), 'x', false)", "set", "DISCARD ALL"),
    ("SELECT set_config('a.long', repeat('x', 200000), false)", "set", "DISCARD ALL"),
    ("SET a.umlaut = 'ü'", "set", "DISCARD ALL"),
    (
        "SET search_path = " + ", ".join(f"schema_{n}" for n in range(500)),
        "set",
        "RESET search_path",
    ),
    ("LOAD 'plpgsql'", "set", "DISCARD ALL"),
]


@pytest.mark.parametrize(
    ("pins", "reason", "undoes"), UNDONE, ids=[f"{p[:60]} / {u}" for p, _, u in UNDONE]
)
async def test_what_pins_is_shown_and_ends_when_it_is_undone(
    postgres: EmbeddedPostgres, make_service: MakeService, pins: str, reason: str, undoes: str
) -> None:
    sidecar = await make_service(
        postgres.dsn(), max_size=2, min_idle=1, console={"stats_users": "app"}
    )
    async with connected(sidecar) as conn, connected(sidecar) as other:
        await conn.execute(pins)
        now = await sidecar.until(lambda now: pinned(now) == {reason: 1})
        assert now.used == 1
        assert await shown_pins(sidecar) == [("app", reason)]
        assert now.value("pgsidecar_pins_total", pool="main", reason=reason) == 1
        assert await one(other, "SELECT 1") == 1
        await conn.execute(undoes)
        now = await sidecar.until(lambda now: not pinned(now))
        assert now.used == 0
        assert await shown_pins(sidecar) == []
        assert await one(conn, "SELECT 2") == 2
    now = await sidecar.until_whole()
    assert now.total("pgsidecar_pins_total") == 1
    assert now.errors == {}


def test_every_reason_is_tried() -> None:
    assert {reason for _, reason, _ in UNDONE} == set(PinReason) - {PinReason.SESSION_MODE}


async def test_all_of_what_pins_has_to_be_undone(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=2)
    async with connected(sidecar) as conn:
        await conn.execute("LISTEN pinned")
        await conn.execute(TEMPORARY)
        await conn.execute("SELECT pg_advisory_lock(7)")
        for undoes, left in [
            ("SELECT pg_advisory_unlock(7)", {"temp_table": 1.0}),
            ("DROP TABLE pinned", {"listen": 1.0}),
            ("UNLISTEN pinned", {}),
        ]:
            await conn.execute(undoes)
            await sidecar.until(lambda now, left=left: pinned(now) == left)  # type: ignore[misc]  # mypy cannot infer its type


@pytest.mark.parametrize(
    "text",
    [
        "BEGIN; LISTEN pinned; ROLLBACK",
        "BEGIN; CREATE TEMP TABLE pinned (n int) ON COMMIT DROP; COMMIT",
        "BEGIN; SET ROLE pg_monitor; ROLLBACK",
        "CREATE TEMP TABLE pinned (n int); DROP TABLE pinned",
        "SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",
        "INSERT INTO temp_things SELECT 1 FROM pg_class WHERE relname = 'create temp x'",
        "SET work_mem = '7MB'",
        "SET search_path = a, b",
        "SET pinned.by = 'nobody'",
        "SELECT set_config('work_mem', '8MB', false)",
        "SELECT '" + "x" * 70_000 + "', 'temporary'",
    ],
    ids=lambda text: text[:60],
)
async def test_what_leaves_nothing_behind_does_not_pin(
    postgres: EmbeddedPostgres, make_service: MakeService, text: str
) -> None:
    postgres.psql("CREATE TABLE IF NOT EXISTS temp_things (n int)")
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with connected(sidecar) as conn, connected(sidecar) as other:
        await conn.execute(text)
        assert await one(other, "SELECT 1") == 1
        now = await sidecar.until_whole()
        assert now.total("pgsidecar_pins_total") == 0
        # not reset either: what is prepared stays prepared
        assert now.total("pgsidecar_connections_closed_total") == 0


SETTINGS = [
    ("SET search_path = pinned_a, public", "search_path", "pinned_a, public"),
    ("SET statement_timeout = '77s'", "statement_timeout", "77s"),
    ("SET work_mem TO '3MB'", "work_mem", "3MB"),
    ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "default_transaction_read_only", "on"),
    ("SET pinned.tenant = 'it''s \\ mine'", "pinned.tenant", "it's \\ mine"),
    ("SELECT set_config('pinned.user', '42', false)", "pinned.user", "42"),
    ("BEGIN; SET lock_timeout = '5s'; COMMIT", "lock_timeout", "5s"),
    ("DO $$ BEGIN SET bytea_output = 'escape'; END $$", "bytea_output", "escape"),
    ("SET seq_page_cost = 1.5", "seq_page_cost", "1.5"),
    ("SET \"TimeZone\" = 'Asia/Tokyo'", "TimeZone", "Asia/Tokyo"),
    (
        "SET client_min_messages = 'error'; SET client_min_messages = 'log'",
        "client_min_messages",
        "log",
    ),
]


@pytest.mark.parametrize(("text", "name", "value"), SETTINGS, ids=[name for _, name, _ in SETTINGS])
async def test_a_setting_follows_its_client_and_nobody_else(
    postgres: EmbeddedPostgres, make_service: MakeService, text: str, name: str, value: str
) -> None:
    """From one connection to the other and back, amid other clients, until RESET."""
    sidecar = await make_service(postgres.dsn(), max_size=2, min_idle=2)
    async with connected(sidecar) as conn, connected(sidecar) as other, connected(sidecar) as third:
        await conn.execute(text)
        look = f"SELECT coalesce(current_setting('{name}', true), ''), pg_backend_pid()"
        default, _ = await row(other, look)
        assert default != value
        seen = set()
        for _ in range(3):
            found, pid = await row(conn, look)
            assert found == value
            seen.add(pid)
            for blocker in (other, third):
                async with blocker.transaction():  # one of the two connections is taken
                    assert (await row(blocker, look))[0] == default
                    found, pid = await row(conn, look)
                    assert found == value
                    seen.add(pid)
        assert len(seen) == 2
        await conn.execute("RESET " + ".".join(f'"{part}"' for part in name.split(".")))
        for blocker in (other, third):
            async with blocker.transaction():
                assert (await row(conn, look))[0] in (default, "")
    now = await sidecar.until_whole()
    assert now.total("pgsidecar_pins_total") == 0


async def row(conn: psycopg.AsyncConnection[Any], query: str) -> tuple[Any, ...]:
    found = await (await conn.execute(query)).fetchone()
    assert found is not None
    return tuple(found)


async def test_a_client_that_goes_amid_the_question_leaves_a_sound_connection(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """It says LISTEN and is gone: the connection is reset and used on, not thrown away."""
    sidecar = await make_service(postgres.dsn(), max_size=1)
    async with connected(sidecar) as other:
        backend = await one(other, "SELECT pg_backend_pid()")
        for _ in range(20):
            async with connected(sidecar) as conn:
                await conn.execute("LISTEN pinned")
            assert await one(other, "SELECT count(*) FROM pg_listening_channels()") == 0
        assert await one(other, "SELECT pg_backend_pid()") == backend


async def test_a_notification_amid_the_question_reaches_its_client(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=3)
    async with connected(sidecar) as listener, connected(sidecar) as sender:
        await listener.execute("LISTEN pinned")

        async def notify() -> None:
            for n in range(100):
                await sender.execute(f"NOTIFY pinned, '{n}'")

        async def ask() -> None:
            for n in range(100):
                await listener.execute(f"SET work_mem = '{n + 1}MB'")

        await asyncio.gather(notify(), ask())
        await sender.execute("NOTIFY pinned, 'end'")
        heard: list[str] = []
        async for notification in listener.notifies(timeout=10):
            heard.append(notification.payload)
            if notification.payload == "end":
                break
    assert heard == [*map(str, range(100)), "end"]


# -- policies --------------------------------------------------------------------------------------

REFUSED = [
    "LISTEN pinned",
    TEMPORARY,
    "SELECT pg_advisory_lock(1)",
    "BEGIN; DECLARE pinned CURSOR WITH HOLD FOR SELECT 1; COMMIT",
    "PREPARE pinned AS SELECT 1",
    "SET ROLE pg_monitor",
    "LOAD 'plpgsql'",
    "SELECT set_config(lower('A.B'), 'x', false)",
]


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("prepare", [False, True], ids=["simple", "prepared"])
async def test_a_pool_can_refuse_what_would_pin(
    postgres: EmbeddedPostgres, make_service: MakeService, text: str, prepare: bool
) -> None:
    if prepare and text.startswith("BEGIN"):
        return  # not a single statement
    sidecar = await make_service(postgres.dsn(), max_size=1, pin="refuse")
    async with connected(sidecar) as conn, connected(sidecar) as other:
        for _ in range(2):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="pin: refuse") as caught:
                await conn.execute(text, prepare=prepare)
            assert caught.value.diag.message_hint is not None
            assert await one(conn, "SELECT %s::int", 3) == 3
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            async with conn.transaction():
                await conn.execute(text, prepare=prepare)
        assert await one(other, "SELECT 1") == 1
        if not prepare:
            async with conn.pipeline() as pipeline:
                before = await conn.execute("SELECT 1")
                refused = await conn.execute("LISTEN pinned")
                after = await conn.execute("SELECT 2")
                with pytest.raises(psycopg.errors.FeatureNotSupported):
                    await pipeline.sync()
            assert await before.fetchone() == (1,)
            for cursor in (refused, after):
                with pytest.raises(psycopg.Error):
                    await cursor.fetchone()
    now = await sidecar.until_whole()
    assert now.total("pgsidecar_pins_total") == 0
    assert now.errors[("sidecar", "0A")] > 0


async def test_what_leaves_nothing_is_not_refused(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1, pin="refuse")
    async with connected(sidecar) as conn:
        for text in (
            "SET work_mem = '7MB'",
            "BEGIN; CREATE TEMP TABLE pinned (n int) ON COMMIT DROP; COMMIT",
            "BEGIN; SET LOCAL ROLE pg_monitor; COMMIT",
            "SELECT pg_advisory_xact_lock(1)",
            "UNLISTEN *",
            "SELECT '" + "x" * 70_000 + "', 'temporary'",
        ):
            await conn.execute(text)
        assert await one(conn, "SHOW work_mem") == "7MB"


async def test_a_pool_can_take_away_what_would_pin(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1, pin="off")
    async with connected(sidecar) as conn, connected(sidecar) as other:
        for text, _, _ in UNDONE:
            await conn.execute(text)
            await sidecar.until_whole()
            assert await one(other, "SELECT count(*) FROM pg_listening_channels()") == 0
            assert await one(other, "SELECT current_user::text") == "postgres"
            assert await one(other, "SELECT to_regclass('pinned')::text") is None
    assert (await sidecar.until_whole()).total("pgsidecar_pins_total") == 0


@pytest.mark.parametrize("reset", ["dirty", "always"])
async def test_what_a_function_leaves_behind_is_removed_where_the_pool_is_told_to(
    postgres: EmbeddedPostgres, make_service: MakeService, reset: str
) -> None:
    """No text tells what a function does inside: ``reset: always`` is for those who need certainty."""
    postgres.psql(
        "CREATE OR REPLACE FUNCTION leaves_behind() RETURNS int LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM set_config('work_mem', '9MB', false); RETURN 1; END $$"
    )
    sidecar = await make_service(postgres.dsn(), max_size=1, reset=reset)
    async with connected(sidecar) as conn, connected(sidecar) as other:
        assert await one(conn, "SELECT leaves_behind()") == 1
        found = await one(other, "SHOW work_mem")
        assert found == ("4MB" if reset == "always" else "9MB")


# -- statement mode ----------------------------------------------------------------------------------


async def test_statement_mode_serves_statements_and_refuses_transactions(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(postgres.dsn(), max_size=1, mode="statement")
    async with connected(sidecar) as conn, connected(sidecar) as other:
        for n in range(10):
            assert await one(conn, "SELECT %s::int", n) == n
            assert await one(other, "SELECT %s::int", -n) == -n
        await conn.execute("BEGIN; SELECT 1; COMMIT")  # over when the message is
        for text in ("BEGIN", "start transaction read only"):
            for prepare in (False, True):
                with pytest.raises(psycopg.errors.FeatureNotSupported, match="statement mode"):
                    await other.execute(text, prepare=prepare)
                assert await one(other, "SELECT 1") == 1
        await other.execute("SELECT 1; BEGIN")  # that it is left open cannot be seen beforehand
        with pytest.raises(psycopg.OperationalError):
            await other.execute("SELECT 1")
        assert await one(conn, "SELECT 1") == 1
    now = await sidecar.until_whole()
    assert now.value("pgsidecar_pool_info", pool="main", mode="statement", **INFO(postgres)) == 1


def INFO(postgres: EmbeddedPostgres) -> dict[str, str]:
    return {
        "database": postgres.database,
        "user": postgres.user,
        "server": f"{postgres.host}:{postgres.port}",
    }


# -- prepared statements, by SQL -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_sql_can_deallocate_what_the_protocol_prepared(
    postgres: EmbeddedPostgres, make_process: MakeProcess, mode: str
) -> None:
    """As drivers do that cannot send Close; the statement of another client is another one."""
    sidecar = make_process(postgres.dsn(), max_size=2, mode=mode)
    with (
        psycopg.connect(sidecar.dsn(), autocommit=True) as conn,
        psycopg.connect(sidecar.dsn(), autocommit=True) as other,
    ):
        for client in (conn, other):
            client.pgconn.prepare(b"S_1", b"SELECT 5 AS n")
        for text in (b'DEALLOCATE "S_1"', b'deallocate prepare "S_1";'):
            assert conn.pgconn.exec_prepared(b"S_1", []).get_value(0, 0) == b"5"
            answer = conn.pgconn.exec_(text)
            assert answer.command_status == b"DEALLOCATE"
            gone = conn.pgconn.exec_prepared(b"S_1", [])
            assert gone.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"26000"
            assert other.pgconn.exec_prepared(b"S_1", []).get_value(0, 0) == b"5"
            conn.pgconn.prepare(b"S_1", b"SELECT 5 AS n")
        assert conn.pgconn.exec_params(b'DEALLOCATE "S_1"', []).command_status == b"DEALLOCATE"
        gone = conn.pgconn.exec_prepared(b"S_1", [])
        assert gone.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"26000"
        assert other.pgconn.exec_prepared(b"S_1", []).get_value(0, 0) == b"5"
        missing = conn.pgconn.exec_(b"DEALLOCATE nothing")
        assert missing.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"26000"
        other.execute("BEGIN")
        other.pgconn.exec_(b"SELECT 1/0")
        failed = other.pgconn.exec_(b'DEALLOCATE "S_1"')
        assert failed.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"25P02"
        other.execute("ROLLBACK")
        assert other.pgconn.exec_prepared(b"S_1", []).get_value(0, 0) == b"5"


def test_each_of_several_refusals_tells_its_own_reason(postgres: EmbeddedPostgres) -> None:
    """In one write, before the server has said anything; one that an error skips says nothing."""
    with wire.Sidecar(postgres, max_size=1, pin="refuse") as sidecar, sidecar.login() as client:
        extended = wire.parse("load 'plpgsql'") + wire.parse("listen b") + wire.SYNC
        client.send(wire.query("listen a"), wire.query("create temp table t (a int)"), extended)
        client.send(
            wire.parse("set role pg_monitor") + wire.SYNC, wire.query("prepare p as select 1")
        )
        answers = client.until_ready(5)
        assert wire.kinds(answers) == "EZ" * 5
        told = [message.fields["M"] for message in answers if message.kind == "E"]
        reasons = ["(listen)", "(temp_table)", "(set)", "(set)", "(prepare)"]
        assert [reason in text for reason, text in zip(reasons, told, strict=True)] == [True] * 5
        assert client.value("select 1") == "1"
        sidecar.until_whole(clients=1)
