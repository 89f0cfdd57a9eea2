"""The command as an operator uses it: help, exit codes, reports, signals and logs."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psycopg
import pytest
from cryptography import x509

from sidecar import __version__
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from tests.conftest import MakePostgres
from tests.listener_files import DAY, ListenerFiles
from tests.sidecar_process import (
    MakeProcess,
    Sidecar,
    SidecarProcess,
    configuration,
    duplicate,
    environment,
    eventually,
)


def pgsidecar(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    return subprocess.run(
        [Path(sys.executable).with_name("pgsidecar"), *arguments],
        capture_output=True,
        text=True,
        env=environment() | variables,
        timeout=20,
        check=False,
    )


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sidecar.yaml"
    path.write_text(text)
    return path


# -- help and arguments ------------------------------------------------------------------------


def test_help_names_the_commands_and_shows_how() -> None:
    """The first thing a newcomer types."""
    done = pgsidecar("--help")
    assert done.returncode == 0
    for word in (
        "run",
        "check",
        "why",
        "top",
        "demo",
        "--version",
        "examples:",
        "--config config.yaml",
    ):
        assert word in done.stdout
    assert pgsidecar("--version").stdout == f"pgsidecar {__version__}\n"


@pytest.mark.parametrize("command", ["run", "check", "why", "top", "demo"])
def test_each_command_has_its_help(command: str) -> None:
    done = pgsidecar(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: pgsidecar {command}")


@pytest.mark.parametrize(
    "arguments",
    [(), ("rum",), ("run",), ("demo", "--seconds", "0"), ("demo", "--port", "70000")],
    ids=" ".join,
)
def test_wrong_arguments_end_with_2(arguments: tuple[str, ...]) -> None:
    done = pgsidecar(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: pgsidecar")
    assert done.stdout == ""


# -- configuration -----------------------------------------------------------------------------

BAD = """
listen: {port: 65536}
pools:
  main:
    dsn: postgresql://app:secret@db/app
    max_size: 2
    min_idle: 3
    acquire_timout: 5s
