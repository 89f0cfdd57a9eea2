"""Who gets in, and how: startup, encryption requests, passwords on both sides."""

import os
import struct
import time

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from sidecar.protocol.authentication import ClientExchange
from tests.wire import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    Client,
    Sidecar,
    copy_data,
    error,
    kinds,
    query,
    startup,
)

USERS = {"alice": "wonder land", "böse": "pässword"}


@pytest.fixture(scope="module")
def guarded(postgres):
    """Clients need a password; ``other`` is a pool of somebody else."""
    pools = {
        "main": {"dsn": postgres.dsn(user="postgres", password="of main"), "max_size": 2},
        "other": {"dsn": postgres.dsn(user="postgres", password="of other"), "max_size": 2},
    }
    with Sidecar(pools=pools, users=USERS, listen={"auth": "scram-sha-256"}) as sidecar:
        yield sidecar


@pytest.fixture(scope="module")
def trusting(postgres):
    with Sidecar(postgres, max_size=2) as sidecar:
        yield sidecar


def refusal(sidecar: Sidecar, *data: bytes) -> dict[str, str]:
    """What a client is told that sends this and is closed."""
    with sidecar.connect() as client:
        client.send(*data)
        fields = error(client.until_closed())
    assert fields["S"] == fields["V"] == "FATAL"
    sidecar.until_whole()
    return fields


def tell(error: psycopg.Error) -> str:
    return str(error).partition("FATAL:")[2].strip()


def fail_to_log_in(sidecar: Sidecar, user: str, password: str, database: str = "main") -> str:
    dsn = sidecar.dsn(user, database, password=password)
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(dsn)
    return tell(caught.value)


# -- passwords of clients ----------------------------------------------------------------------


@pytest.mark.parametrize("user", USERS)
async def test_password_lets_in(guarded, user):
    dsn = guarded.dsn(user, password=USERS[user])
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select 2") == 2
    await connection.close()


def test_nobody_learns_from_a_refusal_who_exists(guarded):
    texts = {
        fail_to_log_in(guarded, user, "guess").replace(user, "USER")
        for user in ("alice", "postgres", "stranger", "böse")
    }
    assert texts == {'password authentication failed for user "USER"'}
    assert fail_to_log_in(guarded, "alice", USERS["böse"]) == (
        'password authentication failed for user "alice"'
    )


async def test_refusal_has_the_sqlstate_of_a_wrong_password(guarded):
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(guarded.dsn("alice", password="guess"))


def test_user_of_a_dsn_gets_into_its_own_pool_only(guarded):
    for database in ("main", "other"):
        dsn = guarded.dsn("postgres", database, password=f"of {database}")
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
    assert "password authentication failed" in fail_to_log_in(
        guarded, "postgres", "of main", "other"
    )
    assert "password authentication failed" in fail_to_log_in(
        guarded, "postgres", "of other", "main"
    )


def test_databases_are_named_to_nobody_who_has_not_logged_in(guarded):
    text = fail_to_log_in(guarded, "alice", "guess", "nowhere")
    assert text == 'password authentication failed for user "alice"'
    text = fail_to_log_in(guarded, "alice", USERS["alice"], "nowhere")
    assert text.splitlines() == [
        'database "nowhere" does not exist',
        "HINT:  The pools are: main, other.",
    ]


# -- secrets in other forms --------------------------------------------------------------------


def verifier_of(postgres: EmbeddedPostgres, password: str) -> str:
    """What PostgreSQL itself keeps of this password."""
    postgres.psql(f"CREATE ROLE verified PASSWORD '{password}'")
    try:
        return postgres.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'verified'")
    finally:
        postgres.psql("DROP ROLE verified")


