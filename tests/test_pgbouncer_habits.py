"""What people know from PgBouncer works here: the same columns, and the programs that read them.

Debian's PgBouncer and its exporter run unchanged. ``NEWER`` has the columns of PgBouncer 1.24, which
Debian 12 does not have.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.sidecar_process import PATIENCE, SidecarProcess, environment, eventually
from tests.test_console import CONSOLE
from tests.wire import Sidecar

Columns = list[tuple[str, int]]
"""Name and OID of the type of each."""

SHOWN = (
    *("POOLS", "CLIENTS", "SERVERS", "SOCKETS", "ACTIVE_SOCKETS", "STATS", "STATS_TOTALS"),
    *("STATS_AVERAGES", "TOTALS", "LISTS", "DATABASES", "USERS", "CONFIG", "VERSION", "MEM"),
    *("DNS_HOSTS", "DNS_ZONES"),
)

SOCKET = (
    "type user database replication state addr port local_addr local_port connect_time request_time"
    " wait wait_us close_needed ptr link remote_pid tls application_name prepared_statements id"
)
COUNTS = "server_assignment_count xact_count query_count {} {} xact_time query_time wait_time"
PARSES = "client_parse_count server_parse_count bind_count"


def _with(prefix: str, names: str) -> str:
    return " ".join(prefix + name for name in names.split())


NEWER = {
    "POOLS": "database user cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active"
    " sv_active_cancel sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us"
    " pool_mode load_balance_hosts",
    "CLIENTS": SOCKET,
    "SERVERS": SOCKET,
    "SOCKETS": f"{SOCKET} recv_pos pkt_pos pkt_remain send_pos send_remain pkt_avail send_avail",
    "STATS": f"database {_with('total_', COUNTS.format('received', 'sent'))} {_with('total_', PARSES)}"
    f" {_with('avg_', COUNTS.format('recv', 'sent'))} {_with('avg_', PARSES)}",
    "STATS_TOTALS": f"database {COUNTS.format('bytes_received', 'bytes_sent')} {PARSES}",
    "STATS_AVERAGES": f"database {COUNTS.format('bytes_received', 'bytes_sent')} {_with('avg_', PARSES)}",
    "DATABASES": "name host port database force_user pool_size min_pool_size reserve_pool_size"
    " server_lifetime pool_mode load_balance_hosts max_connections current_connections"
    " max_client_connections current_client_connections paused disabled",
    "USERS": "name pool_size reserve_pool_size pool_mode max_user_connections current_connections"
    " max_user_client_connections current_client_connections",
    "STATE": "key value",
}
"""As PgBouncer 1.24.1 answers; its usage.md describes them."""

TOTALS = (
    *_with("total_", COUNTS.format("client_bytes", "server_bytes")).split(),
    *_with("total_ps_", PARSES).split(),
    *_with("avg_", COUNTS.format("client_bytes", "server_bytes")).split(),
    *_with("avg_ps_", PARSES).split(),
)
LISTS = (
    *("databases", "users", "peers", "pools", "peer_pools", "free_clients", "used_clients"),
    *("login_clients", "free_servers", "used_servers", "dns_names", "dns_zones", "dns_queries"),
    "dns_pending",
)

PLACED_ELSEWHERE = {"DATABASES": {"reserve_pool"}}
"""Columns that 1.24 renamed: behind the others here, for programs that still read them."""


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port: int = it.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def pgbouncer(postgres) -> Iterator[str]:
    """The dsn of the console of Debian's PgBouncer, with a pool before our server."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    program = shutil.which("pgbouncer", path=path)
    assert program is not None, "make debian-packages installs PgBouncer"
    # pytest's own folders are closed to the account that it has to run as
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as name:
        folder = Path(name)
        account = "nobody" if os.getuid() == 0 else None
        if account is not None:
            shutil.chown(folder, account)
        port = free_port()
        (folder / "users").write_text('"admin" ""\n"stats" ""\n')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\nmain = host=127.0.0.1 port={postgres.port} dbname=postgres user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {folder}/users\n"
            "admin_users = admin\nstats_users = stats\n"
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, folder / "pgbouncer.ini"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=account,
            )
        dsn = f"host=127.0.0.1 port={port} user=admin dbname=pgbouncer"
        try:
            eventually(lambda: accepts(dsn), "PgBouncer is ready")
            yield dsn
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
            print((folder / "log").read_text())


