"""A client's settings go with it, its session state stays with it, and nobody ever meets either of
another client: whatever the client does, and however it goes."""

import asyncio
import datetime
import random
import threading
from collections.abc import Iterator

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import PATIENCE
from tests.wire import (
    FLUSH,
    SYNC,
    TERMINATE,
    Client,
    Sidecar,
    bind,
    error,
    execute,
    kinds,
    parse,
    query,
    run,
    startup,
)

MODES = ["transaction", "session"]


@pytest.fixture
def single(postgres) -> Iterator[Sidecar]:
    """All clients use one connection."""
    with Sidecar(postgres, max_size=1) as sidecar:
        yield sidecar


def direct(postgres: EmbeddedPostgres, **parameters: str) -> Client:
    address = (postgres.host, postgres.port)
    return Client.login(address, postgres.user, postgres.database, **parameters)


def shows(client: Client, *names: str) -> list[str | None]:
    return [client.value(f"show {name}") for name in names]


# -- what a client brings along ----------------------------------------------------------------

BROUGHT: list[dict[str, str]] = [
    {},
    {"application_name": "an application"},
    {"TimeZone": "Asia/Tokyo", "DateStyle": "German"},
    {"timezone": "utc", "datestyle": "iso, ymd"},
    {"client_encoding": "latin1"},
    {"client_encoding": "UTF-8"},
    {"search_path": 'a, "B c", public', "extra_float_digits": "0"},
    {"options": "-c statement_timeout=12s --work-mem=1MB -c IntervalStyle=iso_8601"},
    {"options": r"-c search_path=x,y -c application_name=with\ blank"},
    {"my.setting": 'it\'s a \\ "value"', "application_name": "O'Neill"},
    {"standard_conforming_strings": "off", "DateStyle": "SQL"},
    {"default_transaction_isolation": "serializable", "lock_timeout": "3s"},
]
SHOWN = [
    *("application_name", "timezone", "datestyle", "intervalstyle", "client_encoding", "work_mem"),
    *("search_path", "extra_float_digits", "statement_timeout", "lock_timeout"),
    *("standard_conforming_strings", "default_transaction_isolation"),
]


def state_of(client: Client) -> list[object]:
    """What the client sees, and what it was told."""
    found: list[object] = [*shows(client, *SHOWN)]
    found.append(client.value("select current_setting('my.setting', true)") or None)
    found.append(
        client.rows("select '2020-03-04 05:06:07+00'::timestamptz, '1 day 2 hours'::interval")
    )
    return [*found, client.parameters]


def test_settings_are_a_clients_own_whoever_was_there_before(postgres, single):
    """Each in turn on the one connection, several times, with what the others brought before it."""
    clients = [single.login(**brought) for brought in BROUGHT]
    expected = []
    for brought in BROUGHT:
        with direct(postgres, **brought) as client:
            expected.append(state_of(client))
    rng = random.Random(1)
    for _ in range(4):
        for number in rng.sample(range(len(clients)), len(clients)):
            assert state_of(clients[number]) == expected[number], BROUGHT[number]
    single.until_whole(clients=len(clients))
    assert single.pool.state.size == 1


def test_client_learns_how_the_server_spells_its_settings(postgres, single):
    """psycopg reads dates by the first letter of DateStyle: ``iso`` is not ``ISO, MDY`` to it."""
    brought = {"DateStyle": "iso", "TimeZone": "utc", "client_encoding": "utf-8"}
    with direct(postgres, **brought) as alone, single.login(**brought) as client:
        assert client.value("select 1") == "1"
        assert client.parameters == alone.parameters
        with single.login(**brought) as second:
            assert second.parameters == alone.parameters  # from the first moment
            second.rows("set datestyle to german; reset datestyle")
            assert second.parameters == alone.parameters
            assert shows(second, "datestyle", "timezone") == ["ISO, MDY", "UTC"]
        assert shows(client, "datestyle", "timezone") == ["ISO, MDY", "UTC"]
    with psycopg.connect(single.dsn(options="-c datestyle=iso,dmy")) as connection:
        found = connection.execute("select '01/02/2020'::date").fetchone()
        assert found == (datetime.date(2020, 2, 1),)
    single.until_whole()