async def test_verifier_of_postgresql_is_enough_to_let_in(postgres):
    verifier = verifier_of(postgres, "pässword of carol")
    with Sidecar(
        postgres, users={"carol": {"verifier": verifier}}, listen={"auth": "scram-sha-256"}
    ) as sidecar:
        dsn = sidecar.dsn("carol", password="pässword of carol")
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
        await (await asyncpg.connect(dsn)).close()
        for guess in ("guess", verifier):
            assert fail_to_log_in(sidecar, "carol", guess) == (
                'password authentication failed for user "carol"'
            )


def test_password_file_is_read_for_each_login(postgres, tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(b" first of dave \r\nnot this\n")
    with Sidecar(
        postgres, users={"dave": {"password_file": str(file)}}, listen={"auth": "scram-sha-256"}
    ) as sidecar:
        psycopg.connect(sidecar.dsn("dave", password=" first of dave ")).close()
        file.write_text("second")
        assert "authentication failed" in fail_to_log_in(sidecar, "dave", " first of dave ")
        psycopg.connect(sidecar.dsn("dave", password="second")).close()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file or directory"),
        (b"", "its first line is empty"),
        (b"\npassword", "its first line is empty"),
        (b"x" * 5000, "its first line has more than 4096 bytes"),
        (b"caf\xe9", "its first line is not UTF-8 text"),
        (b"a\0b", "its first line contains a zero byte"),
    ],
)
def test_password_file_of_no_use_is_logged_and_lets_nobody_in(
    postgres, tmp_path, caplog, content, cause
):
    """The client learns no more than from a wrong password."""
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with Sidecar(
        postgres, users={"dave": {"password_file": str(file)}}, listen={"auth": "scram-sha-256"}
    ) as sidecar:
        assert fail_to_log_in(sidecar, "dave", "password") == (
            'password authentication failed for user "dave"'
        )
    (record,) = [each for each in caplog.records if each.message == "password file cannot be used"]
    assert (record.levelname, vars(record)["user"], vars(record)["cause"]) == (
        "ERROR",
        "dave",
        cause,
    )


