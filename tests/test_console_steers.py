"""The console's commands that do something: to pools, to clients, to the sidecar itself."""

import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.sidecar_process import SidecarProcess, eventually
from tests.test_console import CONSOLE, one, table
from tests.wire import Client, Sidecar, error, kinds, query


@pytest.fixture
def sidecar(postgres) -> Iterator[Sidecar]:
    with Sidecar(postgres, console=CONSOLE, max_size=3, min_idle=1, acquire_timeout="20s") as it:
        yield it


@pytest.fixture
def admin(sidecar: Sidecar) -> Client:
    return sidecar.login("admin", "pgsidecar")


def done(client: Client, command: str) -> None:
    """It must be answered with its own tag."""
    found = client.ask(query(command))
    assert kinds(found) == "CZ", [message.fields for message in found if message.kind == "E"]
    assert found[0].body == command.split()[0].encode() + b"\0"


def backends(postgres, application: str) -> int:
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{application}'"
    return int(postgres.psql(sql))


# -- pause -----------------------------------------------------------------------------------------


def test_pause_waits_for_transactions_and_closes_every_connection(sidecar, admin, postgres):
    """What runs may finish; when PAUSE returns, PostgreSQL can be restarted."""
    client = sidecar.login()
    client.ask(query("BEGIN"))
    admin.send(query("PAUSE"))
    sidecar.until(lambda: sidecar.pool.opener.is_paused, "it is paused")
    looker = sidecar.login("stats", "pgsidecar")
    assert one(looker, "SHOW DATABASES", name="main")["paused"] == "1"
    assert client.value("SELECT 1") == "1"
    assert len(sidecar.pool.state.active) == 1
    client.ask(query("COMMIT"))
    assert kinds(admin.until_ready()) == "CZ"
    assert sidecar.pool.state.size == 0
    assert one(looker, "SHOW STATE", key="paused")["value"] == "yes"
    done(admin, "RESUME")


def test_new_requests_wait_for_resume(sidecar, admin):
    client = sidecar.login()
    done(admin, "PAUSE main")
    client.send(query("SELECT 1"))
    sidecar.until(lambda: sidecar.pool.state.waiters, "it waits")
    late = sidecar.login()
    late.send(query("SELECT 2"))
    sidecar.until(lambda: len(sidecar.pool.state.waiters) == 2, "both wait")
    first, _ = table(admin, "SHOW WAITS")
    assert first["reason"] == "the pool is paused"
    assert sidecar.pool.state.size == 0
    done(admin, "RESUME main")
    assert kinds(client.until_ready()) == kinds(late.until_ready()) == "TDCZ"
    assert one(admin, "SHOW DATABASES", name="main")["paused"] == "0"


def test_who_waits_for_a_paused_pool_is_told_so_in_the_end(postgres):
    with Sidecar(postgres, console=CONSOLE, acquire_timeout="200ms") as sidecar:
        admin, client = sidecar.login("admin", "pgsidecar"), sidecar.login()
        done(admin, "PAUSE")
        found = error(client.ask(query("SELECT 1")))
        assert found["C"] == "53300"
        assert "it is paused" in found["M"]
        assert "RESUME" in found["H"]
        done(admin, "RESUME")
        assert client.value("SELECT 1") == "1"


@pytest.mark.parametrize("how", ["cancel", "leave"])
def test_an_interrupted_pause_is_taken_back(sidecar, admin, how):
    """Nobody is left with half a pause that nobody remembers."""
    client = sidecar.login()
    client.ask(query("BEGIN"))
    admin.send(query("PAUSE"))
    sidecar.until(lambda: sidecar.pool.opener.is_paused, "it is paused")
    if how == "cancel":
        admin.cancel()
        assert error(admin.until_ready())["C"] == "57014"
        assert len(table(admin, "SHOW POOLS")) == 2
    else:
        admin.abort()
    sidecar.until(lambda: not sidecar.pool.opener.is_paused, "it goes on")
    assert client.value("SELECT 1") == "1"
    assert sidecar.login().value("SELECT 1") == "1"


def test_resume_of_what_is_not_paused_is_an_error(admin):
    found = error(admin.ask(query("RESUME")))
    assert (found["C"], found["M"]) == ("55000", "pool main is not paused")