@pytest.mark.parametrize("mode", MODES)
def test_setting_that_is_reported_follows_its_client(postgres, mode):
    with Sidecar(postgres, max_size=2, mode=mode) as sidecar:
        with sidecar.login(TimeZone="Asia/Tokyo") as a, sidecar.login() as b:
            a.rows("set application_name to 'a'; set datestyle to german")
            assert shows(b, "timezone", "application_name", "datestyle") == ["UTC", "", "ISO, MDY"]
            b.rows("set timezone to 'Europe/Rome'")
            for _ in range(3):
                assert shows(a, "timezone", "application_name", "datestyle") == [
                    *("Asia/Tokyo", "a", "German, DMY"),
                ]
                assert shows(b, "timezone", "application_name", "datestyle") == [
                    *("Europe/Rome", "", "ISO, MDY"),
                ]
            assert a.parameters["DateStyle"] == "German, DMY"
            assert b.parameters["TimeZone"] == "Europe/Rome"
            a.rows("begin; set local timezone to 'UTC'")
            assert a.parameters["TimeZone"] == "UTC"
            a.rows("rollback")
            assert a.parameters["TimeZone"] == "Asia/Tokyo"
            assert shows(a, "timezone") == ["Asia/Tokyo"]
        sidecar.until_whole()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "reset",
    ["reset all", "discard all", "reset timezone; reset search_path; reset application_name"],
)
@pytest.mark.parametrize("is_extended", [False, True])
def test_reset_leads_back_to_what_the_client_brought_along(postgres, mode, reset, is_extended):
    """As on a connection of its own. asyncpg's pool says RESET ALL each time it is given one back."""
    brought = {"TimeZone": "Asia/Tokyo", "search_path": "mine", "application_name": "home"}
    with (
        Sidecar(postgres, max_size=1, mode=mode) as sidecar,
        sidecar.login(**brought) as client,
        direct(postgres, **brought) as alone,
    ):
        for each in (client, alone):
            each.rows("set timezone to 'Europe/Rome'; set application_name to 'away'")
            for statement in reset.split("; ") if is_extended else [reset]:
                answer = each.ask(run(statement) if is_extended else query(statement))
                assert "E" not in kinds(answer)
        names = ("timezone", "search_path", "application_name", "datestyle")
        for _ in range(2):
            assert (
                shows(client, *names)
                == shows(alone, *names)
                == [
                    *("Asia/Tokyo", "mine", "home", "ISO, MDY"),
                ]
            )
            assert client.parameters == alone.parameters


@pytest.mark.parametrize("mode", MODES)
async def test_pool_of_asyncpg_keeps_its_settings(postgres, mode):
    brought = {"application_name": "x", "search_path": "s", "timezone": "Asia/Tokyo"}
    with Sidecar(postgres, max_size=2, mode=mode) as sidecar:
        pool = await asyncpg.create_pool(
            sidecar.dsn(), min_size=1, max_size=1, server_settings=brought
        )
        for _ in range(4):
            async with pool.acquire() as connection:
                found = {name: await connection.fetchval(f"show {name}") for name in brought}
                assert found == brought
                await connection.execute("set timezone to 'UTC'")
        await pool.close()
        await asyncio.to_thread(sidecar.until_whole)


def test_settings_rolled_back_with_their_client_are_not_believed(single):
    """It goes amid the transaction in which it set them: who wants the same has to set them."""
    with single.login() as client:
        client.rows("begin")
        client.rows("set timezone to 'Asia/Tokyo'")
        client.abort()
    single.until_whole()
    with single.login(TimeZone="Asia/Tokyo") as client:
        assert shows(client, "timezone") == ["Asia/Tokyo"]


@pytest.mark.parametrize(
    ("brought", "sqlstate"),
    [
        ({"DateStyle": "nonsense"}, "22023"),
        ({"options": "-c no_such_setting=1"}, "42704"),
        ({"search_path": "a b"}, "22023"),
        ({"client_encoding": "klingon"}, "22023"),
        ({"TimeZone": "Mars/Olympus"}, "22023"),
        ({"work_mem": "much"}, "22023"),
        ({"max_connections": "1"}, "55P02"),
        ({'a"; drop table t; --': "x"}, "42704"),
    ],
)
def test_refused_setting_is_a_clear_end_and_harms_nobody(postgres, single, brought, sqlstate):
    """At the login, in the words of the server, as on a direct connection."""
    with refused_login((postgres.host, postgres.port), postgres, brought) as client:
        directly = error(client.until_closed())
    with single.login(application_name="witness") as witness:
        assert witness.value("select 1") == "1"
        for _ in range(3):
            with refused_login(single.address, postgres, brought) as client:
                answer = client.until_closed()
            assert kinds(answer)[-1] == "E"
            told = error(answer)
            assert (told["S"], told["C"]) == ("FATAL", sqlstate), told
            assert (told["M"], told.get("D")) == (directly["M"], directly.get("D"))
            assert shows(witness, "application_name") == ["witness"]
    single.until_whole()