def test_password_file_that_would_block_lets_nobody_in(postgres, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with Sidecar(
        postgres, users={"dave": {"password_file": str(pipe)}}, listen={"auth": "scram-sha-256"}
    ) as sidecar:
        assert "authentication failed" in fail_to_log_in(sidecar, "dave", "password")


def test_start_takes_no_longer_with_many_users(postgres):
    """Verifiers are made at the first login: 5,000 of them would take 20 s of CPU."""
    users = {f"user{number}": f"password {number}" for number in range(5000)}
    sidecar = Sidecar(postgres, users=users, listen={"auth": "scram-sha-256"})
    began = time.process_time()
    with sidecar:
        assert time.process_time() - began < 3
        psycopg.connect(sidecar.dsn("user4999", password="password 4999")).close()


# -- steps of the exchange ---------------------------------------------------------------------


def scram(client: Client, user: str = "alice") -> None:
    client.send(startup({"user": user, "database": "main"}))
    assert client.receive() == ("R", struct.pack("!I", 10) + b"SCRAM-SHA-256\0\0")


@pytest.mark.parametrize(
    "answer",
    [
        query("select 1"),
        m.password(b"wonder land\0"),
        m.password(b""),
        m.sasl_initial_response(b"SCRAM-SHA-256-PLUS", b"p=tls-unique,,n=,r=abc"),
        m.sasl_initial_response(b"PLAIN", b"\0alice\0wonder land"),
        m.sasl_initial_response(b"SCRAM-SHA-256", b""),
        m.sasl_initial_response(b"SCRAM-SHA-256", b"n,,n=,r=abc,m=1"),
        m.sasl_initial_response(b"SCRAM-SHA-256", b"p=tls-unique,,n=,r=abc"),
        m.sasl_initial_response(b"SCRAM-SHA-256", b"\xff"),
        b"p" + struct.pack("!I", 3),
        b"p" + struct.pack("!I", 0xFFFFFFFF),
        b"p" + struct.pack("!I", 100_000) + b"x" * 100_000,
    ],
)
def test_wrong_step_of_a_login_is_refused(guarded, answer):
    with guarded.connect() as client:
        scram(client)
        client.send(answer)
        assert error(client.until_closed())["C"] == "08P01"
    guarded.until_whole()


def test_client_that_goes_in_the_middle_of_its_login_leaves_nothing(guarded):
    for data in (b"", b"\0", m.sasl_initial_response(b"SCRAM-SHA-256", b"n,,n=,r=abc")):
        with guarded.connect() as client:
            scram(client)
            client.send(data)
        with guarded.connect() as client:
            scram(client)
            client.send(data)
            client.abort()
    guarded.until_whole()


def test_proof_of_another_login_is_no_proof(guarded):
    """What somebody has overheard is of no use to them: each login has its own nonce."""
    with guarded.connect() as client, guarded.connect() as thief:
        exchange = ClientExchange(USERS["alice"])
        first = m.sasl_initial_response(b"SCRAM-SHA-256", exchange.begin())
        for each in (client, thief):
            scram(each)
            each.send(first)
        proof = m.password(exchange.respond(client.receive().body[4:]))
        thief.receive()
        client.send(proof)
        thief.send(proof)
        assert kinds(client.until_ready()).startswith("RR")
        assert error(thief.until_closed())["C"] == "28P01"


# -- startup -----------------------------------------------------------------------------------


def test_user_is_required_as_by_postgresql(postgres, trusting):
    data = startup({"database": "main"})
    with Client((postgres.host, postgres.port)) as direct:
        direct.send(data)
        expected = error(direct.until_closed())
    fields = refusal(trusting, data)
    assert {key: fields[key] for key in "SVCM"} == {key: expected[key] for key in "SVCM"}


def test_database_is_the_users_name_where_none_is_given(trusting):
    with trusting.connect() as client:
        client.send(startup({"user": "main"}))
        client.until_ready()
    fields = refusal(trusting, startup({"user": "nobody"}))
    assert (fields["C"], fields["M"]) == ("3D000", 'database "nobody" does not exist')


def test_database_of_the_dsn_chooses_the_pool(postgres, trusting):
    with trusting.login(database=postgres.database) as client:
        assert client.value("select current_database()") == postgres.database


@pytest.mark.parametrize("value", ["true", "1", "on", "database"])
def test_replication_is_refused(trusting, value):
    data = startup({"user": "app", "database": "main", "replication": value})
    fields = refusal(trusting, data)
    assert (fields["C"], fields["M"]) == ("0A000", "replication connections cannot be pooled")


@pytest.mark.parametrize("version", [2 << 16, 4 << 16, 1 << 16, 1234 << 16 | 1])
def test_other_protocols_are_refused(trusting, version):
    fields = refusal(trusting, startup({"user": "app"}, version))
    assert (fields["C"], fields["M"].partition(" frontend")[0]) == ("0A000", "unsupported")


def test_libpq_that_wants_the_latest_protocol_gets_in(trusting):
    with psycopg.connect(trusting.dsn(max_protocol_version="latest")) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_startup_of_postgresql_is_told(postgres, trusting):
    """The same parameters with the same values, and keys to cancel with."""
    with (
        Client.login((postgres.host, postgres.port), postgres.user, postgres.database) as direct,
        trusting.login() as client,
    ):
        assert client.parameters == direct.parameters
        assert client.pid
        assert len(client.secret) == len(direct.secret)


def test_keys_to_cancel_with_are_each_clients_own(trusting):
    keys = set()
    for _ in range(20):
        with trusting.login() as client:
            keys.add((client.pid, client.secret))
    assert len({pid for pid, _ in keys}) == len({secret for _, secret in keys}) == 20


def test_client_need_not_wait_for_its_login(trusting):
    """Startup and queries in one go, and more of them than are kept before a login is complete."""
    with trusting.connect() as client:
        data = startup({"user": "app", "database": "main"})
        client.send(data + query("select 1") * 5000)
        client.until_ready(5001)
        assert client.value("select 2") == "2"


# -- encryption --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requests",
    [[SSL_REQUEST], [GSSENC_REQUEST], [SSL_REQUEST, GSSENC_REQUEST], [GSSENC_REQUEST, SSL_REQUEST]],
)
def test_encryption_is_declined_and_the_login_goes_on(trusting, requests):
    with trusting.connect() as client:
        for request in requests:
            client.send(request)
            assert client.socket.recv(10) == b"N"
        client.log_in("app", "main")
        assert client.value("select 1") == "1"


