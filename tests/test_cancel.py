"""Cancel requests: the query of who asked, or nothing."""

import asyncio
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator

import asyncpg
import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import PATIENCE, eventually
from tests.tap import Tap
from tests.wire import SYNC, Client, Sidecar, bind, error, execute, kinds, parse, query, run

LONG = "select pg_sleep(60)"
CANCELLED = "canceling statement due to user request"


@pytest.fixture(params=["transaction", "session"])
def sidecar(postgres, request) -> Iterator[Sidecar]:
    with Sidecar(postgres, max_size=3, mode=request.param) as running:
        yield running


def running_queries(postgres: EmbeddedPostgres, text: str) -> int:
    """How many backends run this."""
    with Client.login((postgres.host, postgres.port), postgres.user, postgres.database) as client:
        where = "state = 'active' and pid <> pg_backend_pid()"
        found = client.rows(f"select query from pg_stat_activity where {where}")
        return sum(text in (row[0] or "") for row in found)


def until_running(postgres: EmbeddedPostgres, text: str, count: int = 1) -> None:
    eventually(lambda: running_queries(postgres, text) == count, f"{count} x {text!r} run")


# -- the right one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "send", [query(LONG), run(LONG), parse(LONG, "s") + bind(name="s") + execute() + SYNC]
)
def test_query_of_who_asked_is_cancelled(postgres, sidecar, send):
    with sidecar.login() as client, sidecar.login() as other:
        for each in (client, other):
            each.send(send)
        until_running(postgres, LONG, 2)
        client.cancel()
        answer = client.until_ready()
        assert error(answer)["C"] == "57014"
        assert error(answer)["M"] == CANCELLED
        assert client.value("select 1") == "1"
        assert running_queries(postgres, LONG) == 1
        other.cancel()
        assert error(other.until_ready())["C"] == "57014"
    sidecar.until_whole()


def test_cancelled_query_fails_its_transaction(postgres, sidecar):
    with sidecar.login() as client:
        client.rows("begin")
        client.send(query(LONG))
        until_running(postgres, LONG)
        client.cancel()
        assert client.until_ready()[-1].body == b"E"
        client.rows("rollback")
        assert client.value("select 1") == "1"
    sidecar.until_whole()


def test_pipeline_goes_on_behind_a_cancelled_query(postgres, sidecar):
    with sidecar.login() as client:
        client.send(run("select 1") + run(LONG) + run("select 3"))
        until_running(postgres, LONG)
        client.cancel()
        answer = client.until_ready(3)
        assert kinds(answer) == "12TDCZ12TEZ12TDCZ"
    sidecar.until_whole()