"""


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_bad_configuration_ends_with_2_and_says_all_that_is_wrong(
    tmp_path: Path, command: str
) -> None:
    """Path, value and what is allowed, for each; no secret, no traceback."""
    done = pgsidecar(command, "--config", written(tmp_path, BAD))
    assert done.returncode == 2
    assert done.stdout == ""
    first, *problems, last = done.stderr.splitlines()
    assert first == "pgsidecar: the configuration cannot be used"
    assert problems == [
        "listen.port: '65536' is out of range; allowed: 0 to 65535",
        "pools.main.min_idle: '3' is more than max_size 2; allowed: 0 to 2",
    ]
    unknown = "pools.main.acquire_timout: unknown key, did you mean acquire_timeout?; allowed: dsn,"
    assert last.startswith(unknown)


def test_a_bad_variable_is_named(tmp_path: Path) -> None:
    """What overrides the file is not found by looking at the file."""
    path = written(tmp_path, "pools: {main: {dsn: 'postgresql://app@db/app'}}")
    done = pgsidecar("check", "--config", path, PGSIDECAR__POOLS__MAIN__MAX_SIZE="many")
    assert done.returncode == 2
    assert "pools.main.max_size: 'many'" in done.stderr
    assert "PGSIDECAR__POOLS__MAIN__MAX_SIZE" in done.stderr


def test_a_missing_file_ends_with_2(tmp_path: Path) -> None:
    done = pgsidecar("run", "--config", tmp_path / "nothing.yaml")
    assert done.returncode == 2
    assert "nothing.yaml: cannot be read: No such file or directory" in done.stderr


def test_a_port_that_is_taken_ends_with_2(
    postgres: EmbeddedPostgres, make_process: MakeProcess, tmp_path: Path
) -> None:
    """Both ports; and the first that was opened is closed again."""
    first = make_process(postgres.dsn())
    for section, port in (("listen", first.pg_port), ("http", first.http_port)):
        variable = {f"PGSIDECAR__{section.upper()}__PORT": str(port)}
        path = written(tmp_path, configuration(postgres.dsn()))
        done = pgsidecar("run", "--config", path, **variable)
        assert done.returncode == 2
        assert f"{section}: cannot listen on 127.0.0.1:{port}: " in done.stderr
        assert "in use" in done.stderr
        assert "Traceback" not in done.stderr


# -- check -------------------------------------------------------------------------------------


def test_check_reports_what_it_found(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    path = written(tmp_path, configuration(postgres.dsn(), max_size=7))
    done = pgsidecar("check", "--config", path)
    assert (done.returncode, done.stderr) == (0, "")
    version = postgres.psql("SHOW server_version")
    address = f"127.0.0.1:{postgres.port}"
    assert (
        "ok    pool main: transaction mode, at most 7 connections, 5 kept idle,"
        f" as postgres to postgres at {address}\n      PostgreSQL {version}, connected in "
    ) in done.stdout
    assert done.stdout.endswith("\nAll is well.\n")


def test_check_warns_of_a_server_that_is_too_small(
    own_postgres: MakePostgres, tmp_path: Path
) -> None:
    """It works, up to the day of the peak."""
    server = own_postgres(settings={"max_connections": "10"})
    path = written(tmp_path, configuration(server.dsn(), max_size=25))
    done = pgsidecar("check", "--config", path)
    assert done.returncode == 0
    assert "warning: max_size 25 is more than the 7 connections" in done.stdout


def test_check_fails_where_a_pool_does(own_postgres: MakePostgres, tmp_path: Path) -> None:
    """With the server's own words, for each pool; and without the password."""
    server = own_postgres(auth="scram-sha-256")
    pools = {
        "good": {"dsn": server.dsn()},
        "wrong": {"dsn": server.dsn(password="topsecret")},
        "nobody": {"dsn": server.dsn(port=1)},
    }
    path = written(tmp_path, json.dumps({"pools": pools}))
    done = pgsidecar("check", "--config", path)
    assert done.returncode == 1
    assert "ok    pool good" in done.stdout
    assert "FAIL  pool wrong" in done.stdout
    assert 'password authentication failed for user "postgres"' in done.stdout
    assert "FAIL  pool nobody" in done.stdout
    assert "      connection refused\n" in done.stdout
    assert done.stdout.endswith("\n2 of 3 pools cannot be used.\n")
    assert "topsecret" not in done.stdout + done.stderr
    assert str(server.password) not in done.stdout + done.stderr


def test_check_tells_until_when_clients_can_use_tls(
    postgres: EmbeddedPostgres, files: ListenerFiles, tmp_path: Path
) -> None:
    path = written(tmp_path, configuration(postgres.dsn(), listen=files.listen(auth="trust")))
    done = pgsidecar("check", "--config", path)
    assert (done.returncode, done.stderr) == (0, "")
    certificate = x509.load_pem_x509_certificate(Path(files.certificate).read_bytes())
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    assert f"TLS to clients      allowed, certificate good until {until}\n" in done.stdout
    assert "warning" not in done.stdout


@pytest.mark.parametrize(
    ("days", "other_key", "code", "text"),
    [
        (-1, False, 1, "FAIL  TLS to clients: listen.tls_cert_file: the certificate has expired ("),
        (9, False, 0, "warning: the certificate for clients ends in 9 days\n"),
        (30, True, 1, "FAIL  TLS to clients: listen.tls_key_file: "),
    ],
)
def test_check_finds_certificates_that_clients_cannot_use(
    postgres: EmbeddedPostgres,
    files: ListenerFiles,
    tmp_path: Path,
    days: int,
    other_key: bool,
    code: int,
    text: str,
) -> None:
    made = files.authority.issue("localhost", ends=days * DAY)
    certificate, key = made.write(tmp_path, "server")
    listen = files.listen(tls_cert_file=str(certificate), auth="trust")
    if not other_key:
        listen["tls_key_file"] = str(key)
    done = pgsidecar(
        "check", "--config", written(tmp_path, configuration(postgres.dsn(), listen=listen))
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert text in done.stdout
    assert done.stdout.endswith(
        "\nTLS to clients cannot be used.\n" if code else "\nAll is well.\n"
    )


def test_check_warns_of_users_that_cannot_log_in(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "good").write_text("secret\n")
    listen = {"auth": "scram-sha-256"}
    users = {name: {"password_file": str(tmp_path / name)} for name in ("good", "empty", "gone")}
    text = configuration(
        postgres.dsn(user="app", password="x"),
        listen=listen,
        users=users,
        console={"admin_users": "good,app,admn", "stats_users": "grafana"},
    )
    done = pgsidecar("check", "--config", written(tmp_path, text))
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line.startswith("warning")] == [
        "warning: users.empty.password_file: its first line is empty; this user cannot log in",
        "warning: users.gone.password_file: No such file or directory; this user cannot log in",
        "warning: console.admin_users: admn is in no users entry and no dsn, and cannot log in",
        "warning: console.stats_users: grafana is in no users entry and no dsn, and cannot log in",
    ]