def refused_login(
    address: tuple[str, int], postgres: EmbeddedPostgres, brought: dict[str, str]
) -> Client:
    client = Client(address)
    client.send(startup({"user": postgres.user, "database": postgres.database, **brought}))
    return client


def test_client_that_goes_while_its_settings_are_made_harms_nobody(single):
    """The answers to our SET are nobody's then, least of all the next client's."""
    for number in range(150):
        with single.login(search_path=f"s{number}") as client, single.login() as other:
            client.send(query("select 'mine'"))
            if number % 3:
                client.abort()
            else:
                client.socket.close()
            assert other.value("select 'other'") == "other"
    single.until_whole()


# -- what a client leaves behind ---------------------------------------------------------------

CLEAN = """
    select count(*) from pg_class where relpersistence = 't' and pg_table_is_visible(oid)
    union all select count(*) from pg_listening_channels()
    union all select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()
    union all select count(*) from pg_cursors where is_holdable
    union all select count(*) from pg_prepared_statements where name !~ '^pgsidecar_'
    union all select count(*) from pg_settings
        where source = 'session' and name not in ('application_name', 'DateStyle', 'TimeZone', 'transaction_read_only')
    union all select (current_user <> 'postgres')::int
"""


def leftovers(client: Client) -> list[str]:
    return [str(row[0]) for row in client.rows(CLEAN)]


NOTHING = ["0"] * 7
SPELLED: list[bytes] = [
    query("set work_mem = '1MB'"),
    query("/* app:web */ SET work_mem = '1MB'"),
    query("-- a comment\n\tset/**/SESSION work_mem to '1MB'"),
    query("select 1; set work_mem = '1MB'; select 2"),
    query("insert into left_table values ('C:\\'); set work_mem = '1MB'"),
    query("begin; set work_mem = '1MB'; commit"),
    query("set role pg_monitor"),
    query("set session authorization pg_monitor"),
    query("set session characteristics as transaction read only"),
    query("select set_config('work_mem', '1MB', false)"),
    query("select set_config('work_mem', '1MB', length('x') = 2)"),
    query("create temp table left_temp (a int)"),
    query("create table pg_temp.left_temp (a int)"),
    query("select 1 as a into temp left_temp"),
    query("explain analyze create temporary table left_temp as select 1"),
    query("create temp view left_view as select 1"),
    query("listen left_channel"),
    query("select pg_advisory_lock(1)"),
    query("select pg_try_advisory_lock_shared(1, 2)"),
    query("prepare left_statement as select 1"),
    query("begin; declare c cursor with hold for select 1; commit"),
    query("do $$ begin perform set_config('work_mem', '1MB', false); end $$"),
    query("do $$ begin create temp table left_temp (a int); end $$"),
    run("set work_mem = '1MB'"),
    run("select pg_advisory_lock($1::int)", "1"),
    run("create temp table left_temp (a int)"),
    parse("listen left_channel", "s") + bind(name="s") + execute() + SYNC,
    parse("select set_config('work_mem', $1, $2)", "s")
    + bind("1MB", "f", name="s")
    + execute()
    + SYNC,
    query("load 'plpgsql'; set plpgsql.extra_warnings = 'all'"),
    query("set work_mem = '" + " " * 20_000 + "1MB'"),
    query("create temp table left_temp as select '" + "x" * 300_000 + "' as a"),
    run("select set_config('work_mem', '1MB', false), '" + "x" * 300_000 + "'"),
]


@pytest.fixture(scope="module")
def left_table(postgres) -> None:
    postgres.psql("drop table if exists left_table; create table left_table (a text)")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(len(SPELLED)))
@pytest.mark.parametrize("goes", ["politely", "abruptly", "in a transaction", "amid a query"])
@pytest.mark.usefixtures("left_table")
def test_next_client_finds_nothing(postgres, mode, number, goes):
    with Sidecar(postgres, max_size=1, mode=mode) as sidecar:
        with sidecar.login() as client:
            assert leftovers(client) == NOTHING
            assert "E" not in kinds(client.ask(SPELLED[number]))
            if goes == "in a transaction":
                client.rows("begin")
            elif goes == "amid a query":
                client.send(query("select pg_sleep(60)"))
            if goes == "politely":
                client.send(TERMINATE)
                client.until_closed()
            elif goes == "abruptly":
                client.abort()
        with sidecar.login() as client:
            assert leftovers(client) == NOTHING
        sidecar.until_whole()