def test_interrupt_of_psql_cancels(postgres, sidecar):
    psql = subprocess.Popen(
        [postgres.bin_dir / "psql", "-XqAt", "-d", sidecar.dsn()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert psql.stdin is not None
        psql.stdin.write(f"{LONG};\n")
        psql.stdin.flush()
        until_running(postgres, LONG)
        psql.send_signal(signal.SIGINT)
        eventually(lambda: running_queries(postgres, LONG) == 0, "it is cancelled")
        # psql ends with an interrupt where its input is not a terminal: what counts is what it says
        out, err = psql.communicate("select 'went on';\n", timeout=PATIENCE)
    finally:
        psql.kill()
        psql.communicate()
    assert CANCELLED in err
    assert out in ("", "went on\n")
    sidecar.until_whole()


def check_cancel_safe(
    postgres: EmbeddedPostgres, connection: psycopg.Connection[tuple[object, ...]]
) -> None:
    """libpq's own cancel request, from another thread, ends the query that runs."""
    failed: list[str | None] = []

    def work() -> None:
        try:
            connection.execute(LONG)
        except psycopg.Error as exc:
            failed.append(exc.sqlstate)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until_running(postgres, LONG)
    connection.cancel_safe()
    thread.join(PATIENCE)
    assert failed == ["57014"]


def test_psycopg_cancels(postgres, sidecar):
    """Not with ``cancel()``: it keeps the sidecar, in this process, from running (psql's is the same)."""
    with psycopg.connect(sidecar.dsn(), autocommit=True) as connection:
        check_cancel_safe(postgres, connection)
        assert connection.execute("select 1").fetchone() == (1,)
    sidecar.until_whole()


async def test_timeout_of_asyncpg_cancels(postgres, sidecar):
    connection = await asyncpg.connect(sidecar.dsn())
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await connection.execute(LONG, timeout=0.05)
        assert await connection.fetchval("select 1") == 1
    task = asyncio.create_task(connection.execute(LONG))
    await asyncio.to_thread(until_running, postgres, LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await connection.fetchval("select 1") == 1
    assert await asyncio.to_thread(running_queries, postgres, LONG) == 0
    await connection.close()
    await asyncio.to_thread(sidecar.until_whole)


def test_copy_out_is_cancelled(sidecar):
    with sidecar.login() as client:
        client.send(
            query("copy (select generate_series(1, 1000000000), repeat('x', 1000)) to stdout")
        )
        client.until("d")
        client.cancel()
        assert error(client.until_ready())["C"] == "57014"
        assert client.value("select 1") == "1"
    sidecar.until_whole()


def test_query_of_a_client_that_goes_is_cancelled(postgres, sidecar):
    with sidecar.login() as client:
        client.send(query(LONG))
        until_running(postgres, LONG)
        client.abort()
    eventually(lambda: running_queries(postgres, LONG) == 0, "it is cancelled")
    sidecar.until_whole()


@pytest.mark.parametrize("delay", [0, 1])
def test_nothing_runs_on_for_a_client_that_is_gone(postgres, delay):
    """One cancel ends one query, and none if it comes before the query has begun."""
    with Sidecar(postgres, max_size=1) as sidecar:
        for _ in range(5):
            with sidecar.login() as client:
                client.send(run(LONG) * 3)
                if delay:
                    until_running(postgres, LONG)
            with sidecar.login() as other:
                assert other.value("select 1") == "1"
            assert running_queries(postgres, LONG) == 0
        sidecar.until_whole()


# -- nothing -----------------------------------------------------------------------------------


def test_wrong_key_cancels_nothing(postgres, sidecar):
    with sidecar.login() as client, sidecar.login() as other:
        client.send(query(LONG))
        until_running(postgres, LONG)
        wrong = bytes(byte ^ 1 for byte in client.secret)
        for pid, secret in [
            (client.pid, wrong),
            (client.pid, other.secret),
            (client.pid + 1000, client.secret),
            (0, bytes(4)),
            (0xFFFFFFFF, client.secret),
            (client.pid, client.secret + b"\0"),
            (client.pid, b"x" * 256),
            (client.pid, client.secret[:3] + b"\0" + client.secret[3:]),
        ]:
            client.cancel(pid, secret)
        assert other.value("select 1") == "1"
        assert running_queries(postgres, LONG) == 1
        client.cancel()
        assert error(client.until_ready())["C"] == "57014"
    sidecar.until_whole()


def test_keys_of_a_server_connection_are_not_a_clients(postgres, sidecar):
    """What PostgreSQL gave us is between us and it."""
    with sidecar.login() as client:
        client.send(query(LONG))
        until_running(postgres, LONG)
        (server,) = sidecar.pool.state.active
        client.cancel(server.pid, server.secret)
        assert running_queries(postgres, LONG) == 1
        client.cancel()
        client.until_ready()


def test_idle_client_has_nothing_to_cancel(sidecar):
    with sidecar.login() as client:
        for _ in range(30):
            client.cancel()
            assert client.value("select pg_sleep(0.001)") == ""
        client.rows("begin")
        client.cancel()
        assert client.value("select pg_sleep(0.01)") == ""
        client.rows("commit")
    sidecar.until_whole()


def test_key_of_a_client_that_is_gone_cancels_nothing(postgres, sidecar):
    with sidecar.login() as gone:
        pid, secret = gone.pid, gone.secret
    sidecar.until_whole()
    with sidecar.login() as client:
        client.send(query("select pg_sleep(0.2)"))
        client.cancel(pid, secret)
        assert kinds(client.until_ready()) == "TDCZ"


# -- in the queue ------------------------------------------------------------------------------


def test_waiting_client_is_cancelled_out_of_the_queue(postgres):
    with Sidecar(postgres, max_size=1) as sidecar:
        with sidecar.login() as holder, sidecar.login() as client, sidecar.login() as third:
            holder.rows("begin")
            for data in (query("select 1"), run("select 1")):
                client.send(data)
                sidecar.until(lambda: len(sidecar.pool.state.waiters) == 1, "it waits")
                third.send(query("select 'third'"))
                sidecar.until(lambda: len(sidecar.pool.state.waiters) == 2, "both wait")
                client.cancel()
                answer = client.until_ready()
                assert kinds(answer) == "EZ"
                assert (error(answer)["S"], error(answer)["C"]) == ("ERROR", "57014")
                assert error(answer)["M"] == CANCELLED
                holder.rows("commit")
                assert kinds(third.until_ready()) == "TDCZ"
                assert client.value("select 2") == "2"
                holder.rows("begin")
        sidecar.until_whole()


# -- only in time ------------------------------------------------------------------------------


class SlowCancels(Tap):
    """A way to PostgreSQL on which cancel requests wait until they are let through."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        super().__init__(postgres.port)
        self.held = threading.Event()
        self.go = threading.Event()

    def __exit__(self, *exc: object) -> None:
        self.go.set()
        super().__exit__(*exc)

    def serve(self, client: socket.socket) -> None:
        head = client.recv(8, socket.MSG_WAITALL)
        if struct.unpack("!II", head)[1] == 80877102:
            self.held.set()
            assert self.go.wait(PATIENCE)
        self.pass_on(client, head)


def test_late_cancel_hits_nobody(postgres):
    """The query has ended before the cancel arrives: until then nobody gets the connection, and who
    asked is not told that it has been done."""
    with (
        SlowCancels(postgres) as way,
        Sidecar(postgres_on(way, postgres), max_size=1) as sidecar,
    ):
        with sidecar.login() as client, sidecar.login() as other:
            client.send(query("select pg_sleep(0.1)"))
            sidecar.until(lambda: len(sidecar.pool.state.active) == 1, "it runs")
            cancel = threading.Thread(target=client.cancel, daemon=True)
            cancel.start()
            assert way.held.wait(PATIENCE)
            assert kinds(client.until_ready()) == "TDCZ"
            other.send(query("select pg_sleep(0.2)"))
            sidecar.until(lambda: len(sidecar.pool.state.waiters) == 1, "it waits")
            assert cancel.is_alive()
            assert not sidecar.pool.state.idle
            way.go.set()
            cancel.join(PATIENCE)
            assert not cancel.is_alive()
            assert kinds(other.until_ready()) == "TDCZ"
        sidecar.until_whole()


def postgres_on(way: SlowCancels, postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    """The same server, that way."""

    class There(EmbeddedPostgres):
        def __init__(self) -> None:
            pass

        def dsn(self, **overrides: str | int) -> str:
            return postgres.dsn(port=way.port, **overrides)

    return There()