# -- run: signals and drain --------------------------------------------------------------------


async def test_sigterm_lets_transactions_finish(
    postgres: EmbeddedPostgres, make_process: MakeProcess
) -> None:
    """Idle clients go at once, new ones are refused, who is in a transaction goes after it."""
    postgres.psql("CREATE TABLE IF NOT EXISTS cli_drained (n int)")
    sidecar = make_process(postgres.dsn(), drain_timeout="20s")
    idle = await psycopg.AsyncConnection.connect(sidecar.dsn())
    busy = await psycopg.AsyncConnection.connect(sidecar.dsn())
    try:
        await busy.execute("INSERT INTO cli_drained VALUES (1)")
        sidecar.terminate()
        assert is_told_of_the_shutdown(await last_words(idle))
        status, why = await asyncio.to_thread(sidecar.get, "/readyz")
        assert (status, why) == (503, "draining\n")
        with pytest.raises(psycopg.OperationalError, match="refused"):
            await psycopg.AsyncConnection.connect(sidecar.dsn())
        assert sidecar.process.poll() is None
        await busy.execute("INSERT INTO cli_drained VALUES (2)")
        said = await last_words(busy, m.query(b"COMMIT"))
        assert said.startswith(m.message(m.COMMAND_COMPLETE, b"COMMIT\0") + m.READY_IDLE_MESSAGE)
        assert is_told_of_the_shutdown(said)
    finally:
        await idle.close()
        await busy.close()
    assert await asyncio.to_thread(sidecar.wait) == 0
    assert postgres.psql("SELECT n FROM cli_drained ORDER BY n") == "1\n2"
    assert "pgsidecar: draining clients=2\n" in sidecar.log
    assert sidecar.log.endswith("INFO pgsidecar: stopped\n")


async def last_words(
    conn: psycopg.AsyncConnection[tuple[object, ...]], request: bytes = b""
) -> bytes:
    """What a client that is idle, but for this request, is told up to the end of its connection.

    Past the driver, which would keep to itself what it was not asked for.
    """
    reader, writer = await asyncio.open_connection(sock=duplicate(conn))
    try:
        writer.write(request)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


def is_told_of_the_shutdown(said: bytes) -> bool:
    """The last message is a FATAL with 57P01, admin_shutdown."""
    fields = m.error_fields(said[said.rindex(b"SFATAL\0") :])
    return fields["S"] == fields["V"] == "FATAL" and fields["C"] == "57P01"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_client_that_never_ends_is_cut_off_after_the_drain_timeout(
    postgres: EmbeddedPostgres, make_process: MakeProcess, number: signal.Signals
) -> None:
    """Its transaction is rolled back, not left open in the server; Ctrl-C is no different."""
    sidecar = make_process(postgres.dsn(application_name=f"cli-{number}"), drain_timeout="300ms")
    with psycopg.connect(sidecar.dsn()) as conn:
        conn.execute("SELECT 1")
        os.kill(sidecar.process.pid, number)
        assert sidecar.wait() == 0
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
    left = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cli-{number}'"
    eventually(lambda: postgres.psql(left) == "0", "no backend is left")