def test_a_restart_behind_a_pause_is_not_noticed(own_postgres):
    """What PAUSE is for."""
    server = own_postgres()
    with Sidecar(server, console=CONSOLE, min_idle=2) as sidecar:
        admin, client = sidecar.login("admin", "pgsidecar"), sidecar.login()
        assert client.value("SELECT 1") == "1"
        done(admin, "PAUSE")
        client.send(query("SELECT 2"))
        server.restart()
        done(admin, "RESUME")
        assert kinds(client.until_ready()) == "TDCZ"


@pytest.mark.parametrize(
    "command", ["PAUSE", "RESUME", "RECONNECT", "KILL", "DISABLE", "ENABLE", "WAIT_CLOSE"]
)
def test_an_unknown_database_is_refused(admin, command):
    found = error(admin.ask(query(f"{command} nowhere")))
    assert (found["C"], found["M"]) == ("3D000", 'database "nowhere" does not exist')


# -- reconnect -------------------------------------------------------------------------------------


def test_reconnect_replaces_each_connection_when_it_is_released(sidecar, admin):
    client = sidecar.login()
    client.ask(query("BEGIN"))
    before = client.value("SELECT pg_backend_pid()")
    done(admin, "RECONNECT")
    assert one(admin, "SHOW SERVERS", remote_pid=str(before))["close_needed"] == "1"
    assert client.value("SELECT pg_backend_pid()") == before
    admin.send(query("WAIT_CLOSE main"))
    other = sidecar.login()
    assert other.value("SELECT pg_backend_pid()") != before  # new ones can be had meanwhile
    client.ask(query("COMMIT"))
    assert kinds(admin.until_ready()) == "CZ"
    after = client.value("SELECT pg_backend_pid()")
    assert after != before
    assert {row["close_needed"] for row in table(admin, "SHOW SERVERS")} == {"0"}
    closed = sidecar.service.recorder.pools["main"].closed
    assert closed["reconnect"] >= 1
    assert closed["max_lifetime"] == 0


# -- kill ------------------------------------------------------------------------------------------


def test_kill_drops_clients_and_connections_and_pauses(sidecar, admin):
    idle, busy, left_open = (sidecar.login() for _ in range(3))
    assert idle.value("SELECT 1") == "1"
    left_open.ask(query("BEGIN"))
    busy.send(query("SELECT pg_sleep(60)"))
    sidecar.until(lambda: len(sidecar.pool.state.active) == 2, "two have connections")
    done(admin, "KILL main")
    for client in (idle, busy, left_open):
        found = error(client.until_closed())
        assert (found["S"], found["C"]) == ("FATAL", "57P01")
        assert found["M"] == "terminating connection due to administrator command"
    sidecar.until(lambda: not sidecar.pool.state.size, "all connections are closed")
    late = sidecar.login()
    late.send(query("SELECT 1"))
    sidecar.until(lambda: sidecar.pool.state.waiters, "it waits")
    done(admin, "RESUME main")
    assert kinds(late.until_ready()) == "TDCZ"
    assert sidecar.service.recorder.pools["main"].closed["killed"] >= 2


def test_kill_ends_the_wait_of_clients(sidecar, admin):
    holders = [sidecar.login() for _ in range(3)]
    for holder in holders:
        holder.ask(query("BEGIN"))
    waiter = sidecar.login()
    waiter.send(query("SELECT 1"))
    sidecar.until(lambda: sidecar.pool.state.waiters, "it waits")
    done(admin, "KILL main")
    assert error(waiter.until_closed())["C"] == "57P01"
    done(admin, "RESUME")
    sidecar.until_whole(clients=1)


def test_kill_client_ends_that_one_and_what_it_runs(sidecar, admin, postgres):
    clients = [sidecar.login(application_name=f"kill {n}") for n in range(2)]
    for client in clients:
        client.send(query("SELECT pg_sleep(60)"))
    sidecar.until(lambda: len(sidecar.pool.state.active) == 2, "both run")
    victim = one(admin, "SHOW CLIENTS", application_name="kill 0")
    done(admin, f"KILL_CLIENT {victim['id']}")
    assert error(clients[0].until_closed())["C"] == "57P01"
    eventually(lambda: backends(postgres, "kill 0") == 0, "its backend runs no more")
    assert backends(postgres, "kill 1") == 1
    clients[1].cancel()
    assert error(clients[1].until_ready())["C"] == "57014"