@pytest.mark.parametrize("number", range(len(SPELLED)))
@pytest.mark.usefixtures("left_table")
def test_others_find_nothing_while_its_client_is_there(postgres, number):
    """It keeps the connection, and its state; the others get another one."""
    with Sidecar(postgres, max_size=2, min_idle=2) as sidecar:
        with sidecar.login() as client, sidecar.login() as other:
            client.ask(SPELLED[number])
            mine = leftovers(client)
            for _ in range(3):
                assert leftovers(other) == NOTHING
                assert leftovers(client) == mine
            if len(SPELLED[number]) < 10_000:  # of a long one, only the beginning is looked at
                assert mine != NOTHING
        sidecar.until_whole()


def test_what_ends_with_the_transaction_does_not_keep_the_connection(single):
    with single.login() as client, single.login() as other:
        for text in (
            "set local work_mem = '1MB'",
            "begin; set local work_mem = '1MB'; commit",
            "begin; select pg_advisory_xact_lock(1); commit",
            "begin; declare c cursor for select 1; commit",
            "begin; set transaction read only; commit",
            "select set_config('work_mem', '1MB', true)",
            "select 'temperature', 'listen', 'set x = 1'",
        ):
            client.rows(text)
            assert leftovers(other) == NOTHING
        single.until_whole(clients=2)


def test_discard_all_ends_what_kept_the_connection(single):
    with single.login(application_name="a") as client, single.login() as other:
        client.rows("set work_mem = '1MB'; listen x")
        client.rows("discard all")
        assert leftovers(other) == NOTHING
        assert shows(client, "application_name", "work_mem") == ["a", "4MB"]


def test_notifications_come_to_who_listens(postgres):
    with Sidecar(postgres, max_size=2) as sidecar:
        with sidecar.login() as listener, sidecar.login() as other:
            listener.rows("listen news")
            for number in range(5):
                other.rows(f"notify news, 'number {number}'")
                (note,) = listener.until("A")
                assert note.body.endswith(f"news\0number {number}\0".encode())
                assert "A" not in kinds(other.ask(query("select 1")))
        sidecar.until_whole()


# -- how a client goes -------------------------------------------------------------------------

INSERT = "insert into left_table values ('from who is gone')"
BEGUN = (query(f"begin; {INSERT}"), "Z")
UNFINISHED: dict[str, list[tuple[bytes, str]]] = {
    "idle in a transaction": [BEGUN],
    "in a failed transaction": [BEGUN, (query("select 1/0"), "Z")],
    "with a lock": [BEGUN, (query("lock table left_table"), "Z")],
    "amid a query": [BEGUN, (query("select pg_sleep(60)"), "")],
    "amid its rows": [BEGUN, (query("select generate_series(1, 10000000)"), "D")],
    "amid a pipeline": [(query("begin") + query(INSERT) + query("select pg_sleep(60)") * 5, "")],
    "amid a short message": [BEGUN, (query("select 1")[:7], "")],
    "amid a long message": [BEGUN, (query("select '" + "x" * 200_000)[:100_000], "")],
    "amid a long first message": [(query("select '" + "x" * 200_000)[:100_000], "")],
    "between Execute and Sync": [(parse(INSERT) + bind() + execute() + FLUSH, "C")],
    "after an error without Sync": [(parse("selec") + FLUSH, "E")],
}
"""What a client has sent, and what it has seen of the answers, when it goes."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", UNFINISHED)
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.usefixtures("left_table")
def test_client_that_goes_leaves_no_work_half_done(postgres, mode, where, how):
    """Its transaction is rolled back, and the next client's connection is clean."""
    with Sidecar(postgres, max_size=1, mode=mode) as sidecar:
        with sidecar.login() as client:
            for data, end in UNFINISHED[where]:
                client.send(data)
                if end:
                    client.until(end)
            if how == "abort":
                client.abort()
        with sidecar.login() as client:
            assert (
                client.value("select count(*) from left_table where a = 'from who is gone'") == "0"
            )
            assert leftovers(client) == NOTHING
            answer = client.ask(query("select 'mine'"))
            assert kinds(answer) == "TDCZ"
            assert answer[-1].body == b"I"
        sidecar.until_whole()


