"""Who a client is for the server: in session mode its own backend, in every mode its own settings."""

import contextlib
from typing import Any

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import MakeService, ServiceHere
from tests.test_isolation import BROUGHT
from tests.wire import Client, Sidecar, kinds, query, startup

MODES = ["transaction", "session", "statement"]


async def connect(sidecar: ServiceHere, **parameters: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(sidecar.dsn(**parameters), autocommit=True)


async def one(conn: psycopg.AsyncConnection[Any], text: str, *values: object) -> Any:
    row = await (await conn.execute(text, values or None)).fetchone()
    assert row is not None
    return row[0]


# -- the backend -----------------------------------------------------------------------------------


async def test_in_session_mode_the_pid_is_the_backends(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    """pg_stat_activity, pg_terminate_backend and the sender of a notification mean the client."""
    sidecar = await make_service(postgres.dsn(), max_size=3, mode="session")
    async with await connect(sidecar) as conn, await connect(sidecar) as other:
        pid = conn.info.backend_pid
        assert pid == await one(conn, "SELECT pg_backend_pid()")
        state = "SELECT state FROM pg_stat_activity WHERE pid = %s"
        assert await one(other, state, pid) == "idle"
        await conn.execute("LISTEN identity")
        await conn.execute("NOTIFY identity, 'mine'")
        await other.execute("NOTIFY identity, 'others'")
        await conn.execute("SELECT 1")
        heard = [n async for n in conn.notifies(timeout=1, stop_after=2)]
        assert [(n.payload, n.pid == pid) for n in heard] == [("mine", True), ("others", False)]
        assert await one(other, "SELECT pg_terminate_backend(%s)", pid)
        with pytest.raises(psycopg.errors.AdminShutdown):
            await conn.execute("SELECT 1")
        assert await one(other, "SELECT 1") == 1


def test_a_key_of_one_backend_cancels_the_client_that_has_it_now(postgres) -> None:
    """One connection, one client after the other: the old key is worth nothing."""
    with Sidecar(postgres, max_size=1, mode="session") as sidecar:
        with sidecar.login() as former:
            assert former.value("select 1") == "1"
        with sidecar.login() as client:
            assert client.pid == former.pid
            assert client.secret != former.secret
            client.send(query("select pg_sleep(0.7), 'done'"))
            client.cancel(former.pid, former.secret)
            assert "E" not in kinds(client.until_ready())
            client.send(query("select pg_sleep(60)"))
            active = "select count(*) from pg_stat_activity where query ~ '[(]60[)]' and state = 'active'"
            sidecar.until(lambda: "1" in postgres.psql(active), "it runs")
            client.cancel()
            assert kinds(client.until_ready()) == "TEZ"
        sidecar.until_whole()


async def test_in_session_mode_the_login_waits_for_a_connection(
    postgres: EmbeddedPostgres, make_service: MakeService
) -> None:
    sidecar = await make_service(
        postgres.dsn(), max_size=1, mode="session", acquire_timeout="300ms"
    )
    holder = await connect(sidecar, application_name="holder")
    with pytest.raises(psycopg.OperationalError, match="no connection from pool 'main'"):
        await connect(sidecar)
    assert (await sidecar.metrics()).acquires == {"immediate": 1, "timeout": 1}
    await holder.close()
    await sidecar.until_whole()
    async with await connect(sidecar) as conn:
        assert await one(conn, "SELECT 1") == 1


@pytest.mark.parametrize("mode", MODES)
def test_client_that_goes_amid_its_first_lease_leaves_nothing(postgres, mode) -> None:
    """While it waits, and while its settings are tried."""
    with Sidecar(postgres, max_size=1, mode=mode) as sidecar:
        with sidecar.login() as client:
            for number in range(100):
                with Client(sidecar.address) as goes:
                    goes.send(
                        startup(
                            {"user": "x", "database": "main", "search_path": f"s{mode}{number}"}
                        )
                    )
                    if number % 2:
                        goes.abort()
                assert client.value("select 1") == "1"
        with sidecar.login() as client:
            assert client.value("show search_path") == '"$user", public'
        sidecar.until_whole()


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("brought", BROUGHT, ids=str)
def test_parameters_are_told_at_login_as_by_the_server(postgres, mode, brought) -> None:
    """All of them, in the server's own spelling, and nothing is added later."""

    def told(client: Client) -> dict[str, str]:
        at_login = dict(client.parameters)
        assert kinds(client.ask(query("select 1"))) == "TDCZ"  # no ParameterStatus
        with contextlib.suppress(KeyError):
            del at_login["session_authorization"]
        return at_login

    direct = Client.login(
        (postgres.host, postgres.port), postgres.user, postgres.database, **brought
    )
    with direct, Sidecar(postgres, max_size=2, mode=mode) as sidecar:
        expected = told(direct)
        for _ in range(3):  # the first time it is tried on a server connection, then it is known
            with sidecar.login(**brought) as client:
                assert told(client) == expected
        sidecar.until_whole()


def test_known_settings_need_no_server_at_login(postgres) -> None:
    with Sidecar(postgres, max_size=1) as sidecar:
        with sidecar.login(TimeZone="Asia/Tokyo") as client:
            client.rows("begin")
            with sidecar.login(TimeZone="Asia/Tokyo", application_name="any") as other:
                assert other.parameters["TimeZone"] == "Asia/Tokyo"
                client.rows("commit")
                assert other.value("show application_name") == "any"
        sidecar.until_whole()


@pytest.mark.parametrize("way", ["at login", "as SET"])
def test_nothing_runs_under_another_role_than_the_clients(postgres, way) -> None:
    """It was accepted once, then taken away: what comes next must not run with the pool's own rights."""
    postgres.psql("""
        drop table if exists roles_seen; drop role if exists identity_role; drop role if exists identity_user;
        create role identity_user login; create role identity_role;
        grant identity_role to identity_user; create table roles_seen (who text);
        grant all on roles_seen to public
    """)
    insert = "insert into roles_seen values (current_user)"
    with Sidecar(postgres, dsn=postgres.dsn(user="identity_user"), max_size=2) as sidecar:
        if way == "at login":
            client = sidecar.login(options="-c role=identity_role")
        else:
            client = sidecar.login()
            client.rows("set role identity_role")
        client.rows(insert)
        if way == "at login":
            with sidecar.login() as other:  # without a role: the next lease has to set it again
                other.rows("select 1")
        postgres.psql("revoke identity_role from identity_user")
        if way == "at login":
            client.send(query(insert))
            assert kinds(client.until_closed()) == "E"
        else:
            client.rows(insert)  # as on a direct connection: the role stays until it is set again
        client.socket.close()
        sidecar.until_whole()
    assert set(postgres.psql("select who from roles_seen").split()) == {"identity_role"}
    postgres.psql("drop table roles_seen; drop role identity_role; drop role identity_user")