def accepts(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(scope="module")
def sidecar(postgres) -> Iterator[Sidecar]:
    with Sidecar(postgres, console=CONSOLE) as it:
        yield it


def columns_of(dsn: str, what: str) -> Columns:
    with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as conn:
        description = conn.execute(f"SHOW {what}").description
        assert description is not None
        return [(column.name, column.type_code) for column in description]


@pytest.mark.parametrize("what", SHOWN)
def test_every_column_of_debian_s_pgbouncer_is_there(pgbouncer, sidecar, what):
    """By its name, with its type, and in its order."""
    theirs = columns_of(pgbouncer, what)
    ours = columns_of(sidecar.dsn("stats", "pgsidecar"), what)
    assert {*theirs} <= {*ours}
    elsewhere = PLACED_ELSEWHERE.get(what, set())
    names = [name for name, _ in theirs if name not in elsewhere]
    assert [name for name, _ in ours if name in names] == names


@pytest.mark.parametrize("what", NEWER)
def test_every_column_of_a_newer_pgbouncer_is_there(sidecar, what):
    """In its order, and in front: what is ours comes behind."""
    names = [name for name, _ in columns_of(sidecar.dsn("stats", "pgsidecar"), what)]
    expected = NEWER[what].split()
    assert names[: len(expected)] == expected


@pytest.mark.parametrize(("what", "expected"), [("TOTALS", TOTALS), ("LISTS", LISTS)])
def test_lines_have_the_names_of_pgbouncer(sidecar, what, expected):
    with psycopg.connect(sidecar.dsn("stats", "pgsidecar"), autocommit=True) as conn:
        assert tuple(row[0] for row in conn.execute(f"SHOW {what}")) == expected


def test_show_pools_reads_as_pgbouncer_s(pgbouncer, sidecar, postgres):
    """The same line from psql, with one client that is in a transaction."""
    lines = []
    for console in (pgbouncer, sidecar.dsn("admin", "pgsidecar")):
        main = psycopg.conninfo.make_conninfo(console, dbname="main", user="stats")
        with psycopg.connect(main) as client:
            client.execute("SELECT 1")
            done = subprocess.run(
                [postgres.bin_dir / "psql", "-XAt", "-d", console, "-c", "SHOW POOLS"],
                capture_output=True,
                text=True,
                env=environment(),
                timeout=PATIENCE,
                check=True,
            )
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("main|")]
        lines.append(line.split("|"))
    theirs, ours = lines
    # user: theirs is the client's, as the dsn names none to force; sv_idle: ours are kept warm;
    # pool_mode: each its default; the last column is new
    unlike = {1, 9, 15, 16}
    assert [v for n, v in enumerate(theirs) if n not in unlike] == [
        v for n, v in enumerate(ours) if n not in unlike
    ]


# -- Debian's exporter -----------------------------------------------------------------------------


@pytest.fixture
def exporter_of(tmp_path) -> Iterator[object]:
    started: list[subprocess.Popen[bytes]] = []

    def start(pg_port: int) -> int:
        program = shutil.which("prometheus-pgbouncer-exporter")
        assert program is not None, "make debian-packages installs it"
        port = free_port()
        with (tmp_path / "exporter.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(program, "--host", "127.0.0.1", "--port", str(port)),
                    *("--pgbouncer-host", "127.0.0.1", "--pgbouncer-port", str(pg_port)),
                    *("--pgbouncer-user", "pgbouncer"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment() | {"PGPASSWORD": "exported"},
            )
        started.append(process)
        return port

    yield start
    for process in started:
        process.terminate()
        process.wait(PATIENCE)
    print((tmp_path / "exporter.log").read_text())


def test_debian_s_exporter_works_unchanged(make_process, postgres, exporter_of):
    """It connects as user ``pgbouncer`` to database ``pgbouncer``, which are built in, and reads
    columns that PgBouncer itself has no more."""
    sidecar: SidecarProcess = make_process(
        postgres.dsn(),
        listen={"auth": "scram-sha-256"},
        users={"pgbouncer": {"password": "exported"}, "app": {"password": "secret"}},
        console={"stats_users": "pgbouncer"},
        max_size=7,
    )
    with psycopg.connect(sidecar.dsn("app"), password="secret") as client:
        for _ in range(3):
            client.execute("SELECT 1")
        port = exporter_of(sidecar.pg_port)
        text = eventually(lambda: scraped(port), "the exporter answers")
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("pgbouncer_")
    )
    assert values['pgbouncer_active_clients{database="main",user="postgres"}'] == "1.0"
    assert values['pgbouncer_waiting_clients{database="main",user="postgres"}'] == "0.0"
    assert values['pgbouncer_requests_total{database="main"}'] == "4.0"  # BEGIN is one
    assert values['pgbouncer_pool_size{database="postgres"}'] == "7.0"  # the server's name of it
    assert float(values['pgbouncer_received_bytes_total{database="main"}']) > 0
    assert float(values['pgbouncer_query_microseconds_total{database="main"}']) > 0
    assert values["pgbouncer_used_clients"] == "2.0"
    assert values["pgbouncer_pools"] == "2.0"


def scraped(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""
