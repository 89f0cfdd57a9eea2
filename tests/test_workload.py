"""The demo's applications on a plain PostgreSQL: they run, survive its crash and stop when told."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.conftest import MakePostgres

DEADLINE = 15.0  # seconds for something to show
STOPS_WITHIN = 2.0  # seconds after SIGTERM


@contextmanager
def running(server: EmbeddedPostgres) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "sidecar.demo.workload", "--dsn", server.dsn()]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(server: EmbeddedPostgres, sql: str, is_enough: Callable[[str], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not is_enough(answer := server.psql(sql)):
        assert time.monotonic() < deadline, f"{sql}: {answer!r} after {DEADLINE:.0f} s"
        time.sleep(0.05)


def wait_for_orders(server: EmbeddedPostgres, more_than: int) -> None:
    wait_for(server, "SELECT to_regclass('orders')", bool)
    wait_for(server, "SELECT count(*) FROM orders", lambda count: int(count) > more_than)


def stop(process: subprocess.Popen[bytes]) -> float:
    """Send SIGTERM; the seconds it took to end."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 0
    return time.monotonic() - began


def test_every_application_does_its_work(own_postgres: MakePostgres) -> None:
    """Each under its own name; the burst (second 8) with more clients than the pool has places."""
    server = own_postgres(settings={"log_statement": "none"})
    names = "SELECT DISTINCT application_name FROM pg_stat_activity WHERE usename = 'postgres'"
    with running(server) as process:
        seen: set[str] = set()

        def is_complete(answer: str) -> bool:
            seen.update(answer.splitlines())
            return {"shop-api", "reporting", "importer", "forgetful", "nightly-burst"} <= seen

        wait_for_orders(server, 10)
        wait_for(server, names, is_complete)
        wait_for(
            server,
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'nightly-burst' AND xact_start IS NOT NULL",
            lambda count: int(count) > 25,
        )
        assert int(server.psql("SELECT count(*) FROM price_changes")) >= 300
        assert process.poll() is None
        assert stop(process) < STOPS_WITHIN
    log = server.log_path.read_text()
    assert "duplicate key value" in log
    assert "unexpected EOF" not in log  # each client said good-bye


def test_goes_on_after_a_crash(own_postgres: MakePostgres) -> None:
    """Connections lost and refused: it tries again until the server is back."""
    server = own_postgres()
    with running(server) as process:
        wait_for_orders(server, 5)
        server.kill()
        server.restart()
        wait_for_orders(server, int(server.psql("SELECT count(*) FROM orders")) + 5)
        assert process.poll() is None
        assert stop(process) < STOPS_WITHIN


def test_stops_when_the_server_hangs(own_postgres: MakePostgres) -> None:
    """Queries that are never answered, cancel requests neither."""
    server = own_postgres()
    with running(server) as process:
        wait_for_orders(server, 0)
        server.pause()
        time.sleep(0.3)  # by now each of them has a query under way
        assert stop(process) < STOPS_WITHIN


def test_stops_when_its_parent_is_gone(own_postgres: MakePostgres) -> None:
    """The demo was killed: nobody is left to tell the workload."""
    server = own_postgres()
    script = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'sidecar.demo.workload', '--dsn', sys.argv[1]]\n"
        "subprocess.Popen(command)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, server.dsn()]) as parent:
        wait_for_orders(server, 0)
        parent.kill()
    others = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shop-api'"
    wait_for(server, others, lambda count: count == "0")


@pytest.mark.parametrize("argument", ["--rate=0", "--rate=-1", "--rate=x"])
def test_impossible_rate_is_refused(argument: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sidecar.demo.workload", "--dsn=postgresql://", argument],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--rate" in done.stderr