async def test_waiting_clients_are_served_during_the_drain(
    postgres: EmbeddedPostgres, make_process: MakeProcess
) -> None:
    """They asked before it began."""
    sidecar = make_process(postgres.dsn(), max_size=1, drain_timeout="20s")
    holder = await psycopg.AsyncConnection.connect(sidecar.dsn())
    waiter = await psycopg.AsyncConnection.connect(sidecar.dsn(), autocommit=True)
    async with holder, waiter:
        await holder.execute("SELECT 1")
        asking = asyncio.create_task(waiter.execute("SELECT 42"))
        await sidecar.until(lambda now: now.pending == 1)
        sidecar.terminate()
        await asyncio.to_thread(is_draining, sidecar)
        await holder.commit()
        assert await (await asking).fetchone() == (42,)
    assert await asyncio.to_thread(sidecar.wait) == 0


def is_draining(sidecar: Sidecar) -> bool:
    return eventually(lambda: sidecar.get("/readyz") == (503, "draining\n"), "it drains")


def test_sigterm_ends_a_sidecar_without_postgresql(
    own_postgres: MakePostgres, make_process: MakeProcess
) -> None:
    """Also one that tries to connect just then."""
    server = own_postgres()
    dsn = server.dsn()
    server.stop()
    sidecar = make_process(dsn)
    eventually(lambda: "cannot connect to the server" in sidecar.log, "it has tried")
    sidecar.terminate()
    assert sidecar.wait() == 0
    assert "Traceback" not in sidecar.log


# -- run: clients with passwords, logs ---------------------------------------------------------


def test_clients_log_in_with_the_password_of_the_dsn(
    own_postgres: MakePostgres, make_process: MakeProcess
) -> None:
    """The default, SCRAM on both sides; no entry for users is needed, and no other password fits."""
    server = own_postgres(auth="scram-sha-256")
    sidecar = make_process(server.dsn(), listen={"auth": "scram-sha-256"})
    for database in ("main", "postgres"):
        dsn = sidecar.dsn("postgres", database)
        with psycopg.connect(dsn, password=server.password) as conn:
            assert conn.execute("SELECT current_user::text").fetchone() == ("postgres",)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(sidecar.dsn("postgres"), password="guessed")
    log = sidecar.log
    assert "WARNING pgsidecar.proxy: authentication failed" in log
    assert "guessed" not in log
    assert str(server.password) not in log


def requests(sidecar: SidecarProcess) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{sidecar.http_port}/livez", timeout=5):
        pass


def test_text_log_has_no_access_lines_by_default(
    postgres: EmbeddedPostgres, make_process: MakeProcess
) -> None:
    """A scrape every 15 s would be most of the log."""
    sidecar = make_process(postgres.dsn())
    requests(sidecar)
    with psycopg.connect(sidecar.dsn()) as conn:
        conn.execute("SELECT 'a literal'")
    sidecar.terminate()
    assert sidecar.wait() == 0
    events = [line.split(" ", 1)[1] for line in sidecar.log.splitlines()]
    assert events == [
        f"INFO pgsidecar: ready for clients postgresql=127.0.0.1:{sidecar.pg_port}"
        f" http=127.0.0.1:{sidecar.http_port} pools=main",
        "INFO pgsidecar: draining clients=0",
        "INFO pgsidecar: stopped",
    ]


def test_json_log_is_one_object_a_line(
    postgres: EmbeddedPostgres, make_process: MakeProcess
) -> None:
    """At the level debug, access log included: nothing breaks the format, nothing quotes a query."""
    sidecar = make_process(
        postgres.dsn(),
        log={"format": "json", "level": "debug"},
        http={"access_log": True},
    )
    requests(sidecar)
    with psycopg.connect(sidecar.dsn()) as conn:
        conn.execute("SELECT 'a literal'")
    sidecar.terminate()
    assert sidecar.wait() == 0
    entries = [json.loads(line) for line in sidecar.log.splitlines()]
    assert all(entry.keys() >= {"time", "level", "logger", "event"} for entry in entries)
    events = {entry["event"] for entry in entries}
    assert {"ready for clients", "draining", "stopped", "server connection opened"} <= events
    assert any("GET /livez" in entry["event"] for entry in entries)
    assert "a literal" not in sidecar.log