def test_kill_client_knows_the_console_s_clients_and_nobody_else(sidecar, admin):
    other = sidecar.login("stats", "pgsidecar")
    found = one(admin, "SHOW CLIENTS", user="stats")
    done(admin, f"KILL_CLIENT {found['id']}")
    assert error(other.until_closed())["C"] == "57P01"
    assert error(admin.ask(query("KILL_CLIENT 99999")))["C"] == "42704"


def test_a_client_that_does_not_read_is_killed_too(sidecar, admin):
    client = sidecar.login("deaf")
    client.send(query("SELECT repeat('x', 1000) FROM generate_series(1, 100000)"))
    sidecar.until(lambda: sidecar.operations.listener.relays()[0].is_write_paused, "it is deaf")
    done(admin, f"KILL_CLIENT {one(admin, 'SHOW CLIENTS', user='deaf')['id']}")
    sidecar.until_whole(clients=1)


# -- disable ---------------------------------------------------------------------------------------


def test_disable_refuses_new_clients_and_keeps_the_others(sidecar, admin):
    client = sidecar.login()
    done(admin, "DISABLE main")
    assert client.value("SELECT 1") == "1"
    with pytest.raises(AssertionError, match="not currently accepting connections"):
        sidecar.login()
    assert one(admin, "SHOW DATABASES", name="main")["disabled"] == "1"
    done(admin, "ENABLE main")
    assert sidecar.login().value("SELECT 1") == "1"


# -- shutdown --------------------------------------------------------------------------------------


@pytest.fixture
def process(make_process, postgres) -> SidecarProcess:
    made: SidecarProcess = make_process(postgres.dsn(), console=CONSOLE, drain_timeout="30s")
    return made


def login(process: SidecarProcess, user: str = "app", database: str = "main") -> Client:
    return Client.login(("127.0.0.1", process.pg_port), user, database)


def listens(process: SidecarProcess) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", process.pg_port)) == 0


def test_shutdown_ends_at_once(process):
    with login(process) as client, login(process, "admin", "pgsidecar") as admin:
        client.ask(query("BEGIN"))
        began = time.monotonic()
        admin.send(query("SHUTDOWN"))
        assert kinds(admin.until_closed()) == "CZE"
        assert error(client.until_closed())["C"] == "57P01"
        assert process.wait() == 0
        assert time.monotonic() - began < 8


def test_shutdown_that_waits_for_servers_lets_transactions_finish(process):
    """As long as they take. Who has no lease is sent away, nobody new is let in, and the console
    shows how it goes."""
    with (
        login(process) as client,
        login(process) as idle,
        login(process, "admin", "pgsidecar") as admin,
    ):
        client.ask(query("BEGIN"))
        done(admin, "SHUTDOWN WAIT_FOR_SERVERS")
        assert error(idle.until_closed())["C"] == "57P01"
        eventually(lambda: not listens(process), "nobody new is let in")
        assert client.value("SELECT 1") == "1"
        assert len(table(admin, "SHOW HOLDERS")) == 1
        client.send(query("COMMIT"))
        assert error(client.until_closed())["C"] == "57P01"
        assert process.wait() == 0


def test_shutdown_that_waits_for_clients_lets_them_stay(process):
    with login(process) as client, login(process, "admin", "pgsidecar") as admin:
        done(admin, "SHUTDOWN WAIT_FOR_CLIENTS")
        eventually(lambda: not listens(process), "nobody new is let in")
        for _ in range(3):
            assert client.value("SELECT 1") == "1"
        assert process.process.poll() is None
        client.send(b"X\0\0\0\4")
        assert process.wait() == 0


def test_a_signal_hurries_a_shutdown_that_waits(process):
    """Clients that never leave do not keep it alive for ever."""
    with login(process) as client, login(process, "admin", "pgsidecar") as admin:
        done(admin, "SHUTDOWN WAIT_FOR_CLIENTS")
        process.process.send_signal(signal.SIGTERM)
        assert error(client.until_closed())["C"] == "57P01"
        assert process.wait() == 0