def test_encryption_is_not_asked_for_endlessly(trusting):
    with trusting.connect() as client:
        for _ in range(3):
            client.send(SSL_REQUEST)
            assert client.socket.recv(1) == b"N"
        assert error(client.until_closed())["C"] == "08P01"
    trusting.until_whole()


@pytest.mark.parametrize("behind", [b"x", startup({"user": "app", "database": "main"})])
def test_bytes_behind_an_encryption_request_are_refused(trusting, behind):
    """Whoever sits in between could have put them there, before the encryption (CVE-2021-23214)."""
    assert refusal(trusting, SSL_REQUEST + behind)["C"] == "08P01"


def test_libpq_that_insists_on_encryption_says_so(trusting):
    with pytest.raises(psycopg.OperationalError, match="does not support SSL"):
        psycopg.connect(trusting.dsn(sslmode="require"))
    trusting.until_whole()


# -- sockets, limits ---------------------------------------------------------------------------


def test_unix_socket_leads_to_the_same_pools(postgres, tmp_path):
    options = {"unix_socket_dir": str(tmp_path), "auth": "trust", "port": 0}
    with Sidecar(postgres, listen=options, max_size=1) as sidecar:
        path = tmp_path / f".s.PGSQL.{sidecar.port}"
        with Client.login(str(path)) as client:
            assert client.value("select 1") == "1"
            client.cancel()
        with psycopg.connect(f"host={tmp_path} port={sidecar.port} dbname=main user=app") as other:
            assert other.execute("select 1").fetchone() == (1,)
        sidecar.until_whole()
    assert not path.exists()


def test_clients_beyond_the_limit_are_told(postgres):
    with Sidecar(postgres, max_size=1, listen={"max_clients": 2}) as sidecar:
        with sidecar.login(), sidecar.login() as client:
            data = startup({"user": "app", "database": "main"})
            with sidecar.connect() as third:
                third.send(data)
                fields = error(third.until_closed())
            assert (fields["S"], fields["C"]) == ("FATAL", "53300")
            assert fields["M"] == "sorry, too many clients already"
            assert client.value("select 1") == "1"
        sidecar.until_whole()
        with sidecar.login() as client:
            assert client.value("select 1") == "1"


# -- passwords of servers ----------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["password", "md5", "scram-sha-256"])
def test_server_gets_the_password_it_asks_for(own_postgres, auth):
    server = own_postgres(auth=auth, password="pass wörd")
    with Sidecar(server, max_size=2) as sidecar:
        with sidecar.login() as client:
            assert client.value("select current_user") == server.user
        sidecar.until_whole()
    if auth != "scram-sha-256":
        return  # each start takes a second: the rest is the same for all
    for dsn in (server.dsn(password="wrong"), server.dsn(password="")):
        with Sidecar(pools={"main": {"dsn": dsn}}) as sidecar:
            fields = refusal(sidecar, startup({"user": "app", "database": "main"}))
            assert fields["C"] == "28P01"
            assert "wrong" not in str(fields)


def test_database_that_the_server_does_not_have_is_told(postgres):
    with Sidecar(pools={"main": {"dsn": postgres.dsn(database="nowhere")}}) as sidecar:
        fields = refusal(sidecar, startup({"user": "app", "database": "main"}))
    assert (fields["C"], fields["M"]) == ("3D000", 'database "nowhere" does not exist')


def test_copy_data_is_no_login(trusting):
    assert refusal(trusting, copy_data(b"x" * 100))["C"] == "08P01"
