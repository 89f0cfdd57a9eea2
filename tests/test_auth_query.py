"""Users that the server knows: looked up there at their login, by a connection beside the pool."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import asyncpg
import psycopg
import pytest

from sidecar.check import check
from sidecar.config_file import parse
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import ConfigError
from tests.wire import Sidecar, error, startup

QUERY = (
    "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = $1 AND rolcanlogin"
    " AND (rolvaliduntil IS NULL OR rolvaliduntil > now())"
)
LISTEN = {"auth": "scram-sha-256"}
PASSWORDS = {"lu_ann": "pässword of ann", "lu_ünï": "of üni", 'lu_"; drop': "quoted"}


def role(name: str, options: str) -> str:
    quoted = name.replace('"', '""')
    return f'DROP ROLE IF EXISTS "{quoted}"; CREATE ROLE "{quoted}" {options};'


@pytest.fixture(scope="module")
def roles(postgres: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for name, password in PASSWORDS.items():
            connection.execute(role(name, f"LOGIN PASSWORD '{password}'"))
        connection.execute(role("lu_md5", "LOGIN"))
        connection.execute("SET password_encryption = md5")
        connection.execute("ALTER ROLE lu_md5 PASSWORD 'old'")
        connection.execute(role("lu_none", "LOGIN"))
        connection.execute(role("lu_group", "NOLOGIN PASSWORD 'group'"))
        connection.execute(role("lu_late", "LOGIN PASSWORD 'late' VALID UNTIL '2001-01-01'"))
        yield postgres
        for name in (*PASSWORDS, "lu_md5", "lu_none", "lu_group", "lu_late"):
            quoted = name.replace('"', '""')
            connection.execute(f'DROP ROLE "{quoted}"')


@pytest.fixture(scope="module")
def sidecar(roles: EmbeddedPostgres) -> Iterator[Sidecar]:
    pools = {
        "main": {"dsn": roles.dsn(), "max_size": 1, "min_idle": 0, "auth_query": QUERY},
        "plain": {"dsn": roles.dsn(), "max_size": 1, "min_idle": 0},
    }
    users = {"app": "of the file", "lu_late": "of the file"}
    with Sidecar(pools=pools, users=users, listen=LISTEN) as running:
        yield running
        running.until_whole()


def connect(sidecar: Sidecar, user: str, password: str, database: str = "main"):
    return psycopg.connect(sidecar.dsn(quote(user), database, password=password))


def refusal(sidecar: Sidecar, *arguments: str) -> str:
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(sidecar, *arguments).close()
    return str(caught.value).partition("FATAL:")[2].strip()


def lookups(postgres: EmbeddedPostgres, name: str = "pgsidecar auth_query") -> int:
    """Connections for looking up that the server has."""
    with psycopg.connect(postgres.dsn()) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", (name,)
        ).fetchone()
        assert row is not None
        return int(row[0])


# -- who gets in -------------------------------------------------------------------------------


@pytest.mark.parametrize("user", PASSWORDS)
async def test_user_of_the_server_gets_in_with_its_password(sidecar, user):
    """Whatever its name looks like: it is a parameter, and no part of the query."""
    dsn = sidecar.dsn(quote(user), password=PASSWORDS[user])
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select 2") == 2
    await connection.close()


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("lu_ann", "guess"),
        ("lu_ann", ""),
        ("lu_md5", "old"),
        ("lu_none", "x"),
        ("lu_group", "group"),
        ("stranger", "x"),
        ("' OR true --", "x"),
        ("$1", "x"),
    ],
)
def test_all_others_get_the_same_answer(sidecar, user, password):
    with sidecar.connect() as client:
        client.send(startup({"user": user, "database": "main"}))
        assert client.receive().kind == "R"  # asked for a password like everybody
    said = refusal(sidecar, user, password or "x")
    assert said == f'password authentication failed for user "{user}"'


def test_md5_password_is_told_to_the_operator(sidecar, roles, caplog):
    refusal(sidecar, "lu_md5", "old")
    (found,) = [vars(each) for each in caplog.records if each.message == "user cannot log in"]
    assert (found["user"], found["cause"]) == ("lu_md5", "auth_query found an md5 password")
    secret = roles.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'lu_md5'")
    assert secret.startswith("md5")
    assert secret not in str([vars(each) for each in caplog.records])


def test_users_of_the_configuration_come_first(sidecar):
    connect(sidecar, "app", "of the file").close()
    connect(sidecar, "lu_late", "of the file").close()
    assert "authentication failed" in refusal(sidecar, "lu_late", "late")


def test_pool_without_the_query_knows_only_the_configuration(sidecar):
    assert "authentication failed" in refusal(sidecar, "lu_ann", PASSWORDS["lu_ann"], "plain")


def test_changed_password_counts_at_once_after_one_failure(sidecar, roles):
    refusal(sidecar, "lu_ann", "guess")
    connect(sidecar, "lu_ann", PASSWORDS["lu_ann"]).close()  # what is known now is fresh
    with psycopg.connect(roles.dsn(), autocommit=True) as connection:
        connection.execute("ALTER ROLE lu_ann PASSWORD 'new'")
        try:
            with pytest.raises(psycopg.OperationalError):
                connect(sidecar, "lu_ann", "new")
            connect(sidecar, "lu_ann", "new").close()
        finally:
            connection.execute(f"ALTER ROLE lu_ann PASSWORD '{PASSWORDS['lu_ann']}'")
    refusal(sidecar, "lu_ann", "guess")  # for the tests behind: the new one is not kept either


# -- beside the pool ---------------------------------------------------------------------------


def test_full_pool_does_not_keep_users_out(sidecar, roles):
    """And there is one connection more, however many log in."""
    with connect(sidecar, "app", "of the file") as holder:
        holder.execute("begin")
        assert sidecar.call(lambda: sidecar.pool.state.missing()) == 0
        with ThreadPoolExecutor(8) as threads:
            users = ["lu_ann", "lu_ünï"] * 8
            for each in threads.map(lambda user: connect(sidecar, user, PASSWORDS[user]), users):
                each.close()
        assert lookups(roles) == 1


def test_connection_that_the_server_has_closed_is_replaced(sidecar, roles):
    connect(sidecar, "lu_ann", PASSWORDS["lu_ann"]).close()
    with psycopg.connect(roles.dsn(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'pgsidecar auth_query'"
        )
    assert lookups(roles) == 0
    refusal(sidecar, "another_stranger", "x")
    connect(sidecar, 'lu_"; drop', "quoted").close()


def test_many_logins_of_one_user_are_one_query(roles):
    """The query itself takes 0.3 s: of 20 clients at once, each asking would take 6 s."""
    slow = QUERY.replace("WHERE", ", pg_sleep(0.3) WHERE")
    pools = {"main": {"dsn": roles.dsn(), "max_size": 1, "auth_query": slow}}
    with Sidecar(pools=pools, listen=LISTEN) as sidecar:
        began = time.monotonic()
        with ThreadPoolExecutor(20) as threads:
            for each in threads.map(
                lambda _: connect(sidecar, "lu_ann", PASSWORDS["lu_ann"]), range(20)
            ):
                each.close()
        assert time.monotonic() - began < 4
        sidecar.until_whole()


def test_documented_function_is_enough_for_a_login_of_its_own(roles):
    """``docs/operations.md``: a user that may look up, and nothing else."""
    document = (Path(__file__).parent.parent / "docs/operations.md").read_text()
    (function,) = re.findall(r"```sql\n(.*?)```", document, re.DOTALL)
    found = re.search(r"auth_query: (.*)", document)
    assert found is not None
    pools = {
        "main": {
            "dsn": roles.dsn(),
            "auth_query": found[1],
            "auth_dsn": roles.dsn(user="pooler", application_name="lu_pooler"),
            "max_size": 1,
        }
    }
    with psycopg.connect(roles.dsn(), autocommit=True) as connection:
        connection.execute("CREATE ROLE pooler LOGIN")
        try:
            connection.execute(function)
            with Sidecar(pools=pools, listen=LISTEN) as sidecar:
                connect(sidecar, "lu_ann", PASSWORDS["lu_ann"]).close()
                assert "authentication failed" in refusal(sidecar, "lu_late", "late")
                assert lookups(roles, "lu_pooler") == 1
        finally:
            connection.execute("DROP FUNCTION IF EXISTS pooler_login")
            connection.execute("DROP ROLE pooler")


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "cause"),
    [
        ("SELECT nothing FROM nowhere WHERE x = $1", 'relation "nowhere" does not exist'),
        ("SELECT rolpassword FROM pg_authid WHERE rolname = $1", "it has 1 columns, not two"),
        ("SELECT 1, 2, 3 WHERE $1 <> ''", "it has 3 columns, not two"),
        ("SELECT rolname, rolpassword FROM pg_authid WHERE $1 <> ''", "other users than $1"),
        ("SELECT 'postgres', 'x' WHERE $1 <> ''", "other users than $1"),
        ("CREATE TABLE x AS SELECT $1", "it has 0 columns, not two"),
        ("not SQL $1", "syntax error"),
    ],
)
def test_query_that_cannot_be_used_lets_nobody_in_and_is_logged(roles, caplog, query, cause):
    """The client is told that it is not its password; and not more."""
    pools = {"main": {"dsn": roles.dsn(), "max_size": 1, "min_idle": 0, "auth_query": query}}
    with Sidecar(pools=pools, listen=LISTEN) as sidecar:
        said = refusal(sidecar, "lu_ann", PASSWORDS["lu_ann"])
        assert said.splitlines()[0] == "users of pool 'main' cannot be looked up"
        said = refusal(sidecar, "lu_ann", PASSWORDS["lu_ann"])
        assert said.splitlines()[0] == "users of pool 'main' cannot be looked up"
        sidecar.until_whole()
    (first, *_) = [vars(each) for each in caplog.records if each.message == "auth_query failed"]
    assert cause in first["cause"]


def test_server_that_is_down_is_told_at_once(own_postgres, caplog):
    server = own_postgres()
    pools = {"main": {"dsn": server.dsn(), "max_size": 1, "auth_query": QUERY}}
    with Sidecar(pools=pools, listen=LISTEN) as sidecar:
        server.kill()
        for _ in range(3):
            began = time.monotonic()
            with sidecar.connect() as client:
                client.send(startup({"user": "ann", "database": "main"}))
                fields = error(client.until_closed())
            assert (fields["C"], fields["M"]) == (
                "08001",
                "users of pool 'main' cannot be looked up now",
            )
            assert str(server.port) not in str(fields)
            assert time.monotonic() - began < 2
        server.restart()
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE ROLE ann LOGIN PASSWORD 'ann'")
        sidecar.until(lambda: sidecar.pool.opener.is_up, "the server is back")
        deadline = time.monotonic() + 5
        while True:
            try:
                connect(sidecar, "ann", "ann").close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_server_that_hangs_holds_nobody_beyond_the_login(own_postgres):
    server = own_postgres()
    pools = {"main": {"dsn": server.dsn(), "max_size": 1, "auth_query": QUERY}}
    listen = {**LISTEN, "login_timeout": "1s"}
    with Sidecar(pools=pools, listen=listen, users={"app": "x"}) as sidecar:
        refusal(sidecar, "stranger", "x")
        server.pause()
        try:
            with sidecar.connect() as client:
                client.send(startup({"user": "ann", "database": "main"}))
                began = time.monotonic()
                assert error(client.until_closed())["C"] == "08001"
                assert time.monotonic() - began < 3
        finally:
            server.resume()


def test_query_that_hangs_is_cancelled_on_the_server(roles):
    """Else every further login would leave one more backend behind."""
    slow = QUERY.replace("WHERE", ", pg_sleep(60) WHERE")
    dsn = roles.dsn(application_name="lu_slow")
    pools = {"main": {"dsn": roles.dsn(), "max_size": 1, "auth_query": slow, "auth_dsn": dsn}}
    with Sidecar(pools=pools, listen={**LISTEN, "login_timeout": "20s"}) as sidecar:
        began = time.monotonic()
        said = refusal(sidecar, "lu_ann", PASSWORDS["lu_ann"])
        assert said.startswith("users of pool 'main' cannot be looked up now")
        assert 4 < time.monotonic() - began < 12
        sidecar.until(lambda: lookups(roles, "lu_slow") == 0, "its backend is gone")


async def test_cancelled_login_takes_no_other_with_it(roles):
    """Two wait for one query, the first goes."""
    slow = QUERY.replace("WHERE", ", pg_sleep(0.5) WHERE")
    pools = {"main": {"dsn": roles.dsn(), "max_size": 1, "auth_query": slow}}
    with Sidecar(pools=pools, listen=LISTEN) as sidecar:
        dsn = sidecar.dsn("lu_ann", password=PASSWORDS["lu_ann"])
        first = sidecar.connect()
        first.send(startup({"user": "lu_ann", "database": "main"}))
        lookup = sidecar.service._listener.authenticator._credentials._lookups["main"]  # type: ignore[union-attr]
        sidecar.until(lambda: "lu_ann" in lookup._asked, "it is looked up")
        second = asyncio.create_task(psycopg.AsyncConnection.connect(dsn))
        await asyncio.sleep(0.1)
        first.abort()
        await (await second).close()
        sidecar.until_whole()


def test_query_without_its_parameter_is_refused_at_the_start():
    text = "pools: {main: {dsn: 'postgresql://a@db.example/b', auth_query: 'SELECT 1, 2'}}"
    with pytest.raises(ConfigError, match=r"with auth_query, and no \$1 in it"):
        parse(text, {}, "config.yaml")


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (QUERY, ""),
        ("SELECT 1 WHERE $1 <> ''", "auth_query: it has 1 columns, not two: the user's name, its secret"),
        ("SELECT a, b FROM nowhere WHERE a = $1", 'auth_query: relation "nowhere" does not exist'),
    ],
)  # fmt: skip
async def test_check_tries_the_query(roles, query, problem):
    main = {"dsn": roles.dsn(), "auth_query": query}
    text = json.dumps({"pools": {"main": main}}).replace("$", "$$")
    (finding,) = await check(parse(text, {}, "test"))
    assert finding.problem == problem


# -- secrets -----------------------------------------------------------------------------------


def test_no_secret_is_logged_or_told(roles, caplog):
    """At level debug: passwords, verifiers, and what they are made of."""
    caplog.set_level(logging.DEBUG)
    with psycopg.connect(roles.dsn()) as connection:
        row = connection.execute(
            "SELECT rolpassword FROM pg_authid WHERE rolname = 'lu_ann'"
        ).fetchone()
        assert row is not None
        verifier = row[0]
    users: dict[str, str | dict[str, object]] = {
        "app": "planted-password",
        "plain": "planted-plain",
        "vera": {"verifier": verifier},
    }
    pools = {
        "main": {"dsn": roles.dsn(password="planted-dsn"), "max_size": 1, "auth_query": QUERY},
    }
    rules = "host all plain 127.0.0.1/32 password\nhost all all all scram-sha-256"
    with Sidecar(pools=pools, users=users, listen={"hba": rules}) as sidecar:
        told = [
            refusal(sidecar, user, "planted-guess")
            for user in ("lu_ann", "app", "vera", "plain", "no")
        ]
        connect(sidecar, "lu_ann", PASSWORDS["lu_ann"]).close()
        connect(sidecar, "app", "planted-password").close()
        connect(sidecar, "vera", PASSWORDS["lu_ann"]).close()
        connect(sidecar, "plain", "planted-plain").close()
        service = sidecar.service
        authenticator = service._listener.authenticator  # type: ignore[union-attr]
        shown = repr(
            [service, service.config, vars(authenticator), vars(authenticator._credentials)]
        )
        shown += repr([vars(each) for each in authenticator._credentials._lookups.values()])
    records = "\n".join(str(vars(record)) for record in caplog.records)
    salt, _, keys = verifier.removeprefix("SCRAM-SHA-256$4096:").partition("$")
    for text in (*told, caplog.text, records, shown):
        for secret in ("planted", PASSWORDS["lu_ann"], salt, *keys.split(":")):
            assert secret not in text