# -- all at once -------------------------------------------------------------------------------

ZONES = ["UTC", "Asia/Tokyo", "Europe/Rome"]
STYLES = ["ISO, MDY", "ISO, DMY", "German, DMY"]


class Life:
    """One client after the other, each with settings of its own; what it meets must be its own."""

    def __init__(self, sidecar: Sidecar, number: int, lives: int) -> None:
        self._sidecar = sidecar
        self._rng = random.Random(number)
        self._number = number
        self._lives = lives
        self.committed = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            for life in range(self._lives):
                self._live(f"{self._number}.{life}")
        except BaseException as exc:  # noqa: BLE001  the test shows it
            self.problem = exc

    def _live(self, name: str) -> None:
        rng = self._rng
        zone, style, path = rng.choice(ZONES), rng.choice(STYLES), f"s{rng.randrange(3)}"
        brought = {"application_name": name, "TimeZone": zone, "DateStyle": style}
        with self._sidecar.login(**brought, options=f"-c search_path={path}") as client:
            self._check(client, name, zone, style, path)
            client.ask(parse(f"select '{name}' || $1::text", "statement") + SYNC)
            for _ in range(rng.randint(1, 6)):
                rng.choice([self._read, self._write, self._fail, self._use])(client, name)
            self._check(client, name, zone, style, path)
            rng.choice([self._leave_state, self._leave_transaction, self._leave])(client, name)
            match rng.randrange(3):
                case 0:
                    client.abort()
                case 1:
                    client.send(TERMINATE)

    def _check(self, client: Client, name: str, zone: str, style: str, path: str) -> None:
        found = leftovers(client)
        found[5] = "0"  # what it brought itself, for one
        assert found == NOTHING, (name, found)
        names = ("application_name", "timezone", "datestyle", "search_path", "work_mem")
        assert shows(client, *names) == [name, zone, style, path, "4MB"]

    def _read(self, client: Client, name: str) -> None:
        count = self._rng.choice([1, 10, 3000])
        rows = client.rows(f"select '{name}', i from generate_series(1, {count}) i")
        assert rows == [[name, str(i)] for i in range(1, count + 1)]

    def _use(self, client: Client, name: str) -> None:
        answer = client.ask(bind("!", name="statement") + execute() + SYNC)
        assert [m.columns for m in answer if m.kind == "D"] == [[f"{name}!".encode()]]

    def _write(self, client: Client, name: str) -> None:
        client.rows("begin")
        client.rows(f"insert into public.lives values ('{name}')")
        is_kept = self._rng.random() < 0.7
        client.rows("commit" if is_kept else "rollback")
        self.committed += is_kept

    def _fail(self, client: Client, name: str) -> None:
        assert error(client.ask(query(f"select '{name}'::int")))["M"].endswith(f'"{name}"')
        answer = client.ask(run("select $1::int", name))
        assert error(answer)["M"].endswith(f'"{name}"')

    def _leave_state(self, client: Client, name: str) -> None:
        text = self._rng.choice(
            [
                "create temp table leftover (a int)",
                "set work_mem = '7MB'",
                "listen leftover",
                f"select pg_advisory_lock_shared({self._number})",
                "prepare leftover as select 1",
                "begin; declare leftover cursor with hold for select 1; commit",
                "set role pg_monitor",
            ]
        )
        client.rows(text)
        assert leftovers(client) != NOTHING
        self._use(client, name)

    def _leave_transaction(self, client: Client, name: str) -> None:
        client.rows("begin")
        client.rows(f"insert into public.lives values ('{name}'); set timezone to 'Asia/Tokyo'")

    def _leave(self, client: Client, name: str) -> None:
        client.send(query("select pg_sleep(0.01)") + parse("select 1") + FLUSH)


def test_twenty_clients_on_three_connections_never_meet(postgres):
    postgres.psql("""
        drop table if exists lives; create table lives (name text);
        create schema if not exists s0; create schema if not exists s1; create schema if not exists s2;
    """)
    with Sidecar(postgres, max_size=3, max_prepared_statements=5) as sidecar:
        lives = [Life(sidecar, number, 6) for number in range(20)]
        threads = [threading.Thread(target=life.run, daemon=True) for life in lives]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE * 2)
        problems = [life.problem for life in lives if life.problem is not None]
        assert not problems, problems
        assert not any(thread.is_alive() for thread in threads)
        sidecar.until_whole()
    assert postgres.psql("select count(*) from lives") == str(sum(life.committed for life in lives))
