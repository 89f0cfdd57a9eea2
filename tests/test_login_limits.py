"""How many clients get in, how long those who fail wait, and who learns of it."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from sidecar.protocol import messages as m
from tests.sidecar_process import PATIENCE
from tests.sidecar_process import Sidecar as Addresses
from tests.test_cancel import until_running
from tests.wire import Client, Sidecar, error, kinds, query, startup

USERS: Mapping[str, str | Mapping[str, object]] = {
    "alice": {"password": "wonder land", "max_clients": 2},
    "bob": "builder",
}


@pytest.fixture(scope="module")
def limited(postgres):
    pools = {
        "main": {"dsn": postgres.dsn(), "max_size": 2, "max_clients": 3},
        "other": {"dsn": postgres.dsn(), "max_size": 2},
    }
    listen = {"auth": "scram-sha-256"}
    with Sidecar(pools=pools, users=USERS, listen=listen) as sidecar:
        yield sidecar


def connect(sidecar: Sidecar, user: str, database: str = "main", password: str | None = None):
    password = password or {"alice": "wonder land", "bob": "builder"}[user]
    return psycopg.connect(sidecar.dsn(user, database, password=password))


def refusal(sidecar: Sidecar, *arguments: str) -> list[str]:
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(sidecar, *arguments)
    return str(caught.value).partition("FATAL:")[2].strip().splitlines()


def counted(sidecar: Sidecar, outcome: str) -> float:
    """Clients so far whose login ended like this."""
    metrics = Addresses(sidecar.port, sidecar.service.http_address[1]).scrape()
    return metrics.total("pgsidecar_client_connections_total", outcome=outcome)


def test_clients_of_a_user_are_limited_over_all_pools(limited):
    with connect(limited, "alice"), connect(limited, "alice", "other"):
        for database in ("main", "other"):
            assert refusal(limited, "alice", database) == [
                'too many connections for user "alice"',
                "DETAIL:  2 clients of this user are connected.",
                "HINT:  The limit is users.alice.max_clients.",
            ]
        connect(limited, "bob").close()
    limited.until_whole()
    with connect(limited, "alice"), connect(limited, "alice"):
        pass
    limited.until_whole()


def test_clients_of_a_pool_are_limited_over_all_users(limited):
    with connect(limited, "alice"), connect(limited, "bob"), connect(limited, "bob"):
        assert refusal(limited, "bob") == [
            'too many connections for pool "main"',
            "DETAIL:  3 clients of this pool are connected.",
            "HINT:  The limit is pools.main.max_clients.",
        ]
        connect(limited, "bob", "other").close()
    limited.until_whole()
    connect(limited, "bob").close()
    limited.until_whole()


def test_limits_are_told_to_those_who_have_logged_in(limited):
    """From the rest they are hidden by the same words as ever."""
    with connect(limited, "alice"), connect(limited, "alice"), connect(limited, "bob"):
        for user in ("alice", "bob", "stranger"):
            assert refusal(limited, user, "main", "guess") == [
                f'password authentication failed for user "{user}"'
            ]
    limited.until_whole()


def test_limit_reached_is_counted_as_rejected(postgres):
    pools = {"main": {"dsn": postgres.dsn(), "max_size": 1, "max_clients": 1}}
    with Sidecar(pools=pools) as sidecar:
        with sidecar.login(), sidecar.connect() as second:
            second.send(startup({"user": "app", "database": "main"}))
            fields = error(second.until_closed())
            assert (fields["S"], fields["C"]) == ("FATAL", "53300")
        sidecar.until_whole()
        assert counted(sidecar, "rejected") == 1


def test_those_who_wait_for_the_server_are_counted_before_they_get_in(own_postgres):
    """All of them were below the limit when they came: the server was not there yet."""
    server = own_postgres()
    server.pause()
    pools = {"main": {"dsn": server.dsn(), "max_size": 1, "max_clients": 2}}
    with Sidecar(pools=pools, listen={"max_clients": 3}) as sidecar:
        clients = [sidecar.connect() for _ in range(5)]
        for client in clients:
            client.send(startup({"user": "app", "database": "main"}))
        sidecar.until(lambda: len(sidecar.pool.opener._logins) == 5, "all wait for the server")
        server.resume()
        ends = [client.until("ZE")[-1].kind for client in clients]
        assert sorted(ends) == ["E", "E", "E", "Z", "Z"]


# -- in login ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(postgres):
    listen = {"auth": "scram-sha-256", "max_logins": 2}
    with Sidecar(postgres, users=USERS, listen=listen, max_size=1) as sidecar:
        yield sidecar


def half_logged_in(sidecar: Sidecar) -> Client:
    client = sidecar.connect()
    client.send(startup({"user": "alice", "database": "main"}))
    assert client.receive().kind == "R"
    return client


def test_clients_in_login_are_limited(narrow):
    with half_logged_in(narrow), half_logged_in(narrow):
        with narrow.connect() as third:
            third.send(startup({"user": "alice", "database": "main"}))
            fields = error(third.until_closed())
        assert (fields["S"], fields["C"]) == ("FATAL", "53300")
        assert fields["M"] == "sorry, too many clients in login already"
        assert fields["D"] == "2 clients are in login."
        assert fields["H"] == "The limit is listen.max_logins."
    narrow.until_whole()
    connect(narrow, "alice").close()
    narrow.until_whole()


def test_clients_logged_in_do_not_count_as_in_login(narrow):
    with connect(narrow, "alice"), connect(narrow, "alice"), connect(narrow, "bob") as third:
        assert third.execute("select 1").fetchone() == (1,)
    narrow.until_whole()


def test_cancel_request_gets_through_while_all_places_are_taken(narrow, postgres):
    """It is the way to make room. libpq asks for encryption first, as it would for a login."""
    with connect(narrow, "bob") as connection, ThreadPoolExecutor(1) as thread:
        running = thread.submit(connection.execute, "select pg_sleep(61)")
        until_running(postgres, "select pg_sleep(61)")  # a backend at rest ignores the request
        with half_logged_in(narrow), half_logged_in(narrow):
            connection.cancel_safe(timeout=5)
            with pytest.raises(psycopg.errors.QueryCanceled):
                running.result(PATIENCE)
    narrow.until_whole()


# -- delay -------------------------------------------------------------------------------------


def timed_refusal(sidecar: Sidecar, user: str, password: str) -> float:
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(sidecar, user, "main", password)
    return time.monotonic() - began


def test_failed_login_is_answered_late_and_counted(postgres):
    """A wrong password as late as a user that there is not. Nobody else is held up."""
    listen = {"auth": "scram-sha-256", "auth_failure_delay": "700ms"}
    with Sidecar(postgres, users=USERS, listen=listen, max_size=1) as sidecar:
        for user in ("bob", "stranger"):
            assert 0.7 <= timed_refusal(sidecar, user, "guess") < 5
        with sidecar.connect() as client:
            scram_wrongly(client)
            began = time.monotonic()
            connect(sidecar, "bob").close()
            assert time.monotonic() - began < 0.6
            assert client.until("E")[-1].fields["C"] == "28P01"
        sidecar.until_whole()
        assert counted(sidecar, "auth_failed") == 3


def scram_wrongly(client: Client) -> None:
    """Up to the proof that is none."""
    client.send(startup({"user": "bob", "database": "main"}))
    assert client.receive().kind == "R"
    client.send(m.sasl_initial_response(b"SCRAM-SHA-256", b"n,,n=,r=abc"))
    nonce = client.receive().body[4:].split(b",")[0]
    client.send(m.password(b"c=biws," + nonce + b",p=" + b"A" * 43 + b"="))


def test_delay_is_not_cut_short_by_a_client_that_talks_on(postgres):
    listen = {"auth": "scram-sha-256", "auth_failure_delay": "500ms"}
    with Sidecar(postgres, users=USERS, listen=listen, max_size=1) as sidecar:
        with sidecar.connect() as client:
            scram_wrongly(client)
            began = time.monotonic()
            for _ in range(20):
                client.send(query("select 1"))
            assert kinds(client.until_closed()) == "E"
            assert time.monotonic() - began >= 0.45
        sidecar.until_whole()


def test_delay_ends_with_the_client(postgres):
    listen = {"auth": "scram-sha-256", "auth_failure_delay": "50s", "login_timeout": "60s"}
    with Sidecar(postgres, users=USERS, listen=listen, max_size=1) as sidecar:
        with sidecar.connect() as client:
            scram_wrongly(client)
        sidecar.until_whole()


def test_delay_ends_with_the_time_for_the_login(postgres):
    """And the answer is still that of a failed login."""
    listen = {"auth": "scram-sha-256", "auth_failure_delay": "50s", "login_timeout": "1s"}
    with Sidecar(postgres, users=USERS, listen=listen, max_size=1) as sidecar:
        assert timed_refusal(sidecar, "bob", "guess") < 5
        sidecar.until_whole()
